"""What is asked of the process that builds a class (`orchestrator.probe`), and what it answers."""

from __future__ import annotations

from typing import Literal

from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.spec.tasks import HeadKind
from orchestrator.values import Value


class Question(Value):
    """A base whose class is to be built."""

    folder: str
    """Absolute path of the folder with config.json."""
    head: HeadKind
    """The kind of head that the task trains with: decides which class is loaded."""
    code_sha256: str = ""
    """Hash of the code in the folder that may run; empty for none."""
    stored: tuple[TensorInfo, ...] | None = None
    """The stored tensors, named as in the files; None if only the config is known."""


class Refusal(Value):
    """Why the class cannot be built, or does not fit the stored tensors."""

    kind: Literal["unknown_type", "no_class", "config", "structure", "weights"]
    what: str
    where: str = ""
    expected: str = ""
    remedy: str = ""
    known_types: tuple[str, ...] = ()
    """The model types that transformers has, for `unknown_type`."""


class Answer(Value):
    """The anatomy as the class shows it, with an empty `folder`; or the reason that there is none."""

    anatomy: ModelAnatomy | None = None
    refusal: Refusal | None = None
