"""Values of this package: the anatomy of a base, and a selection of its layers."""

from __future__ import annotations

from typing import Literal

from orchestrator.anatomy.costs import BlockCosts
from orchestrator.spec.adapters import ADAPTER_KINDS, PLAIN_LORA, AdapterKind, AdapterOptions
from orchestrator.values import Value

DTYPE_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of an element, by safetensors' name of its type: all that the format knows (0.8)."""


class Encoding(Value):
    """How a stored tensor is quantized; its `name`, `shape` and `dtype` are those after decoding, in 16 bit."""

    kind: Literal["fp8", "mxfp4"]
    data: str
    """Name in the file of the quantized values."""
    scales: str
    """Name in the file of their scales."""
    scales_file: str


class StoredPart(Value):
    """A stored tensor that holds a part of a parameter: one expert's matrix, or some rows of a fused one."""

    name: str
    """Name in the file."""
    file: str
    shape: tuple[int, ...]
    """Shape in the file."""
    dtype: str
    encoding: Encoding | None = None
    index: tuple[int, ...] = ()
    """Position in the parameter's leading dimensions: (expert,)."""
    start: int = 0
    """First row of the remaining dimensions that the part covers, after `transposed`; it covers as many as it has."""
    axis: int = 0
    """The remaining dimension along which `start` counts."""
    transposed: bool = False
    """True if the file holds the part's transpose (its last two dimensions swapped)."""
    offset: int = 0
    """First row of the stored tensor along `axis`, after `transposed`, that belongs to the part."""
    length: int = 0
    """Number of rows along `axis`; 0 for all: the stored tensor belongs to this parameter alone."""
    operation: str = ""
    """What transformers computes from the stored tensor when loading, if it does more than move elements. Such a parameter
    can be kept as it is stored, but neither read nor trained."""

    @property
    def oriented_shape(self) -> tuple[int, ...]:
        """Shape after `transposed`."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


class TensorInfo(Value):
    """One parameter as it is stored. `file` is relative to the base's folder; empty if only the config is known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors spelling: BF16, F16, F32."""
    file: str = ""
    stored_name: str = ""
    """Name in the file, if different: some checkpoints omit the backbone's prefix."""
    encoding: Encoding | None = None
    """How it is quantized, for a tensor that is stored as one."""
    parts: tuple[StoredPart, ...] = ()
    """The stored tensors that together are this parameter, if it is not stored as one; `file` is then that of the first."""

    @property
    def stored_parts(self) -> tuple[StoredPart, ...]:
        """The stored tensors that the parameter is made of: its `parts`, or the one that holds it whole."""
        if self.parts or not self.file:
            return self.parts
        name = self.stored_name or self.name
        return (StoredPart(name=name, file=self.file, shape=self.shape, dtype=self.dtype, encoding=self.encoding),)

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BITS[self.dtype] // 8


class Experts(Value):
    """Mixture of experts in the blocks of a base."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """MLP width of one routed expert."""
    shared_intermediate_size: int = 0
    """MLP width of the shared expert, which every token passes through; 0 if there is none."""
    grouped: bool = True
    """Whether transformers computes them through a registered function (`train.model.experts`), so that adapters apply to the
    rows of the input. Otherwise an adapted copy of the weights is made in every pass."""
    balance: float = 0.0
    """Factor of the class's load-balancing loss, which the config turns on by `output_router_logits`; 0 if it is off."""


class Ways(Value):
    """What a class allows, found out by trying (`train.model.self_test`): how rows are laid out and losses computed.

    The defaults are those of the layouts in the table. `reasons` says for each that is not the default what was seen.
    """

    packs: bool = True
    """Restarting positions keep the documents of a row apart. Otherwise every document has a row of its own."""
    pads: bool = True
    """Padding at the end of a row changes nothing before it. Otherwise a micro-batch is one row without padding."""
    projects: bool = True
    """The logits are the output projection of the last hidden states, scaled and capped as the anatomy says. Otherwise the
    class's own logits are computed, at every position."""
    injects: bool = True
    """Stored hidden states can stand in for the blocks below a cut. Otherwise nothing is stored."""
    attention: Literal["by_document", "sdpa", "eager"] = "by_document"
    """The best implementation of attention that the class supports: `sdpa` if it computes a whole row alone, `eager` if
    transformers has no fused kernel for it."""
    reasons: dict[str, str] = {}
    """Name of a field above -> what was seen."""


class Pooling(Value):
    """What a new classifier reads of a text, decided once (`anatomy.pooling`)."""

    kind: Literal["class", "mean", "cls", "last"] = "class"
    """`class`: what the transformers class of the base reads; else the mean over the text's tokens, the first or the last."""
    config: dict[str, str] = {}
    """Keys of config.json with which the transformers class itself pools so; empty if it needs none, or cannot."""
    reason: str = ""
    """Why, for people."""

    @property
    def by_class(self) -> bool:
        """True if the transformers class pools so: the bundle needs no head file."""
        return self.kind == "class" or bool(self.config)


class ModelAnatomy(Value):
    """The structure of a base, from config.json and safetensors headers only.

    Tensor names are the parameter names of the transformers model (`model.layers.0.self_attn.q_proj.weight`); if the
    checkpoint uses another, it is the tensor's `stored_name`.
    """

    model_type: str
    kind: Literal["decoder", "encoder", "encoder_decoder"]
    folder: str
    """Absolute path of the base's folder."""
    has_weights: bool
    """False if there is only config.json, or if `plan_only`: enough to plan, not to train."""
    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """0 if there is none (a vision transformer)."""
    max_positions: int
    tied: bool
    """True if the output projection shares the input embedding's tensor."""
    block_prefix: str
    """`model.layers.{}.`"""
    blocks_module: str
    """`model.layers`: the module list of the blocks."""
    backbone: str
    """`model`: the attribute of the causal LM that returns hidden states."""
    head_weight: str
    """`lm_head.weight`: name of the output projection, also if it is tied and therefore not stored."""
    classifier_weight: str
    """`score.weight`: name of the new head that `classify` adds."""
    embeddings: tuple[str, ...]
    final_norm: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    """Parameter names of each block, block 0 at the input."""
    linears: tuple[tuple[str, ...], ...]
    """For each block the weights of its matrix products: what LoRA adapts and quantization compresses."""
    tensors: dict[str, TensorInfo]
    """Every stored tensor by name (without a tied head)."""
    config_sha256: str
    classifier_bias: str = ""
    """`classifier.bias`; empty if the new head of `classify` has none."""
    head_bias: str = ""
    """`lm_head.bias`; empty if the output projection has none."""
    attention: Literal["fused", "eager"] = "fused"
    """`eager`: transformers has no fused kernel for the layout, and the scores of every pair of positions are kept."""
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["gated", "plain"] = "gated"
    """`gated`: up and gate, multiplied; `plain`: one matrix up, a nonlinearity, one down."""
    activation: str = "silu"
    """transformers' name of the MLP's nonlinearity."""
    experts: Experts | None = None
    stacked: tuple[tuple[str, ...], ...] = ()
    """For each block the weights [experts, out, in] of its routed experts in the order of their module, empty for a dense block.
    They are in `blocks` and not in `linears`: bitsandbytes does not quantize them, and LoRA adapts them only if asked."""
    dropout: str = ""
    """Config key and rate of dropout in blocks or embeddings during training; empty if there is none."""
    plan_only: str = ""
    """Why a base of this layout can be planned for but not trained; empty if it can be trained."""
    source: Literal["table", "class", "names"] = "table"
    """Where the layout is from: the table (`layouts/`), the transformers class itself, built without memory, or the names of the
    stored tensors."""
    architecture: str = ""
    """The transformers class that is loaded for the task; empty for a layout of the table, which the task's auto class finds."""
    code_sha256: str = ""
    """Hash of the base's own code, which has the class; empty if the class is transformers' own."""
    code_files: tuple[str, ...] = ()
    """Names of the files of this code."""
    ways: Ways = Ways()
    block_kinds: tuple[int, ...] = ()
    """For each block the number of its kind: blocks of one kind have equal names, shapes and costs. Empty if all are alike."""
    block_costs: tuple[BlockCosts, ...] = ()
    """Costs of each kind of block, counted on the class; empty where formulas know the layout, or where counting failed."""
    costs_note: str = ""
    """Why the costs of the blocks could not be counted, so that formulas of another layout stand in; empty if they were."""
    transposed: tuple[str, ...] = ()
    """Weights that multiply from the right, [in, out] (GPT-2's Conv1D) or [experts, in, out]."""
    routers: tuple[tuple[str, ...], ...] = ()
    """For each block the weights and biases that choose its experts; empty for a base without experts."""
    logit_scale: float = 1.0
    """Factor of the logits after the output projection (Granite, Cohere)."""
    logit_cap: float = 0.0
    """Logits are cap * tanh(logits / cap) after scaling (Gemma 2); 0 if they are not capped."""
    tied_names: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that share one tensor, other than the output projection; the first is the one in `tensors`."""
    others: tuple[str, ...] = ()
    """Parameters outside the text model (vision and audio towers, projectors): frozen, and kept as they are."""
    extra: tuple[TensorInfo, ...] = ()
    """Stored tensors that the class does not have (layers for multi-token prediction, value heads)."""
    pooling: Pooling = Pooling()
    """What a new classifier reads of a text."""
    buffers: tuple[TensorInfo, ...] = ()
    """Stored tensors that the class has and that are no parameters (a router's correction): loaded, never trained, kept."""
    copies: tuple[TensorInfo, ...] = ()
    """Stored copies of tied parameters: `stored_name` is the copy's, `name` the parameter that it equals (a tied output
    projection that is stored besides the embedding)."""
    notes: tuple[str, ...] = ()
    """What is unusual about the checkpoint, one sentence each."""
    new_rows: tuple[int, ...] = ()
    """Ids of the tokens that `base.add_tokens` names: the rows that `+new_tokens` trains."""
    new_tensors: tuple[TensorInfo, ...] = ()
    """Tensors, except the classifier, that `classify` needs and the checkpoint omits (an encoder's pooler): initialised and
    trained with it."""

    def costs_of(self, block: int) -> BlockCosts:
        """Return the counted costs of a block."""
        return self.block_costs[self.block_kinds[block] if self.block_kinds else 0]

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight as (out, in), of routed experts as (experts, out, in), whichever way its parameter lies;
        of the output projection too where it is tied."""
        if name not in self.tensors and name == self.head_weight:
            return (self.vocab_size, self.hidden_size)
        shape = self.tensors[name].shape
        return (*shape[:-2], shape[-1], shape[-2]) if name in self.transposed else shape

    @property
    def weight_files(self) -> list[str]:
        """Names of the files in the base's folder that hold its tensors."""
        held = (*self.tensors.values(), *self.extra, *self.buffers, *self.copies)
        parts = [part for tensor in held for part in tensor.stored_parts]
        return sorted({part.file for part in parts} | {part.encoding.scales_file for part in parts if part.encoding is not None})

    @property
    def encoding(self) -> str:
        """How the checkpoint is quantized: the kind of its encoded tensors, empty if there is none."""
        parts = (part for tensor in self.tensors.values() for part in tensor.stored_parts)
        return next((part.encoding.kind for part in parts if part.encoding is not None), "")

    @property
    def routed(self) -> frozenset[str]:
        """The weights of routed experts in all blocks."""
        return frozenset(name for block in self.stacked for name in block)

    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors.values())


class LayerSelection(Value):
    """The parameters that a policy selects on a base. The three sets are disjoint and cover every parameter.

    Names are checkpoint names. `trainable` parameters are trained; `adapted` ones stay frozen and get an adapter; `frozen`
    ones are neither. A new classification head is in `trainable` under `ModelAnatomy.classifier_weight`; an untied output
    projection under `ModelAnatomy.head_weight`.
    """

    policy: str
    tune: Literal["lora", "full"]
    lora_rank: int | None
    adapter: AdapterOptions = PLAIN_LORA
    trainable: tuple[str, ...]
    adapted: tuple[str, ...]
    frozen: tuple[str, ...]
    cut: int
    """First block with anything trainable; `num_blocks` if only a head is trained or nothing is."""
    blocks: tuple[int, ...] = ()
    """Trainable blocks, ascending. Empty in plans of older versions."""
    pending: bool = False
    """True for a policy by score whose blocks are not known yet. Equally many of the largest blocks replace them, with the cut
    at 0, so that no choice needs more memory. It is used for planning and never trained."""
    trains_embeddings: bool = False
    """True if anything below the first block is trained, so that gradients pass through every block."""
    unties_head: bool = False
    """True if the tied output projection is copied before training."""
    new_classifier: bool = False
    num_trainable_parameters: int
    """Elements with a gradient: trainable tensors and those of the adapters."""

    @property
    def adapter_kind(self) -> AdapterKind:
        return ADAPTER_KINDS[self.adapter.kind]
