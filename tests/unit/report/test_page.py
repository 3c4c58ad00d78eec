"""The HTML report: self-contained, safe, and there for every state that a run can be in."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from orchestrator.data.summary import DataSummary, Dropped, Notice, SplitSummary
from orchestrator.errors import UsageError
from orchestrator.report.page import write_report
from orchestrator.transfer import over_seeds
from orchestrator.transfer.records import BundledFigures, ComparisonRecord, ModelScores

SECTIONS = (
    "Gain on the test set",
    "Layers and learning rate",
    "Target against retention",
    "Prompts, before and after",
    "Bundle",
    "What to try next",
    "Loss curves",
    "Trials",
    "Plan against measured",
    "Data",
    "Events",
    "Origin",
)
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Reads a page: its text, its tags with attributes, and whether every tag is closed in turn."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(written)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read(path) -> Page:
    return Page(path.read_text())


def test_a_finished_run_shows_every_section(fake_run):
    page = read(write_report(fake_run()))
    for title in SECTIONS:
        assert title in page.text
    assert "torch, 1 rank" in page.text
    assert "On a CPU measured is the resident memory of the process" in page.text
    assert "by rank" in page.text
    assert "Positive: 2.09 ± 0.05 nats better than the base" in page.text
    assert page.count("svg") == 5
    assert page.count("figure") == page.count("details") - 1 == 5, "each picture has its table, and the spec is folded too"


def test_the_page_needs_nothing_but_itself(fake_run):
    path = write_report(fake_run())
    page = read(path)
    assert path.name == "report.html"
    assert page.count("script") == page.count("link") == page.count("img") == page.count("iframe") == 0
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), f"<{tag} {name}={attributes[name]}>"
    assert "url(http" not in path.read_text()
    assert "@import" not in path.read_text()


def test_ids_are_unique_and_links_lead_somewhere(fake_run):
    written = write_report(fake_run()).read_text()
    page = Page(written)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    wanted = {attributes["href"] for tag, attributes in page.tags if tag == "a"} | set(re.findall(r"url\((#[^)]+)\)", written))
    wanted |= {attributes["xlink:href"] for tag, attributes in page.tags if tag == "use"}
    assert {link[1:] for link in wanted} <= set(ids)


def test_what_models_and_files_say_is_never_markup(fake_run, make):
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>"
    trial = make.trial(0, "all", "lora", 8, 1e-3, state="failed").model_copy(update={"reason": evil})
    prompt = (
        make.transfer()
        .prompts[0]
        .model_copy(update={"prompt": evil, "tuned_answer": evil, "base_answer": evil, "expected": evil})
    )
    sweep = make.sweep(trials=(make.control("none"), trial), winner_id=None, promotion_reason=evil, advice=(evil,), name=evil)
    folder = fake_run(
        sweep=sweep,
        transfer=make.transfer(prompts=(prompt,), sentence=evil, bundle=evil, versions={evil: evil}),
        events=[{"time": 1.0, "kind": evil, "message": evil, evil: evil}],
        summary={evil: evil, "nested": [{evil: evil}]},
        spec_text=f"name: {evil}\n",
    )
    page = read(write_report(folder))
    assert page.count("script") == page.count("img") == 0
    assert evil in page.text


@pytest.mark.parametrize("missing", ["plan", "sweep", "transfer", "summary"])
def test_a_run_without_one_of_its_parts_is_reported(fake_run, missing):
    page = read(write_report(fake_run(**{missing: None})))
    assert "Trials" in page.text


def test_a_run_without_a_bound_on_forgetting_is_drawn(fake_run, make):
    """As the one-trial job leaves it."""
    page = read(write_report(fake_run(sweep=make.sweep(max_forgetting=math.inf))))
    assert "Target against retention" in page.text
    assert page.count("svg") == 5


def test_what_was_promoted_and_why_stands_beside_the_front(fake_run, make):
    page = read(write_report(fake_run(sweep=make.sweep(promotion_reason="last:4: loss 1.8 against the base's 3.9"))))
    assert "Target against retention Promoted: last:4: loss 1.8 against the base's 3.9." in page.text


def test_nothing_promoted_says_why_and_what_to_try_in_order(fake_run, make):
    sweep = make.sweep(winner_id=None, promotion_reason="every trial forgets", advice=("first this", "then that"))
    page = read(write_report(fake_run(sweep=sweep, transfer=make.transfer(verdict=None, sentence="", bundle=None))))
    assert "What to try next Nothing was promoted: every trial forgets. first this then that" in page.text


def test_a_negative_verdict_says_first_that_the_bundle_is_not_to_be_served(fake_run, make):
    worse = (ComparisonRecord(against="none", mean=-0.2, low=-0.3, high=-0.1, method="sign_flip", num_examples=180),)
    transfer = make.transfer(verdict="negative", sentence="worse than the base", comparisons=worse)
    page = read(write_report(fake_run(sweep=make.sweep(advice=("then this",)), transfer=transfer)))
    section = page.text[page.text.index("What to try next Promoted") :]
    assert section.index("do not serve this bundle, serve the base model") < section.index("then this")
    assert "No recommendations" not in page.text
    gained = read(write_report(fake_run(sweep=make.sweep(advice=()))))
    assert "No recommendations." in gained.text


def headline_of(page) -> str:
    (css,) = [attributes["class"] for name, attributes in page.tags if "headline" in (attributes.get("class") or "")]
    return css


def test_the_head_is_no_prouder_than_the_answers(fake_run, make):
    assert headline_of(read(write_report(fake_run()))) == "headline good"
    wrong = [
        score.model_copy(update={"num_documents": 180, "num_answered": 180, "metrics": {"loss": 1.8, "exact_match": 0.0}})
        for score in make.transfer().scores[:2]
    ]
    page = read(write_report(fake_run(transfer=make.transfer(scores=tuple(wrong)))))
    assert headline_of(page) == "headline"
    assert "Positive in loss only: 2.09 ± 0.05 nats better than the base" in page.text
    assert "What to try next Promoted" in page.text
    assert "compare the answers with the expected ones" in page.text


def test_few_steps_stand_at_the_head(fake_run, make):
    assert "optimizer steps" not in read(write_report(fake_run())).text
    sweep = make.sweep()
    few = sweep.model_copy(update={"trials": tuple(trial.model_copy(update={"total_steps": 2}) for trial in sweep.trials)})
    assert "The whole training is 2 optimizer steps: with fewer than 30" in read(write_report(fake_run(sweep=few))).text


def scored(trial, metric, forgetting):
    """The trial with one rung of these figures."""
    rung = trial.rungs[-1].model_copy(update={"metric": metric, "score": metric, "forgetting": forgetting})
    return trial.model_copy(update={"rungs": (rung,)})


def test_the_front_is_of_what_could_be_promoted(fake_run, make):
    """`head` is on it and beats a trial; the base, which is better still, and a trial that failed are not."""
    none, head = scored(make.control("none"), 1.0, 0.0), scored(make.control("head"), 2.0, 0.0)
    beaten, kept, broken = (make.trial(number, "all", "full", None, 10.0 ** -(number + 3)) for number in range(3))
    trials = (none, head, scored(beaten, 2.5, 0.02), scored(kept, 1.8, 0.05), scored(broken, 1.5, 0.01))
    trials = (*trials[:-1], trials[-1].model_copy(update={"state": "failed"}))
    sweep = make.sweep(trials=trials, winner_id="head", front=(beaten.trial_id, kept.trial_id))
    page = read(write_report(fake_run(sweep=sweep)))
    table = page.text.partition("on the front within the bound")[2].partition("Prompts, before and after")[0]
    assert f"{head.label} 54 2.000 +0.000 yes yes" in table
    assert f"{kept.label} 54 1.800 +0.050 yes yes" in table
    assert f"{beaten.label} 54 2.500 +0.020 yes" in table, "within the bound, and not on the front"
    assert f"{none.label} 0 1.000 +0.000 yes" in table, "within the bound, and no trial"
    assert broken.label not in table
    assert "the base model, which is no trial, is drawn beside them" in page.text


def test_a_folder_with_a_spec_only_is_reported(fake_run):
    page = read(write_report(fake_run(plan=None, sweep=None, transfer=None, summary=None, events=[])))
    assert "has not measured anything yet" in page.text
    assert page.count("svg") == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "holiday.txt").write_text("sun")
    with pytest.raises(UsageError, match="not a run directory"):
        write_report(tmp_path)


def test_all_trials_failed(fake_run, make):
    trials = tuple(make.trial(number, "all", "full", None, 10.0 ** -(number + 2), state="failed") for number in range(3))
    sweep = make.sweep(trials=(make.control("none"), *trials), winner_id=None, promotion_reason="every trial failed")
    page = read(write_report(fake_run(sweep=sweep, transfer=None)))
    assert "Nothing was promoted: every trial failed" in page.text
    assert page.text.count("the loss became NaN") == 3


def test_not_a_number_is_shown_as_such_and_not_drawn(fake_run, make):
    sick = make.trial(1, "all", "full", None, 2e-4)
    rungs = tuple(
        rung.model_copy(update={"metric": math.nan, "eval_loss": math.inf, "forgetting": math.nan, "score": math.nan})
        for rung in sick.rungs
    )
    sweep = make.sweep(
        trials=(make.control("none"), make.trial(0, "last:2", "lora", 8, 1e-3), sick.model_copy(update={"rungs": rungs}))
    )
    transfer = make.transfer(comparisons=(make.transfer().comparisons[0].model_copy(update={"mean": math.nan, "low": math.nan}),))
    path = write_report(fake_run(sweep=sweep, transfer=transfer))
    assert "NaN" in read(path).text
    assert not re.search(r'\bd="[^"]*nan', path.read_text())


def test_one_trial_of_a_finetune(fake_run, make):
    trial = make.trial(0, "last:4", "lora", 16, 2e-4)
    sweep = make.sweep(job="finetune", trials=(make.control("none"), trial), winner_id=trial.trial_id)
    page = read(write_report(fake_run(plan=make.plan(search=False), sweep=sweep)))
    assert "finetune · completion" in page.text
    assert "last:4" in page.text


def test_shares_are_per_cent_and_more_is_better(fake_run, make):
    def scored(trial, value):
        rung = trial.rungs[-1].model_copy(update={"metric": value, "score": -value})
        return trial.model_copy(update={"rungs": (rung,)})

    worse, better = (scored(make.trial(n, "all", "full", None, 1e-4 * (n + 1)), value) for n, value in ((0, 0.41), (1, 0.73)))
    trials = (scored(make.control("none"), 0.013), worse, better)
    sweep = make.sweep(trials=trials, task="classify", metric="accuracy", higher_is_better=True, winner_id=better.trial_id)
    page = read(write_report(fake_run(sweep=sweep, plan=make.plan(task="classify"))))
    assert page.text.index("73.0%") < page.text.index("41.0%")
    assert "1.3%" in page.text


def test_the_promoted_trial_and_the_order_of_the_table(fake_run, make):
    written = write_report(fake_run()).read_text()
    table = written[written.index('id="trials"') :]
    states = re.findall(r'class="state (\w+)"', table)
    assert states[-1] == "failed", "failed trials come last"
    marked = re.search(r'<tr class="marked"><td class="number">(\d+)</td>', table)
    winner = make.sweep().winner
    assert marked is not None
    assert int(marked[1]) == winner.number


def test_the_cards_show_what_was_bundled(fake_run, make):
    sweep = make.sweep()
    bundled = BundledFigures(step=54, metric=1.234, retain_loss=4.171, forgetting=0.09)
    refit = make.transfer().refit.model_copy(update={"ran": True, "to_step": 54, "reason": "it had 6 of 54 steps"})
    page = read(write_report(fake_run(sweep=sweep, transfer=make.transfer(sweep.winner_id, bundled=bundled, refit=refit))))
    assert "loss, eval set 1.234 of its bundle" in page.text
    assert "forgetting +0.090 bound 0.1" in page.text
    assert "to step 54 in" in page.text


def test_a_page_of_few_examples(fake_run, make):
    """The best rung instead of the last one, and what became of every seed."""
    sweep = make.sweep()
    winner = sweep.winner
    worse = winner.last.model_copy(update={"rung": 7, "step": 54, "metric": 9.0, "score": 9.0})
    best = winner.last.model_copy(update={"rung": 6, "step": 48, "metric": 1.0, "score": 1.0})
    judged = winner.model_copy(update={"rungs": (best, worse), "judged_rung": 6})
    again = judged.model_copy(
        update={"trial_id": f"repeat-2-{winner.trial_id}", "control": "repeat", "seed": 1, "rungs": (best, worse)}
    )
    trials = tuple(judged if trial is winner else trial for trial in sweep.trials)
    gains = over_seeds([0, 1], [2.09, 1.89], "nats per token")
    scores = (*make.transfer().scores, ModelScores(model="repeat-2", metrics={"loss": 2.03}))
    transfer = make.transfer(winner.trial_id, gain_over_seeds=gains, scores=scores)
    page = read(write_report(fake_run(sweep=sweep.model_copy(update={"trials": (*trials, again)}), transfer=transfer)))
    assert "loss, eval set 1.000 ± 0.000 over 2 seeds; 1.000 of that trial" in page.text
    assert "48 of 54" in page.text
    assert "compared by step 48, its best; it was trained to step 54" in page.text
    assert "Their mean gain over the base is +1.990 nats per token (95%: +0.719 to +3.261" in page.text
    assert "seed no. 2" in page.text


def test_many_trials_and_long_text_stay_in_their_boxes(fake_run, make):
    pair = make.transfer().prompts[0].model_copy(update={"prompt": "x" * 5000})
    path = write_report(fake_run(sweep=make.sweep(120), transfer=make.transfer(prompts=(pair,))))
    page = read(path)
    assert "(4400 more characters)" in page.text
    assert all("scroll" in written for written in re.findall(r"<div[^>]*>(?=<table)", path.read_text()))
    assert path.stat().st_size < 1_500_000


def test_the_same_run_gives_the_same_page(fake_run):
    folder = fake_run()
    assert write_report(folder).read_text() == write_report(folder).read_text()


def test_what_was_found_out_about_the_data_stands_on_the_first_screen(fake_run):
    """Warnings in sight, the rest folded; a summary of an earlier version has none."""
    part = SplitSummary(documents=9, tokens=90, supervised_tokens=50, longest_document_tokens=12, sha256="0")
    warning = Notice(level="warning", message="151 of 160 rows are left out <b>", remedy="raise it")
    summary = DataSummary(
        inputs_sha256="0",
        splits={"train": part},
        dropped=(Dropped(split="train", reason="longer than data.max_tokens = 24", count=151, places=("a.jsonl:2",)),),
        notices=(Notice(level="info", message="20 rows repeat another"), warning),
        files=("a.jsonl",),
        one_example="",
    ).model_dump(mode="json")
    for given in (summary, {key: value for key, value in summary.items() if key != "notices"}):
        page = write_report(fake_run(summary=given)).read_text()
        first = page[: page.index("<nav>")]
        assert ("151 of 160 rows are left out &lt;b&gt;; to do: raise it" in first) == ("notices" in given)
        assert "train: 151 left out, longer than data.max_tokens = 24 (a.jsonl:2)" in first
        Page(page)
    assert "The data:" not in write_report(fake_run()).read_text()
