"""The results of a gang's work: rungs and measurements, and a record of the engine that ran them."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import AliasChoices, ConfigDict, Field, computed_field, model_validator

from orchestrator.values import Value
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.measurements import CompileTimes, DomainShift, LayerScores


class EngineRecord(Value):
    """The engine that trained a trial (law 9), with proof that ZeRO partitioned the state, and the measured memory."""

    executor: Literal["torch", "deepspeed", "none"]
    engine_class: str
    zero_stage: int
    ranks: int
    partitioned_bytes: int
    """Bytes of optimizer state and master weights that rank 0 holds of the partitioned whole."""
    trainable_parameters: int
    peak_memory_bytes: int
    """Measured peak of the rank that used most; see `rank_peak_memory_bytes`."""
    live_engines: int
    base_loads: int
    """Number of times this process has loaded the base; always 1."""
    ordinal: int
    """Number of assignments that this gang had run before."""
    device: str = ""
    base_test: str = ""
    """What the self-test of the loaded base found (`train.ways`); empty in records of older versions."""
    rank_peak_memory_bytes: tuple[int, ...] = ()
    """Measured while it trained and was scored, by rank: on a GPU the most that torch's allocator held, on a CPU the
    process's resident memory, sampled after every step and at the end."""
    predicted_memory_bytes: int | None = None
    """Planned memory of a rank, for the planned micro-batch."""
    micro_batch_rows: int = 0
    checkpointing: bool = False
    fused_trials: int = 1
    """Number of trials that shared its batches."""
    from_memory: bool = False
    """True if it continued from the state of the trial's last rung held in memory; else from the files, or from step 0."""
    compiled: bool = False
    """True if its blocks were compiled."""
    compile_seconds: float = 0.0
    """Training time spent compiling: 0 if an earlier trial of the gang had the same kind of blocks."""
    trunk_cut: int | None = None
    """The cut whose stored states it trained on; None where the trunk was computed at every step."""


FORMER_KEYS = frozenset({"layer_scores", "domain_shift", "compile_times"})
"""Keys of a rung's record in older versions, always null in the files of a run: measurements were then answered as rungs."""


class RungResult(Value):
    """A gang's answer for a trial: trained to a rung, or the base evaluated."""

    model_config = ConfigDict(serialize_by_alias=True)

    trial_id: str
    rung: int
    step: int
    tokens: int
    state: Literal["done", "failed"]
    failure: Failure | None = None
    """Why it failed; None if it is done."""
    train_loss: float | None = None
    """Loss of the last step, nats per supervised token."""
    eval_loss: float | None = None
    metrics: dict[str, float] = {}
    """Every metric that was computed, by name (`loss`, `accuracy`, `macro_f1`, `exact_match`)."""
    retain_loss: float | None = None
    retain_accuracy: float | None = None
    """Share of the retention set's answers that greedy decoding would give exactly; None where it has none."""
    checkpoint: str | None = None
    """The rung's folder; None when nothing was trained (the control `none`)."""
    engine: EngineRecord | None = None
    reduced_execution: ExecutionPlan | None = Field(
        default=None, validation_alias=AliasChoices("reduced_execution", "relieved"), serialization_alias="relieved"
    )
    """The execution that the trial ended with after running out of memory; its later rungs start with it."""
    steady_tokens_per_s: float | None = None
    """Training speed after the first two steps, without saving and scoring; a plan's hours can be calibrated by it."""
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    trunk_seconds: float = 0.0
    """Seconds spent before training on computing hidden states that were not stored yet."""
    started_at: float = 0.0
    finished_at: float = 0.0
    """Time at which its gang was free for other work; the rung may have been on disk a little later."""
    gang: int = -1
    notes: tuple[str, ...] = ()
    """Automatic decisions during training (law 9): a micro-batch halved, a damaged checkpoint skipped."""

    @model_validator(mode="before")
    @classmethod
    def _from_record(cls, values: object) -> object:
        """Accept records on disk: with `reason` as well as `failure`, older ones with `reason` only, and former keys."""
        if not isinstance(values, dict):
            return values
        given = cast("dict[str, object]", values)
        found = {key: value for key, value in given.items() if key not in FORMER_KEYS or value is not None}
        reason = str(found.pop("reason", ""))
        if found.get("state") == "failed" and found.get("failure") is None:
            found["failure"] = Failure.recorded(reason)
        return found

    @computed_field
    @property
    def reason(self) -> str:
        """Why it failed, as text; empty where it is done."""
        return "" if self.failure is None else str(self.failure)

    @property
    def failed_for_memory(self) -> bool:
        """Return whether it failed because memory use could not be reduced further; its reason ends with the remedy."""
        return self.failure is not None and self.failure.kind == "out_of_memory"

    @property
    def ran_out_of_memory(self) -> bool:
        """Return whether memory ran out: it was trained with a reduced execution, or failed."""
        return self.reduced_execution is not None or self.failed_for_memory

    @property
    def work_id(self) -> str:
        """Return the name of the work that it answers."""
        return self.trial_id


class MeasurementResult(Value):
    """A gang's answer to a measurement. Its `found` says whether the measurement failed."""

    work_id: str
    found: LayerScores | DomainShift | CompileTimes
    gang: int = -1
    notes: tuple[str, ...] = ()
    """See `RungResult.notes`."""


WorkResult = RungResult | MeasurementResult
"""An answer of a gang."""


class StepReport(Value):
    """One optimizer step, a line of steps.jsonl."""

    step: int
    epoch: int
    tokens: int
    """Tokens seen so far."""
    supervised_tokens: int
    """Supervised tokens of this step."""
    loss: float
    loss_hex: str
    """The loss without rounding (`float.hex`)."""
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    memory_bytes: int
