"""The spec as frozen values. Nothing derived is stored here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.spec.adapters import AdapterName, Modules
from orchestrator.spec.anchors import ANCHORS, AnchorKind, AnchorTraits
from orchestrator.spec.tasks import TASKS, DataFormat, Task, TaskTraits
from orchestrator.values import Value

Tune = Literal["lora", "full"]
Quantize = Literal["none", "nf4", "int8"]
ExtraTensors = Literal["keep", "drop"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
TextDocuments = Literal["file", "line", "paragraph"]
ReplayShare = Annotated[float, Field(ge=0.0, lt=1.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Factor = Annotated[float, Field(gt=0.0, le=1.0)]
LearningRate = Annotated[float, Field(gt=0.0, le=10.0)]
FEW_EXAMPLES = 500
"""Number of training documents up to which chance (the split, the seed, when training ends) has a large effect on results."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _refuse_bool(value: object) -> object:
    """Reject `true` for choices that include 1: Python and pydantic would accept it as 1."""
    if isinstance(value, bool):
        raise ValueError("a choice, not true or false")
    return value


class Section(Value):
    """A section of the spec: frozen, finite numbers only; the docstring of each key is its description in the JSON Schema."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)


class BaseSpec(Section):
    """The pretrained model."""

    model: str
    """A folder, `sample`, or the id of a model on the Hugging Face hub (`org/name`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; its commit is recorded."""
    quantize: Quantize = "none"
    """How the frozen weights are held in memory."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run, if transformers does not have its type and the code is pinned: by a full
    commit as `revision`, or by `code_sha256`."""
    code_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Hash of the model's own code that may run; the error that asks for it has it."""
    add_tokens: tuple[str, ...] = ()
    """New tokens: the base gets a row for each that it lacks, the mean of its other rows; `+new_tokens` trains these rows."""
    merge_into: Literal["auto", "original"] = "auto"
    """What the winner is merged into: `auto`: the base as trained (dequantized if quantized); `original`: the 16-bit base."""
    extra_tensors: ExtraTensors = "keep"
    """What becomes of stored tensors that the model's class does not have (layers for multi-token prediction, value heads):
    kept in the bundle byte for byte, or left out."""


class DataSource(Section):
    """One training source; with weights, sources are mixed so that their numbers of rows are in the ratio of the weights."""

    path: str
    weight: PositiveFloat | None = None
    """Share of the rows, relative to the other sources (default 1); if no source has a weight, every row is used."""


class ColumnsSpec(Section):
    """Names of the columns of the data files; the defaults are the usual ones."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    label: str = "label"
    input: str = "input"
    """Alpaca rows: the input of the instruction."""
    system: str = "system"
    """Chats: text that becomes the first turn."""
    tools: str = "tools"
    """Chats: the JSON Schemas of the functions that may be called."""


class DataSpec(Section):
    """Data for training, for comparing trials, for the verdict, and for measuring forgetting."""

    train: str | tuple[DataSource, ...]
    """A file, a glob, a folder, or a list of weighted sources (JSON Lines, JSON, CSV, Parquet, Arrow, text)."""
    eval: Share | str = 0.1
    """A share of train, or a path: trials are compared on it."""
    test: Share | str = 0.1
    """A share of train, or a path: read once, at the end, for the verdict."""
    retain: str | None = None
    """Text that represents what the base must not forget."""
    columns: ColumnsSpec = ColumnsSpec()
    format: DataFormat = "auto"
    """Layout of the rows; `auto` detects it from their columns and reports it."""
    template: Annotated[str, Field(min_length=1)] | None = None
    """The prompt (`text` and `labels`: the text) built from columns: `{name}` is a column. Alpaca rows have a default."""
    template_without_input: Annotated[str, Field(min_length=1)] | None = None
    """The same for Alpaca rows whose input is empty."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Delimiter of a CSV; detected from its header and first rows unless given."""
    text_documents: TextDocuments = "file"
    """What a document is in a text file: the whole file, a line, or a paragraph."""
    separator: str = "\n"
    """Text between prompt and completion; not added after an Alpaca prompt, whose template defines its end."""
    train_on: Literal["all_assistant", "last_assistant"] = "all_assistant"
    """Which assistant turns of a chat are trained on; those with `weight: 0` never are."""
    special_tokens_in_text: Literal["escape", "allow"] = "escape"
    """How control tokens in a row's text (`<|im_end|>`) are read: as ordinary text, or as control tokens."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Maximum number of tokens in a document."""
    pack: bool = True
    """Whether several documents share a row, kept apart by the attention mask."""
    long_rows: Literal["error", "drop", "truncate_prompt"] = "drop"
    """What happens to a row of more than `max_tokens` tokens; `text` is cut into chunks instead."""
    group: str | None = None
    """A column whose rows stay in one split, across given files too."""
    dedupe: Literal["exact", "near", "none"] = "exact"
    """What must not occur in two splits: `exact`: equal rows, prompts and texts; `near`: near-duplicates too."""
    skip_bad_rows: bool = False
    """Malformed rows are counted and listed instead of stopping the run."""
    retain_tokens: PositiveInt = 16384
    """Maximum number of retention tokens that are scored, the same ones for every trial."""
    eval_rows: PositiveInt = 500
    """Maximum number of eval rows that are scored, the same ones for every trial."""
    test_rows: PositiveInt = 500
    """Maximum number of test rows that are scored."""


class AnchorSpec(Section):
    """A penalty that keeps the weights near the base during training."""

    kind: AnchorKind
    """`l2sp`: all unfrozen weights equally; `ewc`: each by its importance for the retention set; `product`: LoRA's product."""
    strength: Annotated[float, Field(ge=0.0)]
    """A step at learning rate r moves trainable weights back by about r x strength of their distance; 0: no effect."""

    @property
    def traits(self) -> AnchorTraits:
        """The traits of the kind."""
        return ANCHORS[self.kind]


Anchor = AnchorSpec | Literal["none"]


class TrainSpec(Section):
    """How a trial is trained."""

    epochs: PositiveFloat = 2
    tokens_per_step: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_refuse_bool)] = "auto"
    """Maximum number of tokens in an optimizer step; `auto`: from the number and length of the documents."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the training tokens over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = 0
    replay: ReplayShare = 0.0
    """Share of retention tokens among the training tokens; `search.replay` tries several."""
    anchor: Anchor = "none"
    """`none` or `{kind, strength}`: keeps the weights near the base; `search.anchor` tries several."""
    layer_decay: Factor = 1.0
    """Ratio of a block's learning rate to that of the block above it; `search.layer_decay` tries several."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights and optimizer states are float32."""


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
    adapter: AdapterName = "lora"
    """As in `finetune`; so are the three below."""
    lora_alpha: PositiveInt | None = None
    lora_dropout: Dropout = 0.0
    modules: Modules = "all"
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
    adapter: Annotated[tuple[AdapterName, ...], Field(min_length=1)] = ("lora",)
    """Kinds of adapters to try with `tune: lora`: LoRA, rank-stabilised LoRA, weight-decomposed LoRA (DoRA)."""
    lora_alpha: tuple[PositiveInt, ...] = ()
    """Values of alpha to try; empty uses twice the rank."""
    lora_dropout: Annotated[tuple[Dropout, ...], Field(min_length=1)] = (0.0,)
    """Shares of the adapters' input to drop out in training; a trial with dropout shares no batch with others."""
    modules: Annotated[tuple[Modules, ...], Field(min_length=1)] = ("all",)
    """Linear layers of the chosen blocks to adapt: `all`, `attention`, `mlp`, or a list of names such as `[q_proj, v_proj]`."""
    replay: tuple[ReplayShare, ...] = ()
    """Shares of retention tokens to try; empty uses `train.replay`. Likewise the two below."""
    anchor: tuple[Anchor, ...] = ()
    """Anchors to try, each with the tuning methods that it fits."""
    layer_decay: tuple[Factor, ...] = ()
    metric: str = "loss"
    """`loss`, `exact_match`, `accuracy`, `macro_f1` or `package.module:function`."""
    trials: PositiveInt = 24
    algorithm: Literal["optuna", "random", "grid", "fixed"] = "optuna"
    points: tuple[SearchPoint, ...] = ()
    """The trials of algorithm `fixed`, in this order; `layers`, `tune` and what describes adapters are then left out."""
    scheduler: Literal["asha", "none"] = "asha"
    rungs: PositiveInt = 3
    """How often `asha` compares a trial at most, including its end; each rung has a third of the steps of the next one."""
    max_forgetting: Annotated[float, Field(ge=0.0)] = 0.10
    """Largest accepted increase of the retention loss, nats per token."""
    budget: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of the full budget that a trial gets; below 1 the winner is trained again to the full budget."""
    probe: bool = True
    """Score blocks by their gradients before the search, if it has more than one choice of blocks."""
    controls: tuple[Literal["shuffled", "scratch", "k_shot"], ...] = ()
    """Controls beyond `none` and `head`, which always run."""
    repeats: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_refuse_bool)] = "auto"
    """Number of seeds that the promoted trial is trained with; `auto`: 5 with at most 500 training documents, else 1."""
    shots: PositiveInt = 4
    """Examples in a prompt of the control `k_shot`, fewer if the base's context is too short."""
    learning_curve: bool = False
    """Also train the promoted trial on shares of the data, to estimate whether more data would help."""

    @property
    def num_trials(self) -> int:
        """Number of searched trials: a fixed list has no more trials than points."""
        return min(self.trials, len(self.points)) if self.algorithm == "fixed" else self.trials


class ClassifySpec(Section):
    """What a classifier reads of a text; only with `task: classify`."""

    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """The hidden states that the new head classifies: the mean over a text's tokens, those of its first token or of its last.
    `auto`: as a sentence encoder's `1_Pooling` says; else what the transformers class of the base does."""


class FinetuneSpec(Section):
    """The one trial of the `finetune` job."""

    layers: str = "all"
    tune: Tune = "lora"
    learning_rate: LearningRate = 2e-4
    lora_rank: PositiveInt = 16
    adapter: AdapterName = "lora"
    """`lora`; `rslora`: scaled by alpha / sqrt(rank) instead of alpha / rank; `dora`: trains the magnitudes of rows apart."""
    lora_alpha: PositiveInt | None = None
    """Twice the rank unless given."""
    lora_dropout: Dropout = 0.0
    """Share of the adapters' input that is dropped out in training."""
    modules: Modules = "all"
    """Linear layers of the chosen blocks to adapt: `all`, `attention`, `mlp`, or a list of names such as `[q_proj, v_proj]`."""


ADAPTER_KEYS = ("adapter", "lora_alpha", "lora_dropout", "modules")
"""Keys of `search`, its points and `finetune` that describe adapters, except their rank."""


class ResourcesSpec(Section):
    """Resources of the job; with `auto` the plan decides."""

    gangs: PositiveInt | Literal["auto"] = "auto"
    ranks_per_gang: PositiveInt | Literal["auto"] = "auto"
    max_gpus: PositiveInt | None = None
    max_gpu_hours: PositiveFloat | None = None
    """A sweep stops at this limit with its best trial so far; a finetune that would need more is rejected."""
    gpu_hour_price: PositiveFloat | None = None
    """Price of one GPU for one hour, in any currency: the plan then shows the run's price."""
    zero: Annotated[Literal[0, 1, 2, 3, "auto"], BeforeValidator(_refuse_bool)] = "auto"
    offload: Literal["none", "optimizer", "parameters", "auto"] = "auto"
    max_fused: PositiveInt | Literal["auto"] = "auto"
    """LoRA trials that may be batched together; `auto`: as many as fit and may save time. Each gang measures the best number."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether blocks are compiled; `auto`: if a measurement before a long search shows that it saves time."""
    cache_bytes: Annotated[NonNegativeInt | Literal["auto"], BeforeValidator(_refuse_bool)] = "auto"
    """Disk space on each machine for cached hidden states of the frozen blocks; `auto`: half of what is free; 0: off."""
    cache_folder: str | None = None
    """Folder of this cache, reused by later sweeps over the same base and data; `~/.cache/orchestrator` unless given."""
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    """`gpu`: fail without a GPU; `cpu`: use no GPU; `auto`: use GPUs if the cluster has any."""


class JobSpec(Section):
    """One YAML file."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The run's folder."""
    base: BaseSpec
    task: Task
    data: DataSpec
    classify: ClassifySpec | None = None
    train: TrainSpec = TrainSpec()
    search: SearchSpec | None = None
    finetune: FinetuneSpec | None = None
    resources: ResourcesSpec = ResourcesSpec()
    output: str = "runs"

    @property
    def traits(self) -> TaskTraits:
        """The traits of the task."""
        return TASKS[self.task]
