"""Every figure of a sentence is read back and held against the record that it was said of: its size, its sign, its word."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.transfer import Comparison, OverSeeds, over_seeds, promote, verdict
from orchestrator.transfer.domain_shift import advise
from orchestrator.transfer.promotion import Promotion
from orchestrator.transfer.records import Control, RungRecord, TrialRecord
from orchestrator.transfer.scoring import score

NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
GAIN = re.compile(
    rf"({NUMBER})(?: ± ({NUMBER}))?( nats| points of accuracy)? (better or worse|better|worse) than ([a-z ]+?)(?=,|;|$)"
)
OTHERS: tuple[Control, ...] = ("scratch", "head", "shuffled", "k_shot")
CALLED: dict[str, Control] = {
    "the base": "none",
    "head": "head",
    "training from scratch": "scratch",
    "shuffled answers": "shuffled",
    "the base with examples in its prompt": "k_shot",
}


@st.composite
def comparisons(draw: st.DrawFn, unit: str) -> Comparison:
    mean = draw(st.floats(-3.0, 3.0) if unit != "accuracy" else st.floats(-1.0, 1.0))
    below, above = (draw(st.sampled_from([0.0003, 0.004, 0.02, 0.3, 1.5])) for _ in range(2))
    return Comparison(mean=mean, low=mean - below, high=mean + above, method="sign_flip", num_examples=40, unit=unit)


@st.composite
def judged(draw: st.DrawFn) -> dict[Control, Comparison]:
    unit = draw(st.sampled_from(["nats per token", "accuracy"]))
    names: list[Control] = ["none", *draw(st.lists(st.sampled_from(OTHERS), unique=True))]
    return {name: draw(comparisons(unit)) for name in names}


def spoken(found: dict[Control, Comparison]) -> str:
    others: dict[Control, Comparison] = {name: each for name, each in found.items() if name not in ("none", "scratch")}
    return verdict(found["none"], found.get("scratch"), others=others).sentence


@st.composite
def repeated(draw: st.DrawFn, unit: str) -> OverSeeds:
    """Gains from two to five seeds, alike or not."""
    mean = draw(st.floats(-3.0, 3.0) if unit != "accuracy" else st.floats(-1.0, 1.0))
    apart = draw(st.sampled_from([0.0, 0.0003, 0.004, 0.02, 0.3]))
    gains = [mean + apart * draw(st.floats(0.5, 1.0)) * (-1) ** n for n in range(draw(st.integers(2, 5)))]
    found = over_seeds(range(len(gains)), gains, unit)
    assert found is not None
    return found


@st.composite
def judged_over_seeds(draw: st.DrawFn) -> tuple[dict[Control, Comparison], OverSeeds]:
    found = draw(judged())
    return found, draw(repeated(found["none"].unit))


def shown(text: str, value: float) -> bool:
    """Whether a number that is written is the value, rounded to as many decimals as are written."""
    decimals = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-decimals * (1 + 1e-9) + 1e-12


@given(judged())
def test_the_verdict_says_its_figures(found: dict[Control, Comparison]) -> None:
    sentence = spoken(found)
    scale, unit = (100.0, " points of accuracy") if found["none"].unit == "accuracy" else (1.0, " nats")
    parts = GAIN.findall(sentence.partition(": ")[2].partition("; of the gain")[0].partition("; all of")[0])
    told = [CALLED[name] for *_, name in parts]
    assert told[0] == "none"
    assert set(found) - set(told) <= {"shuffled"}, "what is not in the list is said of the gain"
    assert [part[2] for part in parts] == [unit, *[""] * (len(parts) - 1)]
    for figure, margin, _, side, name in parts:
        comparison = found[CALLED[name]]
        assert shown(figure, abs(comparison.mean) * scale)
        assert shown(margin, max(comparison.high - comparison.mean, comparison.mean - comparison.low) * scale)
        assert float(margin) > 0, "an interval that is there is seen"
        assert side == ("better" if comparison.mean > 0 else "worse" if comparison.mean < 0 else "better or worse")
    assert f"on {found['none'].num_examples} test examples" in sentence


@given(judged())
def test_the_verdicts_word_is_what_its_intervals_allow(found: dict[Control, Comparison]) -> None:
    word = spoken(found).partition(":")[0]
    deciding = [found[name] for name in ("none", "scratch") if name in found]
    assert (word == "negative") == any(comparison.high < 0 for comparison in deciding)
    assert (word == "positive") == all(comparison.low > 0 for comparison in deciding)
    if word == "no gain":
        assert any(comparison.high < 0.01 for comparison in deciding)
    if word == "inconclusive":
        assert all(comparison.high >= 0.01 for comparison in deciding)


@given(judged_over_seeds())
def test_the_verdict_says_its_figures_over_seeds(found: tuple[dict[Control, Comparison], OverSeeds]) -> None:
    compared, seeds = found
    scale, unit = (100.0, "points of accuracy") if seeds.unit == "accuracy" else (1.0, "nats")
    sentence = verdict(compared["none"], compared.get("scratch"), over_seeds=seeds).sentence
    told = re.search(
        rf"over (\d) seeds, on the same examples, ({NUMBER}) ± ({NUMBER}) {unit} (better or worse|better|worse) than the base "
        rf"\(each alone: ([^)]*)\)",
        sentence,
    )
    assert told is not None
    assert int(told[1]) == len(seeds.values)
    assert shown(told[2], abs(seeds.mean) * scale)
    assert shown(told[3], seeds.half_width * scale)
    assert (float(told[3]) > 0) == (seeds.half_width * scale > 1e-9), "an interval that is there is seen"
    assert told[4] == ("better" if seeds.mean > 0 else "worse" if seeds.mean < 0 else "better or worse")
    for text, value in zip(told[5].split(", "), seeds.values, strict=True):
        assert text[0] in "+-"
        assert shown(text, value * scale)


@given(judged_over_seeds())
def test_the_verdicts_word_is_what_intervals_and_seeds_allow(found: tuple[dict[Control, Comparison], OverSeeds]) -> None:
    compared, seeds = found
    none, scratch = compared["none"], compared.get("scratch")
    word, alone = (verdict(none, scratch, over_seeds=each).sentence.partition(":")[0] for each in (seeds, None))
    doubted = alone == "positive" and seeds.low <= 0
    assert word == ("inconclusive" if doubted else alone)
    assert ("since another seed" in verdict(none, scratch, over_seeds=seeds).sentence) == doubted


@given(judged())
def test_a_gain_is_split_into_the_task_and_the_rest(found: dict[Control, Comparison]) -> None:
    sentence = spoken(found)
    gain, task = found["none"], found.get("shuffled")
    scale = 100.0 if gain.unit == "accuracy" else 1.0
    if task is None or gain.low <= 0:
        assert "the gain of" not in sentence
        return
    split = re.search(rf"the gain of ({NUMBER}) ", sentence)
    assert split is not None
    assert shown(split[1], gain.mean * scale)
    told = sentence[split.end() :]
    figure = re.search(rf"({NUMBER}) ± ({NUMBER})", told)
    assert figure is not None
    assert shown(figure[1], abs(task.mean) * scale)
    assert shown(figure[2], max(task.high - task.mean, task.mean - task.low) * scale)
    assert ("gain the rest" in told) == (task.low > 0 and task.mean < gain.mean)
    assert ("gain none of it" in told) == (task.low > 0 and task.mean >= gain.mean)
    assert ("gain as much" in told) == (task.low <= 0 <= task.high)
    assert (f"gain {figure[0]} more" in told) == (task.high < 0)


def test_the_split_in_words() -> None:
    def over(low: float, high: float) -> Comparison:
        return Comparison(mean=(low + high) / 2, low=low, high=high, method="bootstrap", num_examples=200)

    assert spoken({"none": over(2.04, 2.14), "shuffled": over(0.02, 0.04)}) == (
        "positive: 2.09 ± 0.05 nats better than the base, on 200 test examples; "
        "of the gain of 2.09 nats, 0.03 ± 0.01 comes from the task; shuffled answers gain the rest"
    )
    assert spoken({"none": over(2.04, 2.14), "shuffled": over(-0.003, 0.003)}).endswith(
        "no measurable part comes from the task: shuffled answers gain as much (difference 0.000 ± 0.003)"
    )


def test_no_interval_is_no_margin() -> None:
    few = Comparison(mean=1.0, low=-math.inf, high=math.inf, method="sign_flip", num_examples=4)
    too_few = "too few for an interval"
    assert spoken({"none": few}) == f"inconclusive: 1.00 nats better than the base, on 4 test examples: {too_few}"


METRIC = st.integers(200, 400).map(lambda hundredths: hundredths / 100)
BASE_METRIC = st.sampled_from([1.87, 2.5, 3.2, 4.13])
LOST = st.sampled_from([None, -0.02, 0.0, 0.06, 0.1, 0.105, 0.112, 0.3])


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[TrialRecord], TrialRecord]:
    """Trials with the score that a search gives them, and the untouched base."""

    def trial(number: int, control: Control | None, value: float, lost: float | None) -> TrialRecord:
        last = RungRecord(step=90, tokens=1, metric=value, forgetting=lost, score=score(value, False, lost, 0.1))
        first = last.model_copy(update={"step": 30, "metric": draw(METRIC)})
        return TrialRecord(
            trial_id=control or f"t{number:03d}",
            number=number,
            control=control,
            layers=draw(st.sampled_from(["head", "last:2"])),
            tune=draw(st.sampled_from(["lora", "full"])),
            lora_rank=8,
            learning_rate=draw(st.floats(1e-6, 1e-1)),
            state=draw(st.sampled_from(["finished", "stopped"])),
            rungs=(first, last),
            total_steps=90,
        )

    count = draw(st.integers(1, 6))
    return [trial(n, None, draw(METRIC), draw(LOST)) for n in range(count)], trial(-1, "none", draw(BASE_METRIC), 0.0)


def of(found: Promotion, trials: list[TrialRecord]) -> TrialRecord:
    """The trial that the reason is about, by the figures of its label."""
    (named,) = [trial for trial in trials if trial.trial_id == found.trial_id] or [
        trial for trial in trials if f"{trial.label}: loss {trial.metric:.4g} " in found.reason
    ]
    return named


@given(searches())
def test_the_reason_of_a_promotion_says_its_figures(search: tuple[list[TrialRecord], TrialRecord]) -> None:
    trials, base = search
    assume(len({(t.label, t.metric) for t in trials}) == len(trials))
    found = promote(trials, base, 0.1)
    told = of(found, trials)
    figures = re.search(rf"loss ({NUMBER}) against the base's ({NUMBER})(?:, retention ({NUMBER}))?", found.reason)
    assert figures is not None
    assert told.metric is not None
    assert base.metric is not None
    assert float(figures[1]) == pytest.approx(told.metric, rel=1e-3)
    assert float(figures[2]) == pytest.approx(base.metric, rel=1e-3)
    assert (figures[3] is None) == (told.forgetting is None)
    if told.forgetting is not None:
        assert shown(figures[3], told.forgetting)
        assert figures[3][0] in "+-"
    # Trials with equal scores are ordered by number.
    ahead = [t for t in trials if (t.score or 0.0, t.number) < (told.score or 0.0, told.number)]
    worse = sum((t.metric or 0.0) > base.metric for t in ahead)
    for words, wanted in ((r"(\d+) worse than the base", worse), (r"(\d+) forgot more than 0.1", len(ahead) - worse)):
        counted = re.search(words, found.reason)
        if found.trial_id is not None:
            assert (int(counted[1]) if counted else 0) == wanted


@given(searches())
def test_what_is_advised_says_its_figures(search: tuple[list[TrialRecord], TrialRecord]) -> None:
    trials, base = search
    assume(len({(t.label, t.metric) for t in trials}) == len(trials))
    found = promote(trials, base, 0.1)
    if found.trial_id is not None:
        assert found.advice == ()
        return
    told, advice = of(found, trials), "\n".join(found.advice)
    assert base.metric is not None
    better = [t for t in trials if (t.metric or 0.0) <= base.metric]
    if better:
        accept = re.search(rf"search.max_forgetting: ({NUMBER}) instead of 0.1 would let (\w+) pass", advice)
        forgets = re.search(rf"forgets ({NUMBER}), and rates went up to ({NUMBER})", advice)
        assert accept is not None
        assert forgets is not None
        assert told.forgetting is not None
        assert told.forgetting == min(t.forgetting or 0.0 for t in better)
        assert accept[2] == told.trial_id
        assert promote(trials, base, float(accept[1])).trial_id is not None, "the bound that is advised lets one pass"
        assert shown(forgets[1], told.forgetting)
        assert float(forgets[2]) == pytest.approx(max(t.learning_rate for t in better), rel=0.06)
        return
    assert told.score == min(t.score or 0.0 for t in trials)
    served = re.search(rf"its loss of ({NUMBER}) is the best measured", advice)
    assert served is not None
    assert float(served[1]) == pytest.approx(base.metric, rel=1e-3)
    first, last = (rung.metric for rung in told.rungs)
    moved = re.search(rf"(was still improving|got worse), from ({NUMBER}) at step 30 to ({NUMBER}) at step 90", advice)
    assert (moved is None) == (first == last)
    if moved is not None and first is not None and last is not None:
        assert moved[1] == ("was still improving" if last < first else "got worse")
        assert ("raise train.epochs" in advice) == (last < first)
        assert float(moved[2]) == pytest.approx(first, rel=1e-3)
        assert float(moved[3]) == pytest.approx(last, rel=1e-3)
    edge = re.search(
        rf"(raise|lower) search.learning_rate for (\w+): the best rate, ({NUMBER}), .* of ({NUMBER}) to ({NUMBER})", advice
    )
    if edge is not None:
        rates = [t.learning_rate for t in trials if t.tune == told.tune]
        assert edge[2] == told.tune
        for text, value in zip(edge.groups()[2:], (told.learning_rate, min(rates), max(rates)), strict=True):
            assert float(text) == pytest.approx(value, rel=0.06)
        middle = math.sqrt(min(rates) * max(rates))
        assert edge[1] == ("raise" if told.learning_rate > middle else "lower")


@given(
    st.lists(st.floats(0.0, 2.0), max_size=4),
    st.one_of(st.none(), st.tuples(st.floats(0.1, 9.0), st.floats(0.1, 9.0))),
    st.integers(8, 5000),
)
def test_the_advice_on_the_domain_says_its_figures(
    distances: list[float], losses: tuple[float, float] | None, num_documents: int
) -> None:
    target, retention = losses or (None, None)
    sentence = advise(distances, target_loss=target, retention_loss=retention, num_documents=num_documents).sentence
    distance = re.search(rf"distance ({NUMBER}) of 2", sentence)
    fit = re.search(rf"loss ({NUMBER}) on the target and ({NUMBER}) on the retention set", sentence)
    count = re.search(r"(\d+) training examples", sentence)
    assert count is not None
    assert int(count[1]) == num_documents
    assert (distance is None) == (not distances)
    assert (fit is None) == (losses is None)
    if distance is not None:
        assert shown(distance[1], sum(distances) / len(distances))
    if fit is not None and losses is not None:
        assert shown(fit[1], losses[0])
        assert shown(fit[2], losses[1])
