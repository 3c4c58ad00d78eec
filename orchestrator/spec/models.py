"""What the user asked: the spec as frozen values. Nothing derived is stored here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.values import Value

Task = Literal["chat", "completion", "text", "classify"]
Tune = Literal["lora", "full"]
Quantize = Literal["none", "nf4", "int8"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
DataFormat = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "labels"]
TextDocuments = Literal["file", "line", "paragraph"]
ReplayShare = Annotated[float, Field(ge=0.0, lt=1.0)]
Factor = Annotated[float, Field(gt=0.0, le=1.0)]
LearningRate = Annotated[float, Field(gt=0.0, le=10.0)]
FEW_EXAMPLES = 500
"""Training documents up to which chance decides much: of the split, of the seed, and of when training should end."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _refuse_bool(value: object) -> object:
    """Keep `true` from passing as the 1 of a choice."""
    if isinstance(value, bool):
        raise ValueError("a choice, not true or false")
    return value


class Section(Value):
    """A section of the spec: frozen, numbers finite, the line under each key its description in the JSON Schema."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)


class BaseSpec(Section):
    """The pretrained model."""

    model: str
    """A hub id, a folder, or `sample`."""
    revision: str | None = None
    """A hub revision; recorded in the bundle."""
    quantize: Quantize = "none"
    """How the frozen weights are held in memory."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    merge_into: Literal["auto", "original"] = "auto"
    """What the winner is merged into: `auto` is what was trained (the dequantized base if quantized), `original` 16 bit."""


class DataSource(Section):
    """One training source; with weights, sources are mixed so that their numbers of rows are to one another as these."""

    path: str
    weight: PositiveFloat | None = None
    """Share of the rows, relative to the other sources (one without counts as 1); where none has a weight, every row is used."""


class ColumnsSpec(Section):
    """Which columns of the files play which part; the defaults are the field's usual names."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    label: str = "label"
    input: str = "input"
    """Of Alpaca rows: what the instruction is about."""
    system: str = "system"
    """Of a chat: text that becomes its first turn."""
    tools: str = "tools"
    """Of a chat: the JSON Schemas of the functions that it may call."""


class DataSpec(Section):
    """What is learned from, compared on, judged by, and not to be forgotten."""

    train: str | tuple[DataSource, ...]
    """A file, a glob, a folder, or a list of weighted sources (JSON Lines, JSON, CSV, Parquet, Arrow, text)."""
    eval: Share | str = 0.1
    """A share of train, or a path: trials are compared on it."""
    test: Share | str = 0.1
    """A share of train, or a path: read once, at the end, for the verdict."""
    retain: str | None = None
    """Text that stands for what the base must not forget."""
    columns: ColumnsSpec = ColumnsSpec()
    format: DataFormat = "auto"
    """How rows are laid out; `auto` finds it from their columns and says so."""
    template: Annotated[str, Field(min_length=1)] | None = None
    """The prompt (`text` and `labels`: the text) made of columns: `{name}` is a column. Alpaca rows have their authors' one."""
    template_without_input: Annotated[str, Field(min_length=1)] | None = None
    """The same for Alpaca rows whose input is empty."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Separates the fields of a CSV; found from its header and first rows unless given."""
    text_documents: TextDocuments = "file"
    """What a document is in a text file: the whole file, a line, or a paragraph."""
    separator: str = "\n"
    """Stands between prompt and completion; not after an Alpaca prompt, whose template says how it ends."""
    train_on: Literal["all_assistant", "last_assistant"] = "all_assistant"
    """Which of a chat's assistant turns are learned; those of `weight: 0` never are."""
    special_tokens_in_text: Literal["escape", "allow"] = "escape"
    """What control tokens are that a row spells (`<|im_end|>`): ordinary text, or control tokens."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """The longest document."""
    pack: bool = True
    """Whether several documents share a row, kept apart by the attention mask."""
    long_rows: Literal["error", "drop", "truncate_prompt"] = "drop"
    """What happens to a row of more than `max_tokens` tokens; `text` is cut into chunks instead."""
    group: str | None = None
    """A column whose rows stay in one split, across given files too."""
    dedupe: Literal["exact", "near", "none"] = "exact"
    """What never stands in two splits: `exact` equal rows, prompts and texts, `near` near-duplicates too; all are told."""
    skip_bad_rows: bool = False
    """Malformed rows are counted and listed instead of stopping the run."""
    retain_tokens: PositiveInt = 16384
    """At most so many tokens of the retention set are scored, the same ones for every trial."""
    eval_rows: PositiveInt = 500
    """At most so many rows of the eval set are scored, the same ones for every trial."""
    test_rows: PositiveInt = 500
    """At most so many rows of the test set are scored."""


class AnchorSpec(Section):
    """What pulls the weights back to the base while they learn."""

    kind: Literal["l2sp", "ewc", "product"]
    """`l2sp`: unfrozen weights, each alike; `ewc`: each by what the retention set makes of it; `product`: LoRA's product."""
    strength: Annotated[float, Field(ge=0.0)]
    """A step at rate r pulls what learns by about r x strength of its way back; 0 does not pull."""


Anchor = AnchorSpec | Literal["none"]


class TrainSpec(Section):
    """How a trial learns."""

    epochs: PositiveFloat = 2
    tokens_per_step: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_refuse_bool)] = "auto"
    """A step is a fixed list of documents of at most so many tokens; `auto`: from the number and length of the documents."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the training tokens over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = 0
    replay: ReplayShare = 0.0
    """Share of retention tokens among the tokens that are trained on; `search.replay` tries several."""
    anchor: Anchor = "none"
    """`none` or `{kind, strength}`: what holds the weights near the base; `search.anchor` tries several."""
    layer_decay: Factor = 1.0
    """Each block learns at so much of the rate of the one above it; `search.layer_decay` tries several."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the forward and backward pass compute in; master weights and optimizer states are float32."""


class RateRanges(Section):
    """Learning-rate ranges by tuning method; `full` is a tenth of `lora` unless given."""

    lora: tuple[LearningRate, LearningRate] = (1e-4, 5e-3)
    full: tuple[LearningRate, LearningRate] | None = None


class SearchPoint(Section):
    """One trial of a fixed list."""

    layers: str
    tune: Tune = "lora"
    lora_rank: PositiveInt | None = None
    """16 unless given; none with `full`."""
    learning_rate: LearningRate
    replay: ReplayShare | None = None
    """As `train.replay` unless given; so are the two below."""
    anchor: Anchor | None = None
    layer_decay: Factor | None = None


class SearchSpec(Section):
    """What the sweep tries."""

    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("last:2", "last:4", "all")
    tune: Annotated[tuple[Tune, ...], Field(min_length=1)] = ("lora",)
    learning_rate: RateRanges = RateRanges()
    lora_rank: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (16,)
    replay: tuple[ReplayShare, ...] = ()
    """Shares of retention tokens to try; empty takes `train.replay`. So do the two below."""
    anchor: tuple[Anchor, ...] = ()
    """Of these, a choice gets those that fit its way of tuning."""
    layer_decay: tuple[Factor, ...] = ()
    metric: str = "loss"
    """`loss`, `exact_match`, `accuracy`, `macro_f1` or `package.module:function`."""
    trials: PositiveInt = 24
    algorithm: Literal["optuna", "random", "grid", "fixed"] = "optuna"
    points: tuple[SearchPoint, ...] = ()
    """The trials of algorithm `fixed`, in this order; `layers`, `tune` and `lora_rank` are then left out."""
    scheduler: Literal["asha", "none"] = "asha"
    rungs: PositiveInt = 3
    """How often `asha` compares a trial at most, its end included; each rung has a third of the steps of the next one."""
    max_forgetting: Annotated[float, Field(ge=0.0)] = 0.10
    """Largest accepted rise of the retention loss, nats per token."""
    budget: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of `train` that a trial gets at most; below 1 the winner is trained again to the full budget."""
    probe: bool = True
    """Whether blocks are scored by their gradients before the search, where it has more than one choice of blocks."""
    controls: tuple[Literal["shuffled", "scratch", "k_shot"], ...] = ()
    """Controls beyond `none` and `head`, which always run."""
    repeats: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_refuse_bool)] = "auto"
    """From how many seeds the promoted trial is trained in all; `auto`: 5 with at most 500 training documents, else 1."""
    shots: PositiveInt = 4
    """Examples that the control `k_shot` puts before each test document, as many as the base can read."""
    learning_curve: bool = False
    """Whether the promoted trial is trained on shares of the data too, to tell whether more data would help."""

    @property
    def num_trials(self) -> int:
        """How many are searched: a fixed list has no more trials than points."""
        return min(self.trials, len(self.points)) if self.algorithm == "fixed" else self.trials


class FinetuneSpec(Section):
    """The one trial of the `finetune` job."""

    layers: str = "all"
    tune: Tune = "lora"
    learning_rate: LearningRate = 2e-4
    lora_rank: PositiveInt = 16


class ResourcesSpec(Section):
    """What the job may use; `auto` leaves it to the plan."""

    gangs: PositiveInt | Literal["auto"] = "auto"
    ranks_per_gang: PositiveInt | Literal["auto"] = "auto"
    max_gpus: PositiveInt | None = None
    max_gpu_hours: PositiveFloat | None = None
    """A sweep ends in order where its hours do; one training that would take more is refused."""
    gpu_hour_price: PositiveFloat | None = None
    """What an hour of one GPU costs, in any currency: the plan then says what the run does."""
    zero: Annotated[Literal[0, 1, 2, 3, "auto"], BeforeValidator(_refuse_bool)] = "auto"
    offload: Literal["none", "optimizer", "parameters", "auto"] = "auto"
    max_fused: PositiveInt | Literal["auto"] = "auto"
    """LoRA trials that may share a batch; `auto`: as many as fit and can pay. The gang measures how many of them do."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether trials train with compiled blocks; `auto`: where a measurement before a long search says that it pays."""
    cache_bytes: Annotated[NonNegativeInt | Literal["auto"], BeforeValidator(_refuse_bool)] = "auto"
    """What stored hidden states may take on each machine's own disk; `auto`: half of what is free, 0: none are stored."""
    cache_folder: str | None = None
    """Where they lie, for later sweeps over the same base and data too; `~/.cache/orchestrator` unless given."""
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    """`gpu` refuses to start without one; `auto` takes GPUs where the cluster has them."""


class JobSpec(Section):
    """One YAML file."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The run's folder."""
    base: BaseSpec
    task: Task
    data: DataSpec
    train: TrainSpec = TrainSpec()
    search: SearchSpec | None = None
    finetune: FinetuneSpec | None = None
    resources: ResourcesSpec = ResourcesSpec()
    output: str = "runs"
