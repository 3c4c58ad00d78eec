"""Block scores section, with their correlation to single-block trials."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from orchestrator.plan.values import RunPlan, SweepPlan
from orchestrator.report import figures, html
from orchestrator.report.html import Html
from orchestrator.report.wording import MISSING, number, plural
from orchestrator.run.reader import RunRecords
from orchestrator.transfer import Correlation, rank_correlation
from orchestrator.transfer.correlation import MIN_PAIRS
from orchestrator.transfer.records import SweepResult
from orchestrator.units import format_count, format_seconds
from orchestrator.work.measurements import LayerScores

NORM, RATIO = "relative gradient norm", "signal-to-noise ratio"


def block_scores(run: RunRecords, sweep: SweepResult, found: LayerScores) -> Html:
    """Return a chart of both scores by block, the blocks chosen by score, and the correlation with single-block trials."""
    if not found.scores:
        return html.paragraph(f"The blocks could not be scored, and the search continued without scores: {found.failed}")
    caption = (
        f"Scores of each block's matrices from the gradients of the base model, over {_batches(found)} "
        f"of {plural(found.num_documents, 'training document')} ({format_count(found.num_tokens)} tokens, "
        f"{format_seconds(found.seconds)}; planned: {found.share_of_trial:.1%} of a trial's operations). Blocks are chosen by "
        f"the {NORM}: gradient over weights. The {RATIO} is the mean gradient over its spread between micro-batches."
    )
    panels = [(NORM, found.relative_gradient_norms), (RATIO, found.signal_to_noise)]
    panels = [(title, values) for title, values in panels if any(value is not None for value in values)]
    rows = [
        [block, _figure(norm), _figure(ratio)]
        for block, (norm, ratio) in enumerate(zip(found.relative_gradient_norms, found.signal_to_noise, strict=True))
    ]
    picture = html.picture(_bars(panels), caption, html.table(["block", NORM, RATIO], rows, numeric=range(3)))
    chosen = html.bullets(_chosen(run.plan)) if run.plan else Html("")
    return html.join([picture, chosen, *(html.paragraph(said) for said in _agreement(run.plan, sweep, found))])


def _batches(found: LayerScores) -> str:
    return "1 micro-batch" if found.num_batches == 1 else f"{found.num_batches} micro-batches"


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def _bars(panels: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    def paint(figure: Figure) -> None:
        for axis, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("block, 0 at the input")
            axis.grid(False, axis="x")
            axis.bar(range(len(values)), [value or 0.0 for value in values], color=figures.BLUE)
            axis.set_xticks(range(0, len(values), max(1, math.ceil(len(values) / 16))))

    return figures.draw("blocks", (9.2, 2.6), paint, "score of each block")


def _chosen(plan: RunPlan) -> Iterator[str]:
    options = plan.options
    chosen = {option.layers: option.selection.blocks for option in options if option.layers.startswith("top:")}
    for layers, blocks in chosen.items():
        yield f"{layers} is block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _agreement(plan: RunPlan | None, sweep: SweepResult, found: LayerScores) -> Iterator[str]:
    """Return the correlation as information only: no decision depends on it."""
    points = single_block_losses(plan, sweep)
    if len(points) < MIN_PAIRS:
        yield f"Not enough single-block trials ({len(points)} of {MIN_PAIRS}) to validate the scores."
        return
    for title, values in ((NORM, found.relative_gradient_norms), (RATIO, found.signal_to_noise)):
        known = [(score, loss) for block, loss in points if (score := values[block]) is not None]
        agreement = rank_correlation([score for score, _ in known], [loss for _, loss in known])
        yield _sentence(title, agreement, len(known))
    yield "Trials also differ in learning rate, and those that were stopped early count with the loss at their last rung."


def _sentence(title: str, agreement: Correlation | None, num_trials: int) -> str:
    if agreement is None:
        return (
            f"The {title} against the loss of {num_trials} single-block trials: too few, or all equal, to compute a correlation."
        )
    return (
        f"The {title} against the eval loss of {num_trials} single-block trials: Spearman's rank correlation is "
        f"{number(agreement.value)}, 95% interval {number(agreement.low)} to {number(agreement.high)}. Below zero means that "
        "blocks with a higher score reach a lower loss."
    )


def single_block_losses(plan: RunPlan | None, sweep: SweepResult) -> list[tuple[int, float]]:
    """Return (block, eval loss at the last rung) of every searched trial that trains exactly one block and has a finite loss."""
    if not isinstance(plan, SweepPlan):
        return []
    blocks = {(option.layers, option.method): option.selection.blocks for option in plan.search.options}
    found: list[tuple[int, float]] = []
    for trial in sweep.searched:
        trained = blocks.get((trial.layers, trial.method), ())
        loss = trial.judged.eval_loss if trial.judged is not None else None
        if len(trained) == 1 and loss is not None and math.isfinite(loss):
            found.append((trained[0], loss))
    return found
