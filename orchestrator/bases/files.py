"""Which files of a repository a base needs: its weights as safetensors, its tokenizer, and small files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator.anatomy.reader import ADDED_TOKENS
from orchestrator.anatomy.weights import INDEX, PICKLES, SINGLE
from orchestrator.hub import Commit
from orchestrator.hub.errors import hub_error
from orchestrator.units import MIB

SIDE_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.vocab",
    "*.codes",
    "*.py",
    "*.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the repository's root: config, tokenizer, chat template, licence, card; code, which a spec may let run."""
SIDE_FOLDERS = ("additional_chat_templates/*.jinja", "[0-9]_*/config.json")
"""Patterns below it: named chat templates, and the pooling of sentence encoders."""
OTHER_FORMATS = ("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json", "*.fp16.*", "trainer_state.json")
LARGEST_SIDE_FILE = 64 * MIB
"""Tokenizers of 256,000 tokens take 35 MB."""
TOKENIZER_DATA = ("tokenizer.json", "vocab.json", "tekken.json")
"""JSON files that a plan does not read."""

TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
FAST_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*")
SLOW_TOKENIZER = ("vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes")
"""Files that a tokenizer is made from where there is no tokenizer.json."""


def side_files(sizes: Mapping[str, int]) -> list[str]:
    """Return the small files that are fetched beside the weights, by the sizes of all files."""
    return [name for name, size in sizes.items() if size <= LARGEST_SIDE_FILE and _is_side_file(name)]


def plan_files(sizes: Mapping[str, int]) -> list[str]:
    """Return the files that a plan reads besides the headers of the weights: code too, which the spec may let run."""
    return [name for name in side_files(sizes) if name.endswith((".json", ".py")) and name not in TOKENIZER_DATA]


def needed_files(names: Iterable[str]) -> list[str]:
    """Return which of the side files decide what a run computes: without a licence or a card it goes on where it cannot ask."""
    names = list(names)
    patterns = ("config.json", INDEX, *FAST_TOKENIZER, *SIDE_FOLDERS)
    return [name for name in names if _matches(name, patterns if "tokenizer.json" in names else (*patterns, *SLOW_TOKENIZER))]


def loaded_files(folder: Path, others: Iterable[str]) -> list[str]:
    """Return the files that a gang reads of a base's folder: config, tokenizer, and `others`: weights, and code that runs."""
    patterns = ("config.json", INDEX, ADDED_TOKENS, *TOKENIZER_PATTERNS)
    return [*sorted(path.name for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns)), *others]


def _is_side_file(name: str) -> bool:
    if "/" in name:
        return _matches(name, SIDE_FOLDERS)
    return _matches(name, SIDE_FILES) and (name == INDEX or not _matches(name, OTHER_FORMATS))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def weight_files(commit: Commit, sizes: Mapping[str, int], folder: Path) -> list[str]:
    """Return the safetensors files of the model.

    Args:
        sizes: Bytes of every file of the repository.
        folder: Has the index of the shards, if the repository has one.

    Raises:
        BaseError: the repository has no such files, or not all that its index names.
    """
    if SINGLE in sizes:
        return [SINGLE]
    shards = _shards_of(folder) if INDEX in sizes else []
    if shards and all(name in sizes for name in shards):
        return shards
    if shards:
        missing = [name for name in shards if name not in sizes]
        raise hub_error(
            commit.repository,
            f"{len(missing)} of the {len(shards)} shards that {INDEX} names are not in the repository: {', '.join(missing[:3])}",
            remedy="use another `base.revision`, or another repository of this model",
        )
    raise _no_safetensors(commit, sizes)


def _no_safetensors(commit: Commit, sizes: Mapping[str, int]) -> Exception:
    others = sorted(
        name for name in sizes if _matches(name, (*PICKLES, "*.gguf", "*.safetensors", "*.onnx", "*.h5", "*.msgpack"))
    )
    found = f"the weights that it has are {', '.join(others[:3])}" if others else "it has no weights at all"
    adapter = "adapter_config.json" in sizes
    return hub_error(
        commit.repository,
        "the repository holds a LoRA adapter, not a model" if adapter else f"the repository has no safetensors weights: {found}",
        expected=f"{SINGLE}, or shards with {INDEX}",
        remedy="give the model that the adapter was trained on"
        if adapter
        else "use a repository or a `base.revision` with safetensors: for many, a bot has opened a pull request with them, "
        "`revision: refs/pr/1` and the like; or convert a local copy where running its pickle code is safe",
    )


def _shards_of(folder: Path) -> list[str]:
    """Return the files that the index names; empty if there is no index that can be read."""
    try:
        index: Any = json.loads((folder / INDEX).read_bytes())
        return sorted({str(file) for file in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def is_complete(folder: Path) -> bool:
    """Return whether a folder has the config and all of its weights, whatever else it lacks."""
    shards = [SINGLE] if (folder / SINGLE).is_file() else _shards_of(folder)
    return (folder / "config.json").is_file() and bool(shards) and all((folder / name).is_file() for name in shards)
