"""Read what the plan needs to know of a model's parts: matrices, experts, norms, MLP, dropout, what follows the head."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from orchestrator.anatomy.layouts import DROPOUT_KEYS
from orchestrator.anatomy.selection import names_attention
from orchestrator.anatomy.values import Experts
from orchestrator.probe.structure import Structure

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "moe_top_k",
)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads")
HEAD_DIMS = ("head_dim", "attention_head_size", "d_kv", "qk_head_dim")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size")
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act", "dense_act_fn")
NO_LIMIT = 2**20
"""Positions of a model whose class names no limit: ALiBi and state-space models."""
RMS_BY_ANOTHER_NAME = re.compile(r"RMS|T5LayerNorm|SwitchTransformersLayerNorm")


def linears_of(structure: Structure, number: int) -> tuple[list[str], list[str]]:
    """Return the weights of a block's linear modules in the order of its modules, and those of them that are transposed."""
    names = set(structure.in_blocks[number])
    found: list[str] = []
    transposed: list[str] = []
    routers = set(routers_of(structure, number))
    for name, module in structure.blocks[number].named_modules():
        weight = f"{structure.blocks_module}.{number}.{name}.weight"
        if isinstance(module, (nn.Linear, Conv1D)) and weight in names and weight not in routers:
            found.append(weight)
            transposed += [weight] if isinstance(module, Conv1D) else []
    return found, transposed


def num_experts(structure: Structure) -> int:
    """Return the number of routed experts that the config gives; 0 if there are none."""
    return next((value for key in EXPERT_COUNTS if isinstance(value := setting(structure.config, key), int)), 0)


def stacked_of(structure: Structure, number: int) -> tuple[list[str], list[str]]:
    """Return the parameters [experts, ., .] of a block's routed experts, and those of them that are [experts, in, out].

    That is what the class declares: PEFT takes the parameters of one that declares nothing for [experts, out, in], whatever it
    does with them, and the two matrices of an adapter are named accordingly.
    """
    found: list[str] = []
    transposed: list[str] = []
    for name, module in _experts_modules(structure, number):
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                found.append(f"{name}.{own}")
                transposed += [f"{name}.{own}"] if getattr(module, "is_transposed", False) else []
    return found, transposed


def _experts_modules(structure: Structure, number: int) -> Iterator[tuple[str, nn.Module]]:
    experts = num_experts(structure)
    for name, module in structure.blocks[number].named_modules():
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        if experts and any(parameter.ndim == 3 and parameter.shape[0] == experts for parameter in own):
            yield f"{structure.blocks_module}.{number}.{name}", module


def routers_of(structure: Structure, number: int) -> list[str]:
    """Return the weights and biases of a block that choose its experts: those with a row for each, outside of the experts."""
    experts = num_experts(structure)
    if not experts:
        return []
    stacks = dict(_experts_modules(structure, number))
    block = f"{structure.blocks_module}.{number}"
    found: list[str] = []
    for name in structure.in_blocks[number]:
        owner = name.rpartition(".")[0]
        within = owner.removeprefix(block)
        parameter = structure.model.get_parameter(name)
        chooses = any(word in within for word in ("gate", "router")) or "correction" in name
        if owner not in stacks and chooses and parameter.shape[0] == experts:
            found.append(name)
    return found


def experts_of(structure: Structure) -> Experts | None:
    """Return the sizes of the mixture of experts, or None if no block has one."""
    for number in range(len(structure.blocks)):
        stacked, transposed = stacked_of(structure, number)
        if not stacked:
            continue
        down = next((name for name in stacked if "down" in name), stacked[-1])
        shape = structure.model.get_parameter(down).shape
        module = structure.model.get_submodule(down.rpartition(".")[0])
        shared = [
            module.in_features
            for name, module in structure.blocks[number].named_modules()
            if isinstance(module, nn.Linear) and "shared" in name and module.out_features == hidden_size(structure)
        ]
        return Experts(
            num_experts=shape[0],
            experts_per_token=first_int(structure.config, EXPERTS_PER_TOKEN, 1),
            intermediate_size=shape[1] if down in transposed else shape[2],
            shared_intermediate_size=max(shared, default=0),
            grouped=hasattr(module, "is_transposed"),
            balance=_balance_of(structure),
        )
    return None


def _balance_of(structure: Structure) -> float:
    """Return the factor of the load-balancing loss that the class adds with this config; 0 if it adds none."""
    config: Any = structure.config
    has_loss = hasattr(sys.modules[type(structure.model).__module__], "load_balancing_loss_func")
    factor = getattr(config, "router_aux_loss_coef", None)
    return float(factor) if has_loss and getattr(config, "output_router_logits", False) and factor else 0.0


def hidden_size(structure: Structure) -> int:
    """Return the width of the states between the blocks."""
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(value := setting(structure.config, key), int):
            return value
    weight: Any = getattr(structure.embedding, "weight", None)
    return int(weight.shape[1])


def setting(config: PreTrainedConfig, key: str) -> object:
    """Return a value of the config, None if it has none. One that varies over the layers is the largest of theirs."""
    try:
        return getattr(config, key, None)
    except Exception:  # transformers' AmbiguousGlobalPerLayerAttributeError is no AttributeError
        layers: Any = getattr(config, "per_layer_config", None)
        values = [getattr(layers[number], key, None) for number in range(len(layers))]
        return max((value for value in values if isinstance(value, (int, float))), default=None)


def first_int(config: PreTrainedConfig, keys: tuple[str, ...], otherwise: int) -> int:
    """Return the first of these values of a config that is a whole number above zero."""
    found = (setting(config, key) for key in keys)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), otherwise)


def heads_of(structure: Structure) -> tuple[int, int, int]:
    """Return the number of heads, of key-value heads, and the width of a head.

    The attention modules know best: a config may leave the number of key heads to a flag (Falcon's `multi_query`).
    """
    heads = first_int(structure.config, HEADS, 1)
    head_dim = first_int(structure.config, HEAD_DIMS, 0)
    kv_heads = first_int(structure.config, KV_HEADS, 0)
    for block in structure.blocks:
        for _, module in block.named_modules():
            for key in KV_HEADS:
                if isinstance(found := getattr(module, key, None), int) and found > 0:
                    kv_heads = found
            found = getattr(module, "head_dim", None)
            if isinstance(found, int) and found > 0 and not head_dim:
                head_dim = found
            projection = getattr(module, "k_proj", None)
            if isinstance(projection, nn.Linear) and head_dim and projection.out_features % head_dim == 0 and not kv_heads:
                kv_heads = projection.out_features // head_dim
        if kv_heads:
            break
    head_dim = head_dim or max(1, hidden_size(structure) // heads)
    return heads, kv_heads or heads, head_dim


def positions_of(structure: Structure) -> int:
    """Return the number of positions a document may have: as the config says, less those that a padded table never assigns."""
    number = first_int(structure.config, POSITIONS, NO_LIMIT)
    for name, module in structure.model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return min(number, module.num_embeddings - module.padding_idx - 1)
    return number


def intermediate_size(structure: Structure) -> int:
    """Return the width of the MLP of a dense block, as the config or else the largest matrix back to the hidden size says."""
    widths = (mlp_widths(structure, number)[1] for number in range(len(structure.blocks)))
    return first_int(structure.config, INTERMEDIATE, 0) or max(widths, default=0) or 4 * hidden_size(structure)


def mlp_widths(structure: Structure, number: int) -> tuple[int, int]:
    """Return how wide a block's dense MLP is before and after its nonlinearity: twice as wide before if it is gated.

    Its last matrix leads from a width back to the hidden size, the ones before it from the hidden size to that width, or to twice
    as much at once.
    """
    hidden = hidden_size(structure)
    shapes: list[tuple[int, ...]] = []
    for name, module in structure.blocks[number].named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not names_attention(name) and "expert" not in name:
            shape = tuple(module.weight.shape)
            shapes.append(shape if isinstance(module, nn.Linear) else shape[::-1])
    down = max((into for out, into in shapes if out == hidden), default=0)
    return sum(out for out, into in shapes if into == hidden and out in (down, 2 * down)), down


def mlp_of(structure: Structure) -> Literal["gated", "plain"]:
    for number in range(len(structure.blocks)):
        up, down = mlp_widths(structure, number)
        if down:
            return "gated" if up >= 2 * down else "plain"
        stacked, _ = stacked_of(structure, number)
        if stacked:
            return "gated"
    return "plain"


def activation_of(structure: Structure) -> str:
    """Return transformers' name of the MLP's nonlinearity: the config's, else that of the module in a block."""
    for key in ACTIVATIONS:
        if isinstance(value := setting(structure.config, key), str) and value in ACT2FN:
            return value
    by_type = {type(ACT2FN[name]): name for name in ("gelu", "gelu_new", "relu", "silu")}
    for module in structure.blocks[0].modules():
        if type(module) in by_type:
            return by_type[type(module)]
    return "silu" if mlp_of(structure) == "gated" else "gelu"


def norm_of(structure: Structure) -> Literal["rms", "layer"]:
    """Return the kind of most norms in the blocks, by their classes. T5's RMS norms are called T5LayerNorm."""
    counts = {"rms": 0, "layer": 0}
    for block in structure.blocks:
        for module in block.modules():
            name = type(module).__name__
            if "norm" in name.lower():
                plain = isinstance(module, nn.LayerNorm) or ("LayerNorm" in name and not RMS_BY_ANOTHER_NAME.search(name))
                counts["layer" if plain else "rms"] += 1
    return "layer" if counts["layer"] > counts["rms"] else "rms"


def dropout_of(structure: Structure) -> str:
    """Return the first rate of dropout above zero in embeddings or blocks, with its key; empty if there is none."""
    for key in DROPOUT_KEYS:
        if isinstance(rate := setting(structure.config, key), float) and rate > 0:
            return f"{key} {rate:g}"
    for number, block in enumerate(structure.blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                return f"{structure.blocks_module}.{number}.{name} {module.p:g}"
    return ""
