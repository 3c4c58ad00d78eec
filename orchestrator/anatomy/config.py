"""config.json of a base: what is refused, and the sizes that follow from it."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.layouts import LAYOUTS, Layout, known_layouts
from orchestrator.errors import BaseError

REQUIRED_SIZES = ("vocab", "hidden", "intermediate", "blocks", "heads")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class BaseConfig:
    """A config.json that was understood."""

    path: Path
    values: dict[str, Any]
    layout: Layout
    sizes: dict[str, int]
    """Size name -> number, defaults filled in as transformers does."""
    flags: dict[str, object]
    tied: bool
    dtype: str
    """safetensors spelling."""


def read_config(folder: Path) -> BaseConfig:
    """Read and judge `folder`/config.json.

    Raises:
        BaseError: the folder or file is missing, no JSON, of an unknown layout, or a size is missing or makes no
            sense; the base would run its own code; its weights are quantized already.
    """
    path = folder / "config.json"
    values = _read_json(folder, path)
    _refuse_remote_code(folder, values)
    if "quantization_config" in values:
        method = cast("dict[str, Any]", values["quantization_config"] or {}).get("quant_method", "unknown")
        raise BaseError(
            f"the base is quantized already (quantization_config, method {method!r})",
            where=str(path),
            expected="16-bit or 32-bit weights",
            remedy="give the original weights and let `base.quantize: nf4` quantize them in memory",
        )
    layout = _find_layout(path, values)
    merged = {**layout.defaults, **values}
    sizes = _sizes(path, layout, merged)
    dtype = merged.get("dtype") or merged.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise BaseError(f"dtype {dtype!r}", where=str(path), expected=" | ".join(DTYPES), remedy="convert the weights")
    return BaseConfig(
        path=path,
        values=values,
        layout=layout,
        sizes=sizes,
        flags={key: value for key, value in merged.items() if isinstance(value, bool)},
        tied=bool(merged["tie_word_embeddings"]),
        dtype=DTYPES[dtype],
    )


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise BaseError(
            what, where=str(folder), expected="a folder with config.json and safetensors weights", remedy="mend `base.model`"
        )
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise BaseError(
            "the folder holds a LoRA adapter, not a model" if adapter else "config.json is missing",
            where=str(folder),
            expected="a folder as `save_pretrained` writes it",
            remedy="merge the adapter into its base first" if adapter else "mend `base.model`, or copy the base again",
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise BaseError(f"no valid JSON: {error}", where=str(path), remedy="copy config.json from the base again") from None
    if not isinstance(values, dict):
        raise BaseError("the file holds no JSON object", where=str(path), remedy="copy config.json from the base again")
    return cast("dict[str, Any]", values)


def _refuse_remote_code(folder: Path, values: dict[str, Any]) -> None:
    tokenizer = folder / "tokenizer_config.json"
    where = folder / "config.json" if "auto_map" in values else None
    if where is None and tokenizer.is_file() and b'"auto_map"' in tokenizer.read_bytes():
        where = tokenizer
    if where is not None:
        raise BaseError(
            "the base brings its own code (auto_map)",
            where=str(where),
            expected=f"a layout that transformers itself knows: {', '.join(known_layouts())}",
            remedy="remote code is never run; take a base of a known layout",
        )


def _find_layout(path: Path, values: dict[str, Any]) -> Layout:
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in LAYOUTS:
        return LAYOUTS[model_type]
    found = "model_type is missing" if model_type is None else f"unknown layout: model_type {model_type!r}"
    near = difflib.get_close_matches(str(model_type).lower(), known_layouts(), n=3, cutoff=0.5)
    raise BaseError(
        found,
        where=str(path),
        expected=f"one of {', '.join(known_layouts())}",
        remedy=f"did you mean {' or '.join(near)}?" if near else "take a base of a known layout",
    )


def _sizes(path: Path, layout: Layout, merged: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for size, key in layout.keys.items():
        value = merged.get(key)
        if value is None:
            if size in REQUIRED_SIZES:
                raise BaseError(f"{key} is missing", where=str(path), remedy="copy config.json from the base again")
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BaseError(
                f"{key} is {value!r}",
                where=str(path),
                expected="a whole number of at least 1",
                remedy="copy config.json from the base again",
            )
        sizes[size] = value
    sizes.setdefault("kv_heads", sizes["heads"])
    if "head_dim" not in sizes and sizes["hidden"] % sizes["heads"]:
        raise BaseError(
            f"{sizes['heads']} attention heads do not divide a hidden size of {sizes['hidden']}",
            where=str(path),
            expected="num_attention_heads that divides hidden_size, or head_dim",
            remedy="copy config.json from the base again",
        )
    sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    return sizes
