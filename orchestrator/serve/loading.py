"""Which transformers class loads a bundle, as its user would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from transformers.models.auto import modeling_auto

WRAPPERS = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
"""Auto classes of models with a text model inside, and the tables from which they choose."""
CAUSAL = "AutoModelForCausalLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"


def serving_class(folder: Path, auto_model: str) -> str:
    """Return the name of the transformers class that loads a model folder as what it was saved from.

    An encoder-decoder that generates text has an auto class of its own.

    Some types have two classes that generate text: the text model alone, which `AutoModelForCausalLM` loads, and the text model
    with towers around it. The folder's config names the class.

    Args:
        auto_model: The task's auto class, which is returned unless the config names a class with towers that it does not load.
    """
    values = cast("dict[str, object]", json.loads((folder / "config.json").read_bytes()))
    if auto_model == CAUSAL and values.get("is_encoder_decoder"):
        return SEQ2SEQ
    named, model_type = values.get("architectures"), values.get("model_type")
    if auto_model != CAUSAL or not isinstance(named, list) or not named:
        return auto_model
    architecture = str(cast("list[object]", named)[0])
    if _table("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES").get(str(model_type)) == architecture:
        return auto_model
    return next((auto for auto, table in WRAPPERS.items() if _table(table).get(str(model_type)) == architecture), auto_model)


def _table(name: str) -> Mapping[str, str]:
    return vars(modeling_auto).get(name, {})
