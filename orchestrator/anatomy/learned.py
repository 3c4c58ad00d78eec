"""Learn the anatomy of a base from its transformers class, in a process of its own that may import torch."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.anatomy.learning import Answer, Question, Refusal
from orchestrator.anatomy.learning_cache import key_of, locked, recall, remember
from orchestrator.anatomy.own_code import approved_code, code_sha256
from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.errors import BaseError
from orchestrator.spec.tasks import TASKS, Task
from orchestrator.values import content_hash

SECONDS = 600
"""Longest time that a class may take to be built."""
OWN_CODE = "use a base of a type that transformers has, or a newer transformers; or read its code, and pin it to let it run"


class NotLearnedError(BaseError):
    """The class does not tell what the base consists of."""

    kind: str = ""
    """Why not, as a `Refusal` has it."""


def learn(folder: Path, values: dict[str, Any], stored: Mapping[str, TensorInfo] | None, *, task: Task) -> ModelAnatomy:
    """Return the anatomy of a base as its transformers class shows it.

    What was learned before is read from the user's cache. Otherwise `orchestrator.probe` builds the class, once for all processes
    of this machine that ask at the same time.

    Args:
        folder: Absolute path of the base's folder.
        values: Its config.json.
        stored: Its stored tensors by stored name; None if only the config is known.
        task: Decides which class is loaded.

    Raises:
        NotLearnedError: transformers does not have the model type, or no class for the task; the class cannot be built with this
            config; its blocks are not in one list; the stored tensors are not its parameters.
        BaseError: the process fails.
    """
    head = TASKS[task].head.kind
    code = approved_code(folder)
    key = key_of(values, stored, head, code)
    answer = recall(key)
    if answer is None:
        with locked(key):
            answer = recall(key)  # by the process that had the lock before
            if answer is None:
                tensors = None if stored is None else tuple(stored.values())
                answer = ask(Question(folder=str(folder), head=head, stored=tensors, code_sha256=code))
                remember(key, answer)
    if answer.anatomy is None:
        raise _error(folder, values, answer.refusal)
    return answer.anatomy.model_copy(update={"folder": str(folder), "config_sha256": content_hash(values)})


def ask(question: Question) -> Answer:
    """Start the process that builds the class, and return what it answers.

    Raises:
        BaseError: it fails.
    """
    with tempfile.TemporaryDirectory(prefix="orchestrator-probe-") as scratch:
        asked, answered = Path(scratch) / "question.json", Path(scratch) / "answer.json"
        asked.write_text(question.model_dump_json(exclude_defaults=True))
        command = [sys.executable, "-m", "orchestrator.probe", str(asked), str(answered)]
        try:
            done = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise _failed(question, f"it took longer than {SECONDS} s") from None
        if done.returncode or not answered.is_file():
            lines = done.stderr.strip().splitlines()
            raise _failed(question, lines[-1] if lines else f"exit code {done.returncode}")
        return Answer.model_validate_json(answered.read_bytes())


def _environment() -> dict[str, str]:
    """Return the environment of the process: one thread, no network, no GPU, this package."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "PYTHONPATH": path}


def _failed(question: Question, why: str) -> BaseError:
    return BaseError(
        f"its transformers class could not be looked at: {why}",
        where=question.folder,
        expected="`python -m orchestrator.probe` to build the class without weights",
        remedy="check the installation of torch and transformers; if they work, this is a bug in orchestrator: please report it",
    )


def _error(folder: Path, values: dict[str, Any], refusal: Refusal | None) -> NotLearnedError:
    assert refusal is not None
    where = refusal.where or str(folder / "config.json")
    if refusal.kind == "unknown_type":
        error = _unknown_type(where, values, refusal.known_types)
    else:
        error = NotLearnedError(refusal.what, where=where, expected=refusal.expected, remedy=refusal.remedy or "use another base")
    error.kind = refusal.kind
    return error


def _unknown_type(where: str, values: dict[str, Any], known: tuple[str, ...]) -> NotLearnedError:
    """Return the error for a model type that transformers does not have."""
    model_type = values.get("model_type")
    found = "model_type is missing" if model_type is None else f"unknown layout: model_type {model_type!r}"
    near = difflib.get_close_matches(str(model_type).lower(), known, n=3, cutoff=0.6)
    if "auto_map" in values:
        code = code_sha256(Path(where).parent)
        pin = f": `trust_remote_code: true` and `code_sha256: {code}` under `base`, or for a hub id a full commit as `revision`"
        found, remedy = (
            f"{found}, and the base comes with its own code (auto_map), which is not run",
            OWN_CODE + (pin if code else ""),
        )
    else:
        remedy = f"did you mean {' or '.join(near)}?" if near else "use a base of a type that the installed transformers has"
    return NotLearnedError(found, where=where, expected=f"one of the {len(known)} types that transformers has", remedy=remedy)
