"""Records of a sweep and its verdict that outlive the process: sweep.json and transfer.json.

Losses are nats per supervised token (retention: nats per token), times are seconds, sizes are bytes. A
figure that was not measured is None; a measurement that failed is NaN.
"""

from __future__ import annotations

from typing import Literal, cast

from pydantic import model_validator

from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.transfer.learning_curve import LearningCurve
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
"""Display name of each control."""
BY_THE_RULE = "; by the rule: "
"""Between what a person promoted and the rule's reason, in the text of a promotion by hand."""
VerdictKind = Literal["positive", "no gain", "negative", "inconclusive"]


class EngineFigures(Value):
    """Execution of a trial in figures: engine, ranks, memory."""

    executor: str
    engine_class: str = ""
    zero_stage: int = 0
    ranks: int = 1
    partitioned_bytes: int = 0
    peak_memory_bytes: int = 0
    base_loads: int = 1
    ordinal: int = 0
    """Number of assignments that the gang had run before."""
    device: str = ""
    rank_peak_memory_bytes: tuple[int, ...] = ()
    """Measured peak of each rank: on a GPU torch's allocator, on a CPU the resident memory of the process."""
    predicted_memory_bytes: int | None = None
    """Memory that the plan predicted for a rank."""
    micro_batch_rows: int = 0
    checkpointing: bool = False
    fused_trials: int = 1
    """Number of trials that shared the batches of its last rung."""
    compiled: bool = False
    """True if its blocks were compiled."""
    compile_seconds: float = 0.0
    """Compilation time in its last rung."""


class PlanAgainstMeasured(Value):
    """A planned figure and the measured one."""

    name: str
    planned: float | None
    measured: float | None
    unit: Literal["bytes", "seconds", "count", "tokens/s"]


class MemoryRow(Value):
    """Predicted memory of a rank for one choice of the search, and what its trials measured."""

    label: str
    """`last:4 · lora r16`, or `untouched base`."""
    num_trials: int
    device: str
    predicted_bytes: int | None
    """None if the plan has no figure for it."""
    measured_bytes: int
    """Highest peak over ranks and trials: on a GPU of torch's allocator, on a CPU of the resident memory. 0 if no trial got as
    far as a measurement."""
    rank_peak_bytes: tuple[int, ...]
    """Highest peak of each rank over the trials."""
    ratio: float | None
    """Measured / predicted; None also if a trial ran out of memory, since it then ran with another micro-batch than planned."""
    micro_batch_rows: int
    """Smallest micro-batch that a trial was reduced to."""
    checkpointing: bool = False
    num_out_of_memory: int = 0
    """Number of trials that ran out of memory."""
    num_failed_for_memory: int = 0
    """Number of those that failed because nothing smaller was left to try."""


class ClassifiedDocuments(Value):
    """A classifier's bundle compared with the trained model document by document."""

    passed: bool
    largest_kl: float
    """Largest KL(trained || bundle) of a document, nats; NaN if one is not finite."""
    limit: float
    """Of that figure."""
    num_other_answers: int
    """Documents that get another class, beyond rounding."""
    largest_gap: float
    """Largest difference between the trained model's probabilities of its own class and the bundle's."""


class VerificationFigures(Value):
    """Comparison of the bundle with the trained model (docs/design.md, law 5). KL divergences are means, nats per token."""

    passed: bool
    kl_bundle: float
    """KL(trained || bundle)."""
    kl_base: float
    """KL(trained || base)."""
    limit: float
    classified: ClassifiedDocuments | None = None
    """None for other tasks, and in records of older versions."""
    num_prompts: int
    num_tokens: int = 0
    seconds: float = 0.0
    merged_into: str = ""
    """`dequantized` or `original`: the weights that the adapter was merged into."""


class RungRecord(Value):
    """Figures of a trial at one rung."""

    rung: int = 0
    step: int
    tokens: int
    train_loss: float | None = None
    eval_loss: float | None = None
    metric: float | None = None
    """Search metric on the eval set."""
    retain_loss: float | None = None
    retain_accuracy: float | None = None
    """Share of the retention set's answers that greedy decoding reproduces exactly; None without answers."""
    forgetting: float | None = None
    """Rise of the retention loss over the base's."""
    score: float | None = None
    """Objective that the search minimises: the metric (1 - metric if higher is better) plus the penalty for forgetting
    beyond the bound."""
    seconds: float = 0.0
    """Training and evaluation time since the previous rung."""


class TrialRecord(Value):
    """One trial or control, from its first rung to its end."""

    trial_id: str
    number: int
    control: Control | None = None
    share: float = 1.0
    """Share of the training documents that it was trained on."""
    layers: str
    tune: Literal["lora", "full"]
    lora_rank: int | None = None
    adapter: AdapterOptions = PLAIN_LORA
    learning_rate: float
    remedies: str = ""
    """Remedies against forgetting, for people: `replay 0.1 · l2sp 30`."""
    remedy_kinds: tuple[str, ...] = ()
    """Kinds of these remedies, `replay` and `l2sp`; empty in records of older versions."""
    seed: int = 0
    state: Literal["running", "finished", "stopped", "failed"]
    """`stopped`: by the scheduler or because the GPU-hours were used up; `failed`: by an error of its own."""
    reason: str = ""
    rungs: tuple[RungRecord, ...] = ()
    judged_rung: int | None = None
    """Rung that it is compared by, if not the last: with early stopping the best one on the eval set."""
    total_steps: int = 0
    trainable_parameters: int = 0
    gang: int = -1
    engine: EngineFigures | None = None
    out_of_memory: bool = False
    """True if it ran out of memory: it was retried with less, or failed."""

    @property
    def last(self) -> RungRecord | None:
        return self.rungs[-1] if self.rungs else None

    @property
    def judged(self) -> RungRecord | None:
        """Rung that the trial is compared by."""
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
        """Training method: `lora r16 · replay 0.1`."""
        tune = self.adapter.method(self.lora_rank) if self.tune == "lora" else "full"
        return f"{tune} · {self.remedies}" if self.remedies else tune

    @property
    def label(self) -> str:
        """`last:4 · lora r16 · lr 3.1e-03`; the display name for a control."""
        if self.control == "none":
            return "base model"
        point = f"{self.layers} · {self.method} · lr {self.learning_rate:.1e}"
        if self.control == "curve":
            return f"{self.share:.3g} of the data · {point}"
        if self.control == "repeat":
            return f"{point} · seed {self.seed}"
        return f"{self.control} control · {point}" if self.control else point


class SweepResult(Value):
    """Results of the search; the finetune job writes the same record, with one trial."""

    name: str
    job: Literal["sweep", "finetune"] = "sweep"
    task: str = "completion"
    metric: str
    higher_is_better: bool
    max_forgetting: float
    """Bound on forgetting; infinite without one."""
    trials: tuple[TrialRecord, ...]
    """All trials and controls by number; controls have `control` set. Trials of the learning curve are not included."""
    winner_id: str | None
    """Promoted trial; None if no trial was worth promoting."""
    promotion_reason: str
    """Why this trial is promoted, or why none is; where a person promoted it, followed by `rule_reason`."""
    promoted_by_hand: bool = False
    rule_reason: str = ""
    """Why the rule promoted another trial, or none, where this one was promoted by hand; otherwise empty."""
    advice: tuple[str, ...] = ()
    """Recommendations, in order."""
    front: tuple[str, ...] = ()
    """Trial ids on the Pareto front of target and retention; if empty, the reader computes it."""
    num_gangs: int = 1
    ranks_per_gang: int = 1
    base_loads: int = 0
    """Number of times the base was loaded: one for each gang and one for each replaced gang (docs/design.md, law 11)."""
    gangs_replaced: int = 0
    gang_idle_seconds: float = 0.0
    """Idle time summed over the gangs, from the first trial's start to the last one's end."""
    first_trial_seconds: float | None = None
    """Time from submission to the first trial's first step."""
    wall_seconds: float = 0.0
    started_at: float = 0.0
    """Unix time."""
    finished_at: float | None = None
    """Unix time; None while the run is in progress."""
    num_submissions: int = 1
    gpu_hours_used: float = 0.0
    """GPU-hours of all submissions, including refit and bundle once `finished_at` is set; rank-hours without GPUs."""
    max_gpu_hours: float | None = None
    """Limit of the last submission."""
    ended_by_hours: str = ""
    """Progress of the search when `max_gpu_hours` ended it; raising the limit continues it."""
    learning_curve: LearningCurve | None = None
    """Learning curve of the trial promoted by the rule, if requested and measured; see `curve_of_winner`."""
    no_learning_curve: str = ""
    """Reason why a requested learning curve is missing."""
    learning_curve_seconds: float = 0.0
    """Time to train and score its trials, which are not among `trials`."""

    @model_validator(mode="before")
    @classmethod
    def _with_rule_reason(cls, values: object) -> object:
        """Older versions recorded the rule's reason only within the text of a promotion by hand."""
        if not isinstance(values, dict):
            return values
        given = cast("dict[str, object]", values)
        if given.get("promoted_by_hand") and "rule_reason" not in given:
            return {**given, "rule_reason": str(given.get("promotion_reason", "")).partition(BY_THE_RULE)[2]}
        return given

    @property
    def searched(self) -> tuple[TrialRecord, ...]:
        """Trials without the controls."""
        return tuple(trial for trial in self.trials if trial.control is None)

    @property
    def winner(self) -> TrialRecord | None:
        return next((trial for trial in self.trials if trial.trial_id == self.winner_id), None)

    @property
    def curve_of_winner(self) -> LearningCurve | None:
        """Learning curve, if it belongs to the promoted trial."""
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
    """True if the interval includes the variation between seeds."""


class ModelScores(Value):
    """Scores of one model on the test set and on the retention set."""

    model: str
    """`promoted`, or a control's name."""
    metrics: dict[str, float] = {}
    num_documents: int = 0
    """Number of test documents scored."""
    num_answered: int = 0
    """Number of test documents answered, from the beginning of the set: those that `exact_match` covers."""
    retain_loss: float | None = None
    retain_accuracy: float | None = None
    forgetting: float | None = None
    num_shots: float | None = None
    """Mean number of examples in a prompt of `k_shot`; fewer than requested if no more fit."""


class PromptComparison(Value):
    """One held-out prompt with the answers of base and bundle."""

    prompt: str
    expected: str = ""
    base_answer: str
    tuned_answer: str


class RefitRecord(Value):
    """Training of the winner to the full budget."""

    ran: bool
    reason: str
    """Why it ran, was not needed, or was skipped."""
    to_step: int = 0
    seconds: float = 0.0
    restarts: int = 0
    executor: str = ""
    zero_stage: int = 0
    ranks: int = 1
    left_out_for_hours: bool = False
    """True if it would have exceeded its share of `max_gpu_hours`; it is made up for if the limit is raised."""


class BundledFigures(Value):
    """Figures of the bundled artifact: the refit's, or those of one of the trial's rungs."""

    step: int
    metric: float | None = None
    """Search metric on the eval set."""
    retain_loss: float | None = None
    forgetting: float | None = None
    """Rise of the retention loss over the base's."""


class TransferReport(Value):
    """Verdict of the bundle on the test set. The test set is read once; further readings are counted."""

    verdict: VerdictKind | None = None
    """None if nothing was promoted, and so nothing was tested."""
    sentence: str = ""
    trial_id: str | None = None
    comparisons: tuple[ComparisonRecord, ...] = ()
    controls_left_out: tuple[str, ...] = ()
    """Reason for each requested control that is missing from the comparisons."""
    gain_over_seeds: OverSeeds | None = None
    """Gain over the base for each seed of the promoted trial, the bundle's first; None with one seed."""
    scores: tuple[ModelScores, ...] = ()
    test_set_reads: int = 0
    """Number of readings of the test set in this run, including this one; after the first it is no longer unseen."""
    prompts: tuple[PromptComparison, ...] = ()
    bundle: str | None = None
    verification: VerificationFigures | None = None
    refit: RefitRecord | None = None
    bundled: BundledFigures | None = None
    plan_against_measured: tuple[PlanAgainstMeasured, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    """Memory per rank for each choice."""
    serve_commands: tuple[str, ...] = ()
    report: str | None = None
    versions: dict[str, str] = {}
