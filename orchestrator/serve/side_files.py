"""The base's files besides config and weights: every small one comes along in the bundle, unless it is known to be stale.

A base brings files that nobody can list in advance: tokenizers of other libraries (tekken.json), licences and notices that must
be passed on, processor configs, the modules of a sentence encoder. So the rule is by exclusion, and what stays behind is recorded
with the reason (`BundleRecord.left_out`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from orchestrator.anatomy.own_code import code_files
from orchestrator.units import MIB, format_bytes
from orchestrator.values import Value

MAX_BYTES = 64 * MIB
"""Largest side file that is copied. The largest tokenizers have about 35 MB."""
UNLIMITED = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken*")
"""Files that a tokenizer cannot be loaded without: copied whatever their size."""
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot", "*.npz"),
    *("*.onnx", "*.onnx_data*", "*.tflite", "*.mlmodel", "*.mlpackage", "*.nemo", "*.distcp", "*.llamafile"),
)
STALE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hidden", (".*",)),
    ("the bundle has its own", ("README*", "modelcard.json", "manifest.json", "spec.json", "adapter", "delta")),
    (
        "may hold a secret",
        ("*.pem", "*.key", "token", "token.*", "*[-_]token", "*[-_]token.*", "*secret*", "*credential*", "*password*"),
    ),
    ("weights of the base", (*WEIGHTS, "*.index.json")),
    ("adapter of the base", ("adapter_*",)),
    (
        "quantization of the base",
        ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"),
    ),
    (
        "records of another training",
        (
            *("optimizer*", "scheduler*", "training_args*", "trainer_state*", "trainer_log*", "rng_state*", "random_states*"),
            *("*_results.*", "events.out.tfevents*", "latest", "zero_to_fp32.py", "global_step*", "checkpoint-*"),
        ),
    ),
    ("data or log", ("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.log", "*.ipynb", "*.sh", "*.zip", "*.gz", "*.tar")),
    ("picture of the base's model card", ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4")),
    ("folder of caches or logs", ("__pycache__", "runs", "logs", "wandb", "mlruns")),
)
"""Reason, and patterns of lower-case names (of files and of folders) that are left out for it."""
CODE = "*.py"
NO_CODE = "code that no configuration of the bundle names"
GENERATION = "generation_config.json"
NOT_GENERATING = "a classifier generates nothing"
MODULES = "modules.json"


class LeftOut(Value):
    """A file or folder of the base that is not in the bundle."""

    path: str
    """Relative to the base's folder; a folder ends with a slash."""
    reason: str


def copy_side_files(base: Path, folder: Path, *, generates: bool, replaced: Iterable[str] = ()) -> tuple[LeftOut, ...]:
    """Copy the base's side files into the bundle's folder, and those of its subfolders.

    Symbolic links are followed: a snapshot of the hub's cache consists of links. A file that cannot be read is left out.

    Args:
        base: The base's folder.
        folder: The bundle's folder. Its config.json is written already.
        generates: Whether the model generates text.
        replaced: Files of the base's folder that the bundle has in another form (config, merged weights); they are not listed.

    Returns:
        What was left out, by path.

    Raises:
        OSError: the bundle's folder cannot be written to.
    """
    absent = frozenset(replaced)
    copied = (file for file in base.glob("*.json") if file.name not in absent and not _stale(file.name))
    # Of config.json the bundle's counts: the base's may name code that the bundle does not need.
    has_code = any(_json_object(file).get("auto_map") for file in (folder / "config.json", *copied))
    found = _Sorting(base, generates, absent, has_code)
    left_out = ((path, reason or _copy(base / path, folder / path)) for path, reason in found.entries())
    return tuple(LeftOut(path=path, reason=reason) for path, reason in left_out if reason)


def copy_code(base: Path, folder: Path, left_out: tuple[LeftOut, ...]) -> tuple[LeftOut, ...]:
    """Copy what is missing of the base's own code, so that the bundle's has the hash that was pinned; return what is still left
    out."""
    missing = [file for file in code_files(base) if not (folder / file.name).exists()]
    for file in missing:
        shutil.copyfile(file, folder / file.name)
    return tuple(each for each in left_out if each.path not in {file.name for file in missing})


@dataclass(frozen=True)
class _Sorting:
    """Decides about every file of the base's folder."""

    base: Path
    generates: bool
    replaced: frozenset[str]
    has_code: bool

    def entries(self) -> Iterator[tuple[str, str]]:
        """Return (path, reason why it is left out; empty if it is copied) of each file, or of a folder left out whole."""
        whole = _module_folders(self.base)
        for entry in sorted(self.base.iterdir()):
            if entry.name in self.replaced:
                continue
            if not entry.is_dir():
                yield entry.name, self._reason(entry)
                continue
            reason = _stale(entry.name)
            inside = [] if reason else _listed(entry)
            if any(_matches(file.name, WEIGHTS) for file in inside) and entry.name not in whole:
                reason = "another model, or another format of the base's weights"
            if reason or not inside:
                yield f"{entry.name}/", reason or "empty, or cannot be read"
            else:
                yield from self._of_subfolder(entry, inside, has_weights=entry.name in whole)

    def _of_subfolder(self, folder: Path, inside: Sequence[Path], *, has_weights: bool) -> Iterator[tuple[str, str]]:
        for file in inside:
            if file.is_dir():
                yield f"{folder.name}/{file.name}/", "below the first level of subfolders"
            elif has_weights and _matches(file.name, WEIGHTS):
                yield f"{folder.name}/{file.name}", self._size(file)
            else:
                yield f"{folder.name}/{file.name}", self._reason(file)

    def _reason(self, file: Path) -> str:
        if not self.generates and file.name == GENERATION:
            return NOT_GENERATING
        if not self.has_code and _matches(file.name, (CODE,)):
            return NO_CODE
        return _stale(file.name) or self._size(file)

    def _size(self, file: Path) -> str:
        if not file.is_file():
            return "broken link" if file.is_symlink() else "not a regular file"
        size = file.stat().st_size
        if size > MAX_BYTES and not _matches(file.name, UNLIMITED):
            return f"{format_bytes(size)}, more than {format_bytes(MAX_BYTES)}"
        return ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _stale(name: str) -> str:
    """Return why a file or folder of this name is left out; empty if it is not."""
    return next((reason for reason, patterns in STALE if _matches(name, patterns)), "")


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _copy(source: Path, target: Path) -> str:
    """Copy a file's bytes (links are followed, modes are not kept); return why it could not be read, or an empty string."""
    try:
        content = source.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    return ""


def _module_folders(base: Path) -> frozenset[str]:
    """Return the subfolders that a sentence encoder's modules.json names. Their weights (a projection after pooling) are not
    trained here, so they stay valid."""
    file = base / MODULES
    try:
        modules = json.loads(file.read_bytes())
        return frozenset(module["path"] for module in modules if module["path"] and os.sep not in module["path"])
    except (OSError, ValueError, TypeError, KeyError):
        return frozenset()


def _json_object(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
