"""Read the stored tensors of a base's folder: one safetensors file, or shards with their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.headers import read_header
from orchestrator.anatomy.values import TensorInfo
from orchestrator.errors import BaseError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_weights(folder: Path) -> dict[str, TensorInfo] | None:
    """Return the stored tensors by stored name, or None if the folder has no weights at all.

    Raises:
        BaseError: pickles, a broken or missing index, a missing or damaged file.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise BaseError(
            f"the only weights are pickles ({', '.join(pickles[:3])}), and pickle weights can run code when loaded",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            remedy="convert to safetensors in a place where running that code is safe (`save_pretrained` writes safetensors)",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise BaseError(
            f"safetensors files without {INDEX}: {', '.join(others[:3])}",
            where=str(folder),
            expected=f"one {SINGLE}, or shards with {INDEX}",
            remedy=f"copy {INDEX} from the base too",
        )
    return None


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    try:
        weight_map = cast("dict[str, Any]", json.loads(index.read_bytes()))["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BaseError("not a valid index: `weight_map` is missing", where=str(index), remedy="copy the index again") from None
    files = sorted(set(places.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise BaseError(f"a shard outside the folder: {outside[0]}", where=str(index), remedy="copy the index again")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise BaseError(
            f"{len(missing)} of {len(files)} shards missing: {', '.join(missing[:3])}",
            where=str(folder),
            remedy="copy the missing shards into the folder",
        )
    headers = {file: read_header(folder / file) for file in files}
    for name, file in places.items():
        if name not in headers[file]:
            raise BaseError(f"{name} is not in {file}, where the index puts it", where=str(index), remedy="copy the base again")
    return {name: headers[file][name] for name, file in places.items()}
