"""Find the transformers class of a base and build it on the meta device: every shape, and no memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from orchestrator.anatomy.learning import Refusal
from orchestrator.bases.own_code import class_named, own_model
from orchestrator.spec.tasks import HeadKind

NUM_CLASSES = 3
Kind = Literal["decoder", "encoder", "encoder_decoder"]


def _class_names(task: str) -> dict[str, str]:
    """Return transformers' class for each model type, for a task by the name that it has there."""
    return dict(vars(modeling_auto)[f"MODEL_FOR_{task}_MAPPING_NAMES"])


CAUSAL = _class_names("CAUSAL_LM")
CLASSIFY = _class_names("SEQUENCE_CLASSIFICATION")
MASKED = _class_names("MASKED_LM")
SEQ2SEQ = _class_names("SEQ_TO_SEQ_CAUSAL_LM")
MULTIMODAL = _class_names("MULTIMODAL_LM")


class RefusedError(Exception):
    """Raised with the reason why no anatomy can be given."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.what)
        self.refusal = refusal


@dataclass(frozen=True)
class Built:
    """A class, built on the meta device."""

    model: PreTrainedModel
    config: PreTrainedConfig
    kind: Kind

    @property
    def classifies(self) -> bool:
        """True if it is a sequence classifier, which has no output projection."""
        return type(self.model).__name__ in CLASSIFY.values()


def read_config(folder: Path, values: dict[str, Any]) -> PreTrainedConfig:
    """Return the config as transformers' own class of the model type reads it, or that of the base's own code if it may run.

    Raises:
        RefusedError: transformers does not have the type, or its class does not accept the values.
    """
    model_type, known = values.get("model_type"), tuple(sorted(vars(configuration_auto)["CONFIG_MAPPING_NAMES"]))
    if model_type not in known and not own_model(str(model_type)):
        raise RefusedError(Refusal(kind="unknown_type", what=f"model_type {model_type!r}", known_types=known))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise RefusedError(Refusal(kind="config", what=f"transformers cannot read the config: {first_line(error)}")) from error


def kind_of(config: PreTrainedConfig) -> Kind:
    """Return what the class is: an encoder if it is made to fill in masked tokens and is no half of an encoder-decoder."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    return "encoder" if name in MASKED and not getattr(config, "is_decoder", False) else "decoder"


def class_names(config: PreTrainedConfig, head: HeadKind) -> list[str]:
    """Return the names of the classes that could be meant, the likeliest first.

    An encoder has no language model to be trained, whatever the task: it is described by its classifier. A wrapper around a
    text model may have a class with and one without what is around it.
    """
    name, kind = config.model_type, kind_of(config)
    if own := own_model(name):
        # Only decoders: what else such code may define, nothing here says.
        return [] if head == "classification" or getattr(config, "is_encoder_decoder", False) else [own]
    if kind == "encoder" or head == "classification":
        found = [CLASSIFY.get(name)]
    elif kind == "encoder_decoder":
        found = [SEQ2SEQ.get(name)]
    elif config.get_text_config(decoder=True) is not config:
        found = [MULTIMODAL.get(name), CAUSAL.get(name)]
    else:
        found = [CAUSAL.get(name), MULTIMODAL.get(name)]
    return list(dict.fromkeys(each for each in found if each))


def candidates(config: PreTrainedConfig, head: HeadKind) -> list[Built]:
    """Build the classes that could be meant, the one that the config names before the others, else the likeliest first.

    Raises:
        RefusedError: transformers has no class for this head, or it cannot be built with this config.
    """
    names = class_names(config, head)
    if not names:
        what = "classifies texts" if head == "classification" else "generates text"
        raise RefusedError(
            Refusal(
                kind="no_class",
                what=f"there is no class for model_type {config.model_type!r} that {what}",
                remedy="use another base, or another task",
            )
        )
    named = getattr(config, "architectures", None) or ()
    built, refused = list[Built](), list[RefusedError]()
    for name in sorted(names, key=lambda name: name not in named):
        try:
            built.append(Built(model=build(copy.deepcopy(config), name), config=config, kind=kind_of(config)))
        except RefusedError as error:
            refused.append(error)
    if not built:
        raise refused[0]
    return built


def build(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Build one class on the meta device.

    Raises:
        RefusedError: it cannot be built with this config.
    """
    built = class_named(name)
    if name in CLASSIFY.values():
        config.num_labels = NUM_CLASSES
    try:
        with torch.device("meta"):
            model: PreTrainedModel = built._from_config(config)
    except Exception as error:
        raise RefusedError(
            Refusal(kind="config", what=f"transformers' class {name} cannot be built with this config: {first_line(error)}")
        ) from error
    return model


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that says something, or the name of its class."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
