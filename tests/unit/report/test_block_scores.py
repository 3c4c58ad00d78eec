"""The section on the blocks' scores: bars, what was chosen, and whether single-block trials bear the scores out."""

from __future__ import annotations

import pytest

from orchestrator.report.block_scores import single_block_losses
from orchestrator.report.page import write_report
from orchestrator.work.measurements import LayerScores

from .test_page import read

FOUND = LayerScores(
    relative_gradient_norms=(None, 0.012, 0.034, 0.051),
    signal_to_noise=(None, 0.4, 0.9, 0.7),
    num_batches=4,
    num_documents=40,
    num_tokens=1810,
    seconds=0.31,
    share_of_trial=0.021,
)


@pytest.fixture
def run_of(fake_run, make):
    """A run whose option `last:2` was `layers`, with single-block trials of these (block, loss)."""

    def write(found, *, points=(), layers="top:0.25", blocks=(2,)):
        plan = make.plan()
        options = tuple(
            option.model_copy(update={"layers": layers, "selection": option.selection.model_copy(update={"blocks": blocks})})
            if option.layers == "last:2"
            else option
            for option in plan.search.options
        )
        singles = tuple(
            options[0].model_copy(
                update={
                    "layers": f"blocks:{block}",
                    "selection": options[0].selection.model_copy(update={"blocks": (block,)}),
                }
            )
            for block in {block for block, _ in points}
        )
        plan = plan.model_copy(update={"search": plan.search.model_copy(update={"options": (*options, *singles)})})
        trials = []
        for number, (block, loss) in enumerate(points):
            trial = make.trial(number, "last:2", "lora", 8, 1e-3)
            last = trial.rungs[-1].model_copy(update={"eval_loss": loss})
            trials.append(trial.model_copy(update={"layers": f"blocks:{block}", "rungs": (*trial.rungs[:-1], last)}))
        sweep = make.sweep(trials=(make.control("none"), *trials), winner_id=None)
        folder = fake_run(plan=plan, sweep=sweep)
        if found is not None:
            (folder / "layer_scores.json").write_text(found.model_dump_json())
        return folder, plan, sweep

    return write


def test_a_run_with_scores_shows_them(run_of):
    folder, *_ = run_of(FOUND)
    written = write_report(folder).read_text()
    page = read(folder / "report.html")
    assert "Blocks by score" in page.text
    assert "score of each block" in written
    assert "4 micro-batches of 40 training documents" in page.text
    assert "top:0.25 is block 2" in page.text
    assert page.text.count("0.051") == 1, "the table beside the picture"


def test_a_run_without_scores_has_no_such_section(run_of):
    folder, *_ = run_of(None)
    assert "Blocks by score" not in read(write_report(folder)).text


def test_a_failed_probe_says_why(run_of):
    folder, *_ = run_of(LayerScores(failed="3 gangs died while running it"))
    assert "could not be scored, and the search continued without scores: 3 gangs died" in read(write_report(folder)).text


def test_one_micro_batch_draws_one_figure(run_of):
    folder, *_ = run_of(FOUND.model_copy(update={"signal_to_noise": (None,) * 4, "num_batches": 1}))
    written = write_report(folder).read_text()
    assert ">signal-to-noise ratio<" not in written, "a column in which nothing stands is left out"


def test_three_single_block_trials_are_too_few(run_of):
    folder, *_ = run_of(FOUND, points=((1, 2.0), (2, 1.9), (3, 1.8)))
    assert "Not enough single-block trials (3 of 4) to validate the scores." in read(write_report(folder)).text


def test_the_agreement_has_its_interval(run_of):
    folder, plan, sweep = run_of(FOUND, points=((1, 2.0), (2, 1.9), (3, 1.8), (1, 2.1), (3, 1.7), (2, 1.95)))
    assert sorted(single_block_losses(plan, sweep))[:2] == [(1, 2.0), (1, 2.1)]
    text = read(write_report(folder)).text
    assert "relative gradient norm against the eval loss of 6 single-block trials" in text
    assert "rank correlation is -0.956, 95% interval -0.9" in text


def test_trials_of_several_blocks_and_without_a_loss_do_not_count(run_of):
    _, plan, sweep = run_of(FOUND, points=((1, float("nan")), (2, 1.9)), layers="last:2", blocks=(2, 3))
    assert single_block_losses(plan, sweep) == [(2, 1.9)]
    assert single_block_losses(None, sweep) == []
