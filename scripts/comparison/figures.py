"""The figures of a run folder, read as plain files, and their comparison to the last bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Figures = dict[str, str]
"""Name -> exact value, in the order of the run: what comes first explains what follows."""

STEP_FIELDS = ("step", "tokens", "supervised_tokens", "loss", "learning_rate", "grad_norm")
RESULT_FIELDS = (
    "state",
    "step",
    "tokens",
    "train_loss",
    "eval_loss",
    "metrics",
    "retain_loss",
    "retain_accuracy",
    "layer_scores",
)
ENGINE_FIELDS = ("executor", "zero_stage", "ranks", "trainable_parameters", "micro_batch_rows", "trunk_cut")
"""Fields of a trial's execution that affect its numbers. `fused_trials` is not one of them: gangs measure it, and a trial has
the same numbers batched or alone."""
TRANSFER_FIELDS = ("verdict", "trial_id", "comparisons", "scores")
LABELS = frozenset({"unit"})
"""Keys whose values are words beside a figure."""
RENAMED: dict[str, str] = {}
"""JSON key of a former version -> the present one, for keys above that were renamed on purpose."""


@dataclass(frozen=True)
class Difference:
    name: str
    before: str | None
    """None where the figure is missing on this side."""
    after: str | None

    def __str__(self) -> str:
        return f"{self.name}: {self.before or 'missing'} -> {self.after or 'missing'}"


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[Difference]:
    """Return every figure that is not the same on both sides, in the order of the run."""
    names = [*before, *(name for name in after if name not in before)]
    return [Difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def run_figures(run: Path) -> dict[str, Figures]:
    """Return the figures of a finished run, by part: `data`, one for each trial (`trial 0`, `head`), and `bundle`."""
    parts: dict[str, Figures] = {"data": dict(_data(run))}
    labels = {folder.name: trial_label(folder) for folder in sorted((run / "trials").iterdir())}
    for name, label in labels.items():
        parts[label] = {"id": name, **dict(_trial(run / "trials" / name))}
    refit = run / "refit"
    if refit.is_dir():
        refitted = labels[read_json(refit / "trial.json")["trial_id"]]
        parts[refitted].update({f"refit {name}": value for name, value in _trial(refit)})
    parts["bundle"] = dict(_bundle(run))
    return parts


def trial_label(folder: Path) -> str:
    """Return the name of a trial that does not depend on how ids are made: its control, or its number."""
    trial = read_json(folder / "trial.json")["trial"]
    return str(trial["control"] or f"trial {trial['number']}")


def results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of a trial, rung by rung."""
    return [read_json(file) for file in sorted(folder.glob("result*.json"))]


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"), object_hook=_renamed)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line, object_hook=_renamed) for line in file.read_text(encoding="utf-8").splitlines()]


def tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each tensor of a safetensors file with its dtype, its shape and the hash of its bytes.

    Metadata and the order of tensors in the file are left out.
    """
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:start])
    for name in sorted(header):
        if name != "__metadata__":
            first, last = header[name]["data_offsets"]
            yield name, f"{header[name]['dtype']} {header[name]['shape']} {_digest(content[start + first : start + last])}"


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in values.items()}


def _data(run: Path) -> Iterator[tuple[str, str]]:
    for file in sorted((run / "data").glob("*.npz")):
        yield from _arrays(file, file.stem)
    fisher = [digest for file in (run / "data" / "fisher").glob("*.safetensors") for _, digest in tensors(file)]
    yield from ((f"fisher tensor {number}", digest) for number, digest in enumerate(sorted(fisher)))


def _trial(folder: Path) -> Iterator[tuple[str, str]]:
    if (folder / "steps.jsonl").exists():
        for number, line in enumerate(read_jsonl(folder / "steps.jsonl"), start=1):
            yield from exact({field: line.get(field) for field in STEP_FIELDS}, f"step {number}")
    for rung, result in enumerate(results(folder)):
        engine = result.get("engine") or {}
        yield from exact({field: engine.get(field) for field in ENGINE_FIELDS}, f"rung {rung} engine")
        yield from exact({field: result.get(field) for field in RESULT_FIELDS}, f"rung {rung}")
    for file in sorted(folder.glob("*.npz")) + sorted(folder.glob("rung-*/*.npz")):
        yield from _arrays(file, str(file.relative_to(folder).with_suffix("")))
    for artifact in ("adapter", "delta"):
        for file in sorted(folder.glob(f"rung-*/{artifact}/*.safetensors")):
            yield from ((f"{file.relative_to(folder).parent} {name}", value) for name, value in tensors(file))


def _bundle(run: Path) -> Iterator[tuple[str, str]]:
    transfer = read_json(run / "transfer.json")
    yield from exact({field: transfer.get(field) for field in TRANSFER_FIELDS}, "transfer")
    for file in sorted((run / "test").glob("*.npz")):
        yield from _arrays(file, f"test {file.stem}")
    for file in sorted((run / "bundle").rglob("*.safetensors")):
        yield from ((f"{file.relative_to(run)} {name}", value) for name, value in tensors(file))


def _arrays(file: Path, prefix: str) -> Iterator[tuple[str, str]]:
    with np.load(file) as arrays:
        for name in sorted(arrays.files):
            array = arrays[name]
            yield f"{prefix} {name}", f"{array.dtype} {list(array.shape)} {_digest(np.ascontiguousarray(array).tobytes())}"


def exact(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield every number of a JSON value; floats in hex, so that the last bit shows."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        children = ((key, child) for key, child in value.items() if key not in LABELS)
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        yield name, value.hex() if isinstance(value, float) else json.dumps(value)
        return
    for key, child in children:
        yield from exact(child, f"{name} {key}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
