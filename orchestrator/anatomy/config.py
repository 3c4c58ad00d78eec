"""Read a base's config.json: reject what is unsupported, and derive the sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.encoded import refuse_undecodable
from orchestrator.anatomy.layouts import DROPOUT_KEYS, LAYOUTS, Layout, axis_size, trainable_layouts
from orchestrator.anatomy.odd import lone_adapter_error
from orchestrator.anatomy.values import Experts
from orchestrator.errors import BaseError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ADAPTER_CONFIG = "adapter_config.json"
COPY_AGAIN = "copy config.json from the base again"


class OtherLayoutError(Exception):
    """Raised where a row of the table does not describe the base; its class may."""

    def __init__(self, error: BaseError, config: BaseConfig | None = None) -> None:
        super().__init__(error.what)
        self.error = error
        """What the table says."""
        self.config = config
        """The config as the row reads it, if it does."""


@dataclass(frozen=True)
class BaseConfig:
    """A parsed config.json."""

    path: Path
    values: dict[str, Any]
    layout: Layout
    sizes: dict[str, int]
    """Size name -> number, with transformers' defaults."""
    flags: dict[str, object]
    tied: bool
    dtype: str
    """Dtype in safetensors' spelling."""
    activation: str
    sparse: frozenset[int]
    """Indices of the blocks with a mixture of experts."""
    dropout: str
    """First config key with a dropout rate above zero, with the rate; empty if there is none."""
    plan_only: str
    """Why this base cannot be trained; empty if it can."""

    @property
    def experts(self) -> Experts | None:
        """Mixture of experts of the sparse blocks, or None."""
        if not self.sparse:
            return None
        return Experts(
            num_experts=self.sizes["experts"],
            experts_per_token=self.sizes["experts_per_token"],
            intermediate_size=self.sizes["expert_intermediate"],
            shared_intermediate_size=self.sizes.get("shared_intermediate", 0),
            balance=balance_of(self.values, self.layout.defaults),
        )


def read_values(folder: Path) -> dict[str, Any]:
    """Read the keys of `folder`/config.json.

    Raises:
        BaseError: the folder or file is missing, or not JSON; its weights are quantized in a way that is not decoded.
    """
    path = folder / "config.json"
    values = _read_json(folder, path)
    refuse_undecodable(folder, values)
    return values


def read_config(folder: Path, values: dict[str, Any], layout: Layout) -> BaseConfig:
    """Interpret the config of a known layout.

    Raises:
        BaseError: a size is missing or makes no sense.
        OtherLayoutError: a key implies another layout.
    """
    path = folder / "config.json"
    merged = {**layout.defaults, **values}
    for key, value in layout.fixed.items():
        if key in values and values[key] != value:
            raise OtherLayoutError(
                BaseError(
                    f"{key} is {values[key]!r}",
                    where=str(path),
                    expected=f"{value!r}: with these tensors it is another layout",
                    remedy="use another base",
                )
            )
    sizes = _sizes(path, layout, values)
    activation = merged.get(layout.activation_key)
    if not isinstance(activation, str):
        raise BaseError(f"{layout.activation_key} is {activation!r}", where=str(path), expected="a name", remedy=COPY_AGAIN)
    reasons = [reason for key, reason in layout.plan_only_if.items() if merged.get(key) not in (None, False)]
    return BaseConfig(
        path=path,
        values=values,
        layout=layout,
        sizes=sizes,
        flags={key: value for key, value in merged.items() if isinstance(value, bool)},
        tied=_tied(path, merged["tie_word_embeddings"]),
        dtype=dtype_of(path, values),
        activation=activation,
        sparse=_sparse_blocks(path, layout, merged, sizes["blocks"]),
        dropout=_dropout(layout, values),
        plan_only=layout.plan_only or next(iter(reasons), ""),
    )


def balance_of(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> float:
    """Return the factor of the load-balancing loss; 0 unless the config turns it on."""
    factor = values.get("router_aux_loss_coef", defaults.get("router_aux_loss_coef"))
    return float(factor) if values.get("output_router_logits") is True and isinstance(factor, (int, float)) else 0.0


def _dropout(layout: Layout, values: dict[str, Any]) -> str:
    for key in DROPOUT_KEYS:
        rate = values.get(key, layout.dropout.get(key, 0.0))
        if isinstance(rate, float) and rate > 0:
            return f"{key} {rate:g}"
    return ""


def dtype_of(path: Path, values: dict[str, Any]) -> str:
    """Return the config's dtype in safetensors' spelling, float32 if it gives none."""
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise BaseError(f"dtype {dtype!r}", where=str(path), expected=" | ".join(DTYPES), remedy="convert the weights")
    return DTYPES[dtype]


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise BaseError(
            what, where=str(folder), expected="a folder with config.json and safetensors weights", remedy="fix `base.model`"
        )
    if not path.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise lone_adapter_error(folder, _read_if_valid(folder / ADAPTER_CONFIG))
        raise BaseError(
            "config.json is missing",
            where=str(folder),
            expected="a folder as `save_pretrained` writes it",
            remedy="fix `base.model`, or copy the base again",
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise BaseError(f"not valid JSON: {error}", where=str(path), remedy="copy config.json from the base again") from None
    if not isinstance(values, dict):
        raise BaseError("the file does not hold a JSON object", where=str(path), remedy="copy config.json from the base again")
    return cast("dict[str, Any]", values)


def _read_if_valid(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def find_layout(values: dict[str, Any]) -> Layout | None:
    """Return the layout of the config's model type, or None if the table does not have it."""
    model_type = values.get("model_type")
    return LAYOUTS.get(model_type) if isinstance(model_type, str) else None


def plan_only_error(path: Path, model_type: str, reason: str) -> BaseError:
    """Return the error for a base that can be planned for but not trained."""
    return BaseError(
        f"a base of model_type {model_type!r} can be planned for, not trained: {reason}",
        where=str(path),
        expected=f"to train, a base of one of {', '.join(trainable_layouts())}",
        remedy="use a base of such a layout; `orchestrator plan` works with this one",
    )


def whole_number(path: Path, key: str, value: object) -> int:
    """Return a config value that must be a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BaseError(
            f"{key} is {value!r}",
            where=str(path),
            expected="a whole number of at least 1",
            remedy=COPY_AGAIN,
        )
    return value


def _tied(path: Path, value: object) -> bool:
    if not isinstance(value, bool):
        raise BaseError(f"tie_word_embeddings is {value!r}", where=str(path), expected="true or false", remedy=COPY_AGAIN)
    return value


def _sizes(path: Path, layout: Layout, values: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    missing: dict[str, str] = {}
    for size, keys in layout.keys.items():
        key = next((key for key in keys if key in values), keys[0])
        value = values[key] if key in values else layout.defaults.get(key)
        if value is None:
            missing[size] = key
        else:
            sizes[size] = whole_number(path, key, value)
    for size, key in missing.items():
        if size not in layout.otherwise and size != "head_dim":
            raise BaseError(f"{key} is missing", where=str(path), remedy=COPY_AGAIN)
    for size, expression in layout.otherwise.items():
        sizes.setdefault(size, axis_size(expression, sizes))
    if "head_dim" not in sizes and sizes["hidden"] % sizes["heads"]:
        raise BaseError(
            f"{sizes['heads']} attention heads do not divide a hidden size of {sizes['hidden']}",
            where=str(path),
            expected="num_attention_heads that divides hidden_size, or head_dim",
            remedy=COPY_AGAIN,
        )
    sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    if sizes["heads"] % sizes["kv_heads"]:
        raise BaseError(
            f"{sizes['kv_heads']} key-value heads for {sizes['heads']} attention heads",
            where=str(path),
            expected="num_key_value_heads that divides num_attention_heads",
            remedy=COPY_AGAIN,
        )
    if sizes.get("experts_per_token", 0) > sizes.get("experts", math.inf):
        raise BaseError(
            f"{sizes['experts_per_token']} experts a token, of {sizes['experts']}",
            where=str(path),
            expected=f"at most {sizes['experts']} experts a token",
            remedy=COPY_AGAIN,
        )
    if sizes.get("embedding", sizes["hidden"]) != sizes["hidden"]:
        raise OtherLayoutError(
            BaseError(
                f"embeddings of {sizes['embedding']} in a model of hidden size {sizes['hidden']}",
                where=str(path),
                expected="embeddings as wide as the model, without projections between them",
                remedy="use another size of this model",
            )
        )
    if "patch" in sizes:
        sizes["positions"] = 1 + (sizes["image"] // sizes["patch"]) ** 2
    return sizes


def _sparse_blocks(path: Path, layout: Layout, merged: dict[str, Any], num_blocks: int) -> frozenset[int]:
    """Return the blocks with experts: every `decoder_sparse_step`-th, except those in `mlp_only_layers` (transformers,
    Qwen2-MoE)."""
    if not layout.sparse_block:
        return frozenset()
    step = whole_number(path, "decoder_sparse_step", merged["decoder_sparse_step"])
    dense = merged["mlp_only_layers"] or ()
    if not isinstance(dense, (list, tuple)):
        raise BaseError(f"mlp_only_layers is {dense!r}", where=str(path), expected="a list of block numbers", remedy=COPY_AGAIN)
    return frozenset(number for number in range(num_blocks) if number not in dense and (number + 1) % step == 0)
