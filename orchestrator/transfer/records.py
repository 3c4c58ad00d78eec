"""What a sweep found and what it is worth, as records that outlast the process: sweep.json and transfer.json.

Losses are nats per supervised token (retention: nats per token), times are seconds, sizes are bytes. A
figure that was not measured is None; one that broke is NaN.
"""

from __future__ import annotations

from typing import Literal

from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.transfer.learning_curve import LearningCurve
from orchestrator.transfer.measured import EngineFigures, MemoryRow, PlanAgainstMeasured, VerificationFigures
from orchestrator.transfer.seeds import OverSeeds
from orchestrator.values import Value

Control = Literal["none", "head", "shuffled", "scratch", "k_shot", "repeat", "curve"]
CONTROL_NAMES: dict[str, str] = {
    "none": "base model",
    "head": "head only",
    "shuffled": "shuffled answers",
    "scratch": "random weights",
    "k_shot": "examples in the prompt",
    "curve": "a share of the data",
    "repeat": "another seed",
}
"""What people read of each, wherever it is shown."""
VerdictKind = Literal["positive", "no gain", "negative", "inconclusive"]


class RungRecord(Value):
    """One comparison point of a trial."""

    rung: int = 0
    step: int
    tokens: int
    train_loss: float | None = None
    eval_loss: float | None = None
    metric: float | None = None
    """The search's metric on the eval set."""
    retain_loss: float | None = None
    retain_accuracy: float | None = None
    """Share of the retention set's answers that greedy decoding gives exactly; None where it has none."""
    forgetting: float | None = None
    """Rise of the retention loss over the base's."""
    score: float | None = None
    """What the search minimises: the metric (turned round when higher is better) plus the penalty beyond the bound."""
    seconds: float = 0.0
    """Training and evaluation since the rung before."""


class TrialRecord(Value):
    """One trial or control, from its first rung to its end."""

    trial_id: str
    number: int
    control: Control | None = None
    share: float = 1.0
    """Of the training documents, what it learned from."""
    layers: str
    tune: Literal["lora", "full"]
    lora_rank: int | None = None
    adapter: AdapterOptions = PLAIN_LORA
    learning_rate: float
    remedies: str = ""
    """What was done against forgetting: `replay 0.1 · l2sp 30`."""
    seed: int = 0
    state: Literal["running", "finished", "stopped", "failed"]
    """`stopped`: the scheduler saw no promise in it, or the hours were used up; `failed`: for a reason of its own."""
    reason: str = ""
    rungs: tuple[RungRecord, ...] = ()
    judged_rung: int | None = None
    """The one that it is compared by, where that is not the last: with early stopping the best on the eval set."""
    total_steps: int = 0
    trainable_parameters: int = 0
    gang: int = -1
    engine: EngineFigures | None = None
    out_of_memory: bool = False
    """Memory ran out in it: it went on smaller, or failed for that."""

    @property
    def last(self) -> RungRecord | None:
        return self.rungs[-1] if self.rungs else None

    @property
    def judged(self) -> RungRecord | None:
        """The rung that it is compared by."""
        return next((rung for rung in self.rungs if rung.rung == self.judged_rung), self.last)

    @property
    def metric(self) -> float | None:
        return self.judged.metric if self.judged else None

    @property
    def score(self) -> float | None:
        return self.judged.score if self.judged else None

    @property
    def forgetting(self) -> float | None:
        return self.judged.forgetting if self.judged else None

    @property
    def retain_loss(self) -> float | None:
        return self.judged.retain_loss if self.judged else None

    @property
    def seconds(self) -> float:
        return sum(rung.seconds for rung in self.rungs)

    @property
    def method(self) -> str:
        """`lora r16 · replay 0.1`: how its layers learned."""
        tune = self.adapter.method(self.lora_rank) if self.tune == "lora" else "full"
        return f"{tune} · {self.remedies}" if self.remedies else tune

    @property
    def label(self) -> str:
        """`last:4 · lora r16 · lr 3.1e-03`; a control is called by its name."""
        if self.control == "none":
            return "base model"
        point = f"{self.layers} · {self.method} · lr {self.learning_rate:.1e}"
        if self.control == "curve":
            return f"{self.share:.3g} of the data · {point}"
        if self.control == "repeat":
            return f"{point} · seed {self.seed}"
        return f"{self.control} control · {point}" if self.control else point


class SweepResult(Value):
    """What the search found; also written by the one-trial job, with one trial in it."""

    name: str
    job: Literal["sweep", "finetune"] = "sweep"
    task: str = "completion"
    metric: str
    higher_is_better: bool
    max_forgetting: float
    """Infinite where there is no bound."""
    trials: tuple[TrialRecord, ...]
    """Every trial and control by number; controls have `control` set. Those of the learning curve are left out."""
    winner_id: str | None
    """The promoted trial; None when nothing was worth promoting."""
    promotion_reason: str
    promoted_by_hand: bool = False
    advice: tuple[str, ...] = ()
    """What to try next, in order."""
    front: tuple[str, ...] = ()
    """Trial ids on the Pareto front of target against retention; empty lets a reader compute it."""
    num_gangs: int = 1
    ranks_per_gang: int = 1
    base_loads: int = 0
    """How often the base was loaded; law 11 wants it equal to the number of gangs, plus one for each that was replaced."""
    gangs_replaced: int = 0
    gang_idle_seconds: float = 0.0
    """Summed over the gangs, from the first trial's start to the last one's end."""
    first_trial_seconds: float | None = None
    """From submission to the first trial's first step."""
    wall_seconds: float = 0.0
    started_at: float = 0.0
    """Unix time."""
    finished_at: float | None = None
    """None while it runs."""
    num_submissions: int = 1
    gpu_hours_used: float = 0.0
    """Over all submissions, the refit and the bundle included where `finished_at` stands; without GPUs, hours of ranks."""
    max_gpu_hours: float | None = None
    """The bound of the last submission."""
    ended_by_hours: str = ""
    """How far the search came where `max_gpu_hours` ended it; it goes on where that is raised."""
    learning_curve: LearningCurve | None = None
    """Of the trial that was promoted by the rule, where it was asked for and measured; see `curve_of_winner`."""
    no_learning_curve: str = ""
    """Why there is none of the promoted trial, where it was asked for."""
    learning_curve_seconds: float = 0.0
    """Of training and scoring its trials, which are not among `trials`."""

    @property
    def searched(self) -> tuple[TrialRecord, ...]:
        """The trials without the controls."""
        return tuple(trial for trial in self.trials if trial.control is None)

    @property
    def winner(self) -> TrialRecord | None:
        return next((trial for trial in self.trials if trial.trial_id == self.winner_id), None)

    @property
    def curve_of_winner(self) -> LearningCurve | None:
        """The learning curve, where it is that of the promoted trial."""
        curve = self.learning_curve
        return curve if curve is not None and curve.trial_id == self.winner_id else None

    def control(self, name: Control) -> TrialRecord | None:
        return next((trial for trial in self.trials if trial.control == name), None)


class ComparisonRecord(Value):
    """Paired per-example difference on the test set; positive means that the promoted model is better."""

    against: Control
    mean: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    method: Literal["bootstrap", "sign_flip"]
    num_examples: int
    p_value: float | None = None
    unit: str = "nats per token"
    over_seeds: bool = False
    """Whether the interval is as wide as two seeds of one training differ."""


class ModelScores(Value):
    """One model on the test set and on the retention set."""

    model: str
    """`promoted`, or a control's name."""
    metrics: dict[str, float] = {}
    num_documents: int = 0
    """Documents of the test set that were scored."""
    num_answered: int = 0
    """Documents that were answered: what `exact_match` was taken over, the first ones of the test set."""
    retain_loss: float | None = None
    retain_accuracy: float | None = None
    forgetting: float | None = None
    num_shots: float | None = None
    """Examples in each prompt of `k_shot`, on average; fewer than asked for where no more fitted."""


class PromptComparison(Value):
    """One held-out prompt, answered by base and by bundle."""

    prompt: str
    expected: str = ""
    base_answer: str
    tuned_answer: str


class RefitRecord(Value):
    """How the winner came to the full budget."""

    ran: bool
    reason: str
    """Why it ran, or why it was not needed; and why it was passed over, where it was."""
    to_step: int = 0
    seconds: float = 0.0
    restarts: int = 0
    executor: str = ""
    zero_stage: int = 0
    ranks: int = 1
    left_out_for_hours: bool = False
    """It would have taken more than its share of `max_gpu_hours`; it is made up for where that is raised."""


class BundledFigures(Value):
    """What was measured of the artifact that is bundled: the refit's result, or a rung's of the trial itself."""

    step: int
    metric: float | None = None
    """The search's metric on the eval set."""
    retain_loss: float | None = None
    forgetting: float | None = None
    """Rise of the retention loss over the base's."""


class TransferReport(Value):
    """The verdict, spoken on the test set, which is read once, on the bundle; who asks again is counted."""

    verdict: VerdictKind | None = None
    """None when nothing was promoted and so nothing was tested."""
    sentence: str = ""
    trial_id: str | None = None
    comparisons: tuple[ComparisonRecord, ...] = ()
    controls_left_out: tuple[str, ...] = ()
    """Why a control that was wanted is not among the comparisons."""
    gain_over_seeds: OverSeeds | None = None
    """Gain over the base by each seed that the promoted trial was trained from, the bundle's first; None with one seed."""
    scores: tuple[ModelScores, ...] = ()
    test_set_reads: int = 0
    """How often the test set has been read for this run, this reading included; from the second on it is no longer unseen."""
    prompts: tuple[PromptComparison, ...] = ()
    bundle: str | None = None
    verification: VerificationFigures | None = None
    refit: RefitRecord | None = None
    bundled: BundledFigures | None = None
    plan_against_measured: tuple[PlanAgainstMeasured, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    """Memory of a rank, choice by choice."""
    serve_commands: tuple[str, ...] = ()
    report: str | None = None
    versions: dict[str, str] = {}
