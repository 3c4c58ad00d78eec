"""The plan's screen and the last screen."""

from __future__ import annotations

from rich.console import Console

from orchestrator.report import final_screen, plan_view
from orchestrator.transfer.records import BundledFigures, ComparisonRecord, ModelScores


def entry(screen: str, name: str) -> str:
    return next(line for line in screen.splitlines() if line.startswith(f"{name} "))


def test_the_last_screen_says_what_was_found(make):
    sweep = make.sweep()
    screen = final_screen(sweep, make.transfer())
    assert max(map(len, screen.splitlines())) <= 100
    assert sweep.winner.label in entry(screen, "best")
    assert f"loss {sweep.winner.metric:.3f}   base 3.920   head 3.100" in screen
    assert f"retention {sweep.winner.retain_loss:.3f} (base 4.081, +" in screen
    assert entry(screen, "verdict").endswith("on 180 test")
    assert entry(screen, "base").endswith("The house was by the river, and the")
    assert entry(screen, "tuned").split() == ["tuned", "7"]
    assert "runs/quickstart/bundle    verified: KL 3.1e-05 per token" in entry(screen, "bundle")
    assert "16 trials in 1m14s on 2 worker groups" in entry(screen, "report")
    assert screen.splitlines()[-1] == "next      transformers serve runs/quickstart/bundle"


def test_the_last_screen_shows_what_was_bundled_rather_than_the_rung(make):
    sweep = make.sweep()
    bundled = BundledFigures(step=54, metric=1.234, retain_loss=4.171, forgetting=0.09)
    screen = final_screen(sweep, make.transfer(sweep.winner_id, bundled=bundled))
    assert "loss 1.234   base 3.920   head 3.100   retention 4.171 (base 4.081, +0.090, bound 0.1)" in screen
    other = final_screen(sweep, make.transfer("t999", bundled=bundled))
    assert f"loss {sweep.winner.metric:.3f}" in other, "another trial's bundle says nothing of this one"


def test_exact_match_says_over_how_many_documents_it_was_taken(make):
    scores = [score.model_copy(update={"num_documents": 500, "num_answered": 0}) for score in make.transfer().scores]
    scores[:2] = [score.model_copy(update={"num_answered": 200}) for score in scores[:2]]
    screen = final_screen(make.sweep(), make.transfer(scores=tuple(scores)))
    verdict = " ".join(screen[screen.index("\nverdict ") : screen.index("\nprompt ")].split())
    assert verdict.endswith("on 180 test examples; exact match 41.2% on 200 of 500 test documents, base 0.0%")
    assert "exact match" not in final_screen(make.sweep(), make.transfer(scores=tuple(scores[2:])))


def test_a_model_that_answers_nothing_is_not_praised(make):
    scores = [
        score.model_copy(update={"num_documents": 180, "num_answered": 40, "metrics": {"loss": 1.8, "exact_match": 0.0}})
        for score in make.transfer().scores[:2]
    ]
    screen = final_screen(make.sweep(), make.transfer(scores=tuple(scores)))
    assert entry(screen, "verdict").startswith("verdict   positive in loss only: 2.09")
    assert "but not one answer is correct: exact match 0.0% on 40 of 180" in " ".join(screen.split())
    assert next_lines(screen).startswith("next compare the answers with the expected ones in the report")


def test_few_steps_are_told_at_the_end_too(make):
    sweep = make.sweep()
    assert "warning" not in final_screen(sweep, make.transfer())
    few = sweep.model_copy(update={"trials": tuple(trial.model_copy(update={"total_steps": 2}) for trial in sweep.trials)})
    assert entry(final_screen(few, make.transfer()), "warning").startswith("warning   the whole training is 2 optimizer steps")


def test_a_test_set_read_again_is_told(make):
    assert "has been read" not in final_screen(make.sweep(), make.transfer(test_set_reads=1))
    assert "has been read 3 times for this run" in entry(final_screen(make.sweep(), make.transfer(test_set_reads=3)), "note")


def test_nothing_promoted_says_what_to_try(make):
    sweep = make.sweep(winner_id=None, promotion_reason="no trial is within the bound of 0.1")
    screen = final_screen(sweep, make.transfer(verdict=None, sentence="", bundle=None, prompts=()))
    assert "it was not promoted" in screen
    assert "Nothing was promoted: no trial is within the bound of 0.1" in screen
    assert "bundle" not in screen
    assert "try rates above 2e-3" in entry(screen, "next")


def compared(low, high):
    return (ComparisonRecord(against="none", mean=(low + high) / 2, low=low, high=high, method="sign_flip", num_examples=180),)


def next_lines(screen: str) -> str:
    """What stands at `next`, in one line."""
    return " ".join(screen[screen.index("\nnext ") :].split())


def test_a_bundle_that_is_worse_than_the_base_is_not_to_be_served(make):
    sweep, transfer = make.sweep(advice=()), make.transfer(verdict="negative", sentence="worse", comparisons=compared(-0.3, -0.1))
    screen = final_screen(sweep, transfer)
    assert next_lines(screen).startswith("next do not serve this bundle, serve the base model")
    assert "give more or cleaner eval rows" in next_lines(screen)
    assert "transformers serve" not in screen
    assert max(map(len, screen.splitlines())) <= 100
    by_hand = sweep.model_copy(update={"promoted_by_hand": True})
    assert "eval rows" not in final_screen(by_hand, transfer)


def test_a_bundle_that_may_be_no_better_says_what_would_tell_before_how_it_is_served(make):
    sweep, transfer = make.sweep(advice=()), make.transfer(verdict="inconclusive", comparisons=compared(-0.1, 0.3))
    assert next_lines(final_screen(sweep, transfer)).startswith("next use more test rows")
    assert next_lines(final_screen(sweep, transfer)).endswith("transformers serve runs/quickstart/bundle")
    ended = sweep.model_copy(update={"ended_by_hours": "the bound", "advice": ("raise the bound",)})
    assert "may be as good raise the bound transformers serve" in next_lines(final_screen(ended, transfer))


def test_every_trial_failed(make):
    trials = (make.control("none"), make.trial(0, "all", "full", None, 1e-2, state="failed"))
    sweep = make.sweep(trials=trials, winner_id=None, promotion_reason="every trial failed", advice=())
    screen = final_screen(sweep, make.transfer(verdict=None, sentence="", bundle=None, prompts=(), report=None))
    assert "no trial has a figure" in screen
    assert "1 failed" in screen


def test_a_failed_verification_is_loud(make):
    check = make.transfer().verification.model_copy(update={"passed": False, "kl_bundle": 0.4})
    assert "VERIFICATION FAILED" in final_screen(make.sweep(), make.transfer(verification=check))


def test_answers_take_one_line_and_hide_no_control_codes(make):
    pair = make.transfer().prompts[0].model_copy(update={"base_answer": "a\n\n\x1b[31mred\x1b[0m " + "long " * 100})
    screen = final_screen(make.sweep(), make.transfer(prompts=(pair,)))
    assert "\x1b" not in screen
    assert "base      a \\x1b[31mred" in screen
    assert max(map(len, screen.splitlines())) <= 100


def shown(plan) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(plan_view(plan))
    return console.export_text()


def test_the_plan_names_everything_within_100_columns(make):
    plan = make.plan()
    screen = shown(plan)
    assert max(map(len, screen.splitlines())) <= 100
    for term in plan.search.options[0].memory.terms:
        assert term.name in screen
    for wanted in ("last:4", "lora r16", "2 of 1 rank each", "ZeRO 2", "4 gangs", "there are 2 cores", "220.0 MiB", "6, 18, 54"):
        assert wanted in screen
    assert "4.8M" in screen, "trainable parameters of the largest choice"


def test_the_plan_of_one_trial(make):
    screen = shown(make.plan(search=False))
    assert "last:4" in screen
    assert "compared at" not in screen


def with_repeats(sweep, *metrics):
    """The sweep, its winner trained again from other seeds."""
    winner = sweep.winner
    repeats = []
    for number, metric in enumerate(metrics, 2):
        rung = winner.last.model_copy(update={"metric": metric})
        update = {"trial_id": f"repeat-{number}-{winner.trial_id}", "control": "repeat", "seed": number, "rungs": (rung,)}
        repeats.append(winner.model_copy(update=update))
    return sweep.model_copy(update={"trials": (*sweep.trials, *repeats)})


def test_a_winner_of_several_seeds_shows_their_mean_and_its_interval(make):
    sweep = make.sweep()
    bundled = BundledFigures(step=54, metric=1.0)
    beside = tuple(ModelScores(model=name) for name in ("promoted", "repeat-2", "repeat-3"))
    transfer = make.transfer(sweep.winner_id, bundled=bundled, scores=beside)
    assert "loss 2.000 ± 2.484 over 3 seeds (1.000 in the bundle)   base 3.920" in final_screen(
        with_repeats(sweep, 2.0, 3.0), transfer
    )
    left_out = transfer.model_copy(update={"scores": beside[:2]})
    assert "over 2 seeds" in final_screen(with_repeats(sweep, 2.0, 3.0), left_out), "what stands beside the bundle counts"
    assert "loss 1.000   base 3.920" in final_screen(sweep, transfer)
    assert "loss 1.000   base 3.920" in final_screen(with_repeats(sweep, float("nan")), transfer), "one seed has no interval"
    by_hand = with_repeats(sweep, 2.0, 3.0).model_copy(update={"winner_id": sweep.searched[0].trial_id})
    assert "seeds" not in entry(final_screen(by_hand, make.transfer()), "best"), "the repeats are another trial's"
