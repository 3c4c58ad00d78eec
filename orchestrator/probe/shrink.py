"""Make a tiny model of a class: the same type and kinds of blocks, with few of them and small matrices.

The sizes of a config depend on each other (`hidden_size` is often heads times their width, a state-space layer's channels are a
multiple of it), so they are not chosen but divided: numbers of heads by one number, widths of heads by another, and every other
width by their product. What they had to do with each other then still holds. The first blocks are kept, as many as show every
kind, so that whatever a config says of a block by its number stays true.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from orchestrator.bases.own_code import class_named
from orchestrator.probe.classes import CAUSAL, NUM_CLASSES, Built, first_line
from orchestrator.probe.facts import HEAD_DIMS, HEADS, first_int, hidden_size, setting
from orchestrator.probe.structure import Structure, block_kinds, find_structure

LAYERS = re.compile(r"(num_|n_|encoder_|decoder_)*(hidden_)?layers?|depth|num_hidden_blocks")
HEAD_COUNT = re.compile(r".*heads?|.*_head_kv|n_head")
HEAD_WIDTH = re.compile(r".*head_dim|d_kv|.*d_head|.*head_size|qk_\w+_dim|rotary_dim|.*head_width")
WIDTH = re.compile(
    r".*(hidden|intermediate|inner|width|channels|_rank|_dim|d_model|d_ssm|d_inner|d_ff|n_embd|units|expand_size).*|dim|.*_size|ffn_.*|mlp_.*"
)
KEPT = re.compile(
    r".*(image|patch|kernel|conv|merge|type_vocab|vocab|chunk|window|block_size|state|token|position|group|batch|crop|tile|bits|"
    r"max_|pooling|downsample|scale).*"
)
"""Keys that look like widths and are none, or that a small model can keep."""
EXPERT_COUNT = re.compile(
    r"(num_|n_)?(local_|routed_)?experts|moe_num_experts|n_routed_experts|num_routed_experts|num_local_experts"
)
PER_TOKEN = re.compile(r"num_experts_per_tok(en)?|experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k|top_k")
WINDOW = re.compile(r".*(sliding_window|window_size|attention_window|attention_chunk_size|local_attention)")
SHARED = "num_kv_shared_layers"
"""Key of the number of last blocks that have no keys and values of their own (Gemma 3n and 4)."""
MOST_BLOCKS = 16
LEAST_WIDTH = 32
"""Smaller numbers are no widths: kernels, patches, sizes of states."""
MOST_PARAMETERS = 60_000_000
VOCABULARY, WINDOW_TOKENS, CHUNK_TOKENS, NUM_EXPERTS, NUM_GROUPS = 256, 4, 16, 4, 1


@dataclass(frozen=True)
class Divisors:
    """What sizes are divided by."""

    heads: int
    head_width: int

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class Tiny:
    """A small instance of a class, with weights in float32 on the CPU; or why there is none."""

    built: Built | None = None
    structure: Structure | None = None
    reason: str = ""


def instances(built: Built, structure: Structure) -> Iterator[Tiny]:
    """Yield small instances of a built class, the smallest first.

    Less is shrunk where a smaller config cannot be built or does not run: first the number of heads stays, then their width, then
    both. A wrapper is tried as its text model alone after that.
    """
    for config, name in _targets(built, structure):
        for divisors in _attempts(structure):
            try:
                model = _instance(_shrunk(config, structure, divisors), name)
                tiny = Built(model=model, config=model.config, kind=built.kind)
                yield Tiny(tiny, find_structure(tiny))
            except Exception as error:  # whatever a class of transformers says about sizes that do not fit
                yield Tiny(reason=first_line(error))


def _targets(built: Built, structure: Structure) -> Iterator[tuple[PreTrainedConfig, str]]:
    yield built.config, type(built.model).__name__
    text = CAUSAL.get(structure.config.model_type)
    if built.kind == "decoder" and structure.config is not built.config and text and not built.classifies:
        yield structure.config, text


def _attempts(structure: Structure) -> Iterator[Divisors]:
    heads = first_int(structure.config, HEADS, 1)
    width = first_int(structure.config, HEAD_DIMS, 0) or max(1, hidden_size(structure) // heads)
    fewer = next((heads // number for number in range(4, heads + 1) if heads % number == 0), 1)
    narrower = next((width // number for number in range(16, width + 1) if width % number == 0 and number % 8 == 0), 1)
    yield from dict.fromkeys((Divisors(fewer, narrower), Divisors(1, narrower), Divisors(fewer, 1), Divisors(1, 1)))


def _instance(config: PreTrainedConfig, name: str) -> Any:
    """Build a class with weights, in float32."""
    built = class_named(name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in built._from_config(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters with the smallest config that was found")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return built._from_config(config, dtype=torch.float32).eval()


def _shrunk(config: PreTrainedConfig, structure: Structure, divisors: Divisors) -> PreTrainedConfig:
    values: dict[str, Any] = config.to_dict()
    kinds = block_kinds(structure)
    shown = max((kinds.index(kind) for kind in set(kinds)), default=0) + 1
    blocks = min(len(kinds), MOST_BLOCKS, max(shown, 3))
    if sharing := setting(structure.config, SHARED):
        # As many again: the last ones take keys and values from the ones before, which must be of every kind too.
        blocks = min(len(kinds), 2 * max(shown, 2))
        sharing = blocks - max(shown, 2)
    small = _Shrinker(divisors, len(kinds), blocks, sharing if isinstance(sharing, int) else 0).mapping(values)
    small |= {"num_labels": NUM_CLASSES, "dtype": "float32", "torch_dtype": None, "architectures": None}
    small = {
        key: value for key, value in small.items() if key not in ("torch_dtype", "id2label", "label2id", "transformers_version")
    }
    return type(config).from_dict(small)


@dataclass(frozen=True)
class _Shrinker:
    """Sizes of a config, made smaller key by key."""

    divisors: Divisors
    num_blocks: int
    kept_blocks: int
    sharing_blocks: int
    """The last of the kept blocks that take keys and values from others."""

    def mapping(self, values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if not str(key).isdigit() or int(key) < self.kept_blocks}
        small = {key: self.value(str(key), value, values) for key, value in kept.items()}
        return _repaired(small)

    def value(self, key: str, value: Any, values: Mapping[str, Any]) -> Any:
        if isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            return self.factors(key, inner) if "rope" in key else self.mapping(inner)
        if isinstance(value, list):
            return self.sequence(key, cast("list[Any]", value), values)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        return self.number(key, value, values)

    def number(self, key: str, value: int, values: Mapping[str, Any]) -> int:
        """Return the smaller size of a whole number by the name of its key."""
        if key.endswith(("token_id", "token_index")):
            return min(value, VOCABULARY - 1) if value >= 0 else value
        if key == SHARED:
            return self.sharing_blocks
        if LAYERS.fullmatch(key):
            return self.kept_blocks if value == self.num_blocks else min(value, self.kept_blocks)
        if EXPERT_COUNT.fullmatch(key):
            return min(value, NUM_EXPERTS)
        if PER_TOKEN.fullmatch(key):
            return min(value, 2)
        if key in ("n_group", "topk_group", "num_expert_group"):
            return min(value, NUM_GROUPS)
        if key.endswith("n_groups"):
            return min(value, 2)
        if WINDOW.fullmatch(key):
            return min(value, WINDOW_TOKENS) if value > 0 else value
        if key.endswith("chunk_size"):
            return min(value, CHUNK_TOKENS)
        if "vocab_size" in key and value > VOCABULARY:
            return VOCABULARY
        if HEAD_COUNT.fullmatch(key):
            return _divided(value, self.divisors.heads, least=1)
        if HEAD_WIDTH.fullmatch(key):
            return _divided(value, self.divisors.head_width, least=2) if value >= 8 else value
        if WIDTH.fullmatch(key) and not KEPT.fullmatch(key) and value >= LEAST_WIDTH:
            return _divided(value, 8 * self.divisors.width, least=1) * 8  # kernels want rows of whole 16 bytes
        return value

    def sequence(self, key: str, value: list[Any], values: Mapping[str, Any]) -> list[Any]:
        """Return a list with as many entries as there are blocks now, or the numbers of blocks that are left."""
        if len(value) == self.num_blocks and self.num_blocks > 1:
            value = value[: self.kept_blocks]
        elif "layer" in key and value and all(isinstance(each, int) and each < self.num_blocks for each in value):
            value = [each for each in value if each < self.kept_blocks]
        if key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            return [min(each, VOCABULARY - 1) for each in value]
        return [self.value(key, each, values) if not isinstance(each, (str, list)) else each for each in value]

    def factors(self, key: str, rope: dict[str, Any]) -> dict[str, Any]:
        """Return options of rotary positions: one factor for each pair of channels of a head."""
        small: dict[str, Any] = {}
        for name, value in rope.items():
            if isinstance(value, dict):
                small[name] = self.factors(key, cast("dict[str, Any]", value))
            elif isinstance(value, list) and "factor" in name:
                factors = cast("list[float]", value)
                small[name] = factors[: max(1, len(factors) // self.divisors.head_width)]
            elif isinstance(value, list) and "section" in name:
                small[name] = _sections(cast("list[int]", value), self.divisors.head_width)
            else:
                small[name] = value
        return small


def _divided(value: int, divisor: int, *, least: int) -> int:
    """Return the quotient, rounded up."""
    return max(least, -(-value // divisor))


def _sections(sizes: list[int], divisor: int) -> list[int]:
    """Return smaller sections of a head's pairs of channels, which together are all of them."""
    smaller = [max(1, size // divisor) for size in sizes]
    return [*smaller[:-1], max(1, sum(sizes) // divisor - sum(smaller[:-1]))]


def _repaired(values: dict[str, Any]) -> dict[str, Any]:
    """Let numbers of key heads divide the number of heads again, and no token choose more experts than there are."""
    heads = next((values[key] for key in HEADS if isinstance(values.get(key), int)), None)
    for key in ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"):
        if heads and isinstance(found := values.get(key), int):
            values[key] = max(number for number in range(1, max(1, min(found, heads)) + 1) if heads % number == 0)
    return values
