"""Run the code that comes with a base, where the spec pins it: the only place that imports such code.

`use_own_code` copies the code into a folder of this process, hashes the copy, imports it from there, and registers its classes
with transformers. Every other call of transformers keeps `trust_remote_code=False`: it finds the registered classes, and never
code in a folder.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.anatomy.own_code import approve, approved_code, code_files, code_sha256
from orchestrator.errors import BaseError, UsageError
from orchestrator.spec.models import BaseSpec

COMMIT = re.compile(r"[0-9a-f]{40}")
CAUSAL = "AutoModelForCausalLM"
CONSENT = "ORCHESTRATOR_TRUST_CODE"
"""Environment variable: the hash of code in a bundle that may run. A bundle's own manifest cannot say so."""

_classes: dict[str, Any] = {}
"""Classes of models in code that this process runs, by name."""
_models: dict[str, str] = {}
"""Name of the language model of each model type that such code defines."""


def class_named(name: str) -> Any:
    """Return a class of a model: of the base's own code if it is run, else of transformers."""
    import transformers

    return _classes.get(name) or getattr(transformers, name)


def own_model(model_type: str) -> str:
    """Return the name of the language model that a base's own code has for a type; empty if none is run for it."""
    return _models.get(model_type, "")


def require_pin(base: BaseSpec) -> None:
    """Check that a base of the hub whose code may run is pinned to a commit.

    Raises:
        BaseError: it is not.
    """
    if base.trust_remote_code and not COMMIT.fullmatch(base.revision or ""):
        raise BaseError(
            "code of a model on the hub runs from one commit only",
            where=f"base.revision: {base.revision or 'not given'}",
            expected="a full commit, 40 hexadecimal digits",
            remedy="write the commit whose code you have read as `base.revision`; or remove `base.trust_remote_code`",
        )


def use_pinned_code(base: BaseSpec, folder: Path, *, pinned_by_commit: bool) -> None:
    """Run the code in a base's folder if the spec says so, its type needs it, and it is what the spec pins.

    Args:
        folder: Has config.json and the code.
        pinned_by_commit: True for a commit of the hub, which pins the code without `base.code_sha256`.

    Raises:
        BaseError: it is not pinned, or another than that; or it cannot be imported.
    """
    if not base.trust_remote_code or not _needs_code(folder):
        return
    found = code_sha256(folder)
    if base.code_sha256 is None and not pinned_by_commit:
        raise BaseError(
            "the code that comes with the base is not pinned",
            where=str(folder),
            expected="`base.code_sha256`, the hash of the code that may run",
            remedy=f"read {_named(folder)}, then write `code_sha256: {found}` beside `base.trust_remote_code`",
        )
    use_own_code(folder, base.code_sha256 or found)


def require_consent(folder: Path, sha256: str) -> None:
    """Check that the user lets the code in a bundle run: a manifest alone would let whoever made the bundle decide that.

    Raises:
        UsageError: the environment does not say so.
    """
    if sha256 and os.environ.get(CONSENT) != sha256:
        raise UsageError(
            "the bundle brings code that must run to load it",
            where=str(folder),
            expected=f"{CONSENT}={sha256} in the environment",
            remedy=f"read {_named(folder)}, then run the command again with this variable",
        )


def use_own_code(folder: Path, sha256: str) -> None:
    """Import a folder's code and register its classes with transformers. Nothing is imported for a type that transformers has.

    Raises:
        BaseError: it is not the code with this hash; nothing of it has run. Or it cannot be imported.
    """
    if not sha256 or approved_code(folder) == sha256 or not _needs_code(folder):
        return
    copy = _private_copy(folder)
    require_code(copy, sha256, where=folder)
    try:
        _register(copy, folder)
    except Exception as error:  # whatever foreign code raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BaseError(
            f"the base's own code cannot be used: {first}",
            where=str(folder),
            expected=f"an auto_map with {CAUSAL} in files beside config.json",
            remedy="check that the installed transformers is the one that the code was written for",
        ) from error
    approve(sha256)


def require_code(folder: Path, sha256: str, *, where: Path | None = None) -> None:
    """Check that a folder has the code with this hash, if any may run.

    Args:
        where: The folder to name in the error, where `folder` is a copy.

    Raises:
        BaseError: it has other code, or none.
    """
    found = code_sha256(folder) if sha256 else ""
    if found != sha256:
        where = where or folder
        raise BaseError(
            f"the code that comes with the base has the hash {found or '(there is no code)'}",
            where=str(where),
            expected=f"{sha256}, as pinned; nothing of it was run",
            remedy=f"restore the code that was pinned; or read {_named(where)}, and pin the new hash as `base.code_sha256`",
        )


def is_native(model_type: object) -> bool:
    """Return whether transformers itself has a model type; one that a base's own code registered does not count."""
    from transformers.models.auto import configuration_auto

    return model_type in vars(configuration_auto)["CONFIG_MAPPING_NAMES"]


def _needs_code(folder: Path) -> bool:
    """Return whether a base is of a type that transformers does not have, and says which code has it."""
    try:
        values: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # reading the base says why
    return isinstance(values, dict) and not is_native(values.get("model_type")) and bool(values.get("auto_map"))


def _private_copy(folder: Path) -> Path:
    """Copy the code into a new folder of this process: what is hashed is what is imported, and ranks share no cache."""
    copy = Path(tempfile.mkdtemp(prefix="code_", dir=_process_folder()))
    for file in code_files(folder):
        shutil.copyfile(file, copy / file.name)
    return copy


@cache
def _process_folder() -> Path:
    """Return a folder of this process, in which transformers keeps the modules that it imports, too."""
    from transformers import dynamic_module_utils

    private = Path(tempfile.mkdtemp(prefix="orchestrator-code-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(private / "modules"))  # noqa: B010 (read there, not exported)
    return private


def _register(copy: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    values: Any = json.loads((folder / "config.json").read_bytes())
    model_type = str(values["model_type"])
    for reference in values["auto_map"].values():
        if "--" in str(reference):
            raise ValueError(f"{reference} is in another repository, which nothing pins")
    model = _imported(values["auto_map"][CAUSAL], copy)
    # Not `AutoConfig` of the auto_map, which transformers would import a second time, as another class.
    config = model.config_class
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    slow, fast = (_imported(reference, copy) if reference else None for reference in _tokenizers(folder))
    if slow or fast:
        AutoTokenizer.register(config, slow_tokenizer_class=slow, fast_tokenizer_class=fast, exist_ok=True)
    _classes[model.__name__] = model
    _models[model_type] = model.__name__


def _tokenizers(folder: Path) -> tuple[str | None, str | None]:
    """Return what the tokenizer's config names as its slow and fast class; None for none."""
    file = folder / "tokenizer_config.json"
    named: Any = json.loads(file.read_bytes()).get("auto_map") if file.is_file() else None
    if isinstance(named, dict):
        named = named.get("AutoTokenizer")
    slow, fast = [*(named or ()), None, None][:2] if isinstance(named, list | None) else (named, None)
    return slow, fast


def _imported(reference: str, copy: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if "--" in reference:
        raise ValueError(f"{reference} is in another repository, which nothing pins")
    return get_class_from_dynamic_module(reference, copy, local_files_only=True)


def _named(folder: Path) -> str:
    names = [file.name for file in code_files(folder)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more files" if len(names) > 4 else "")
