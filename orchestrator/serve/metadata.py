"""YAML metadata of a model card for the Hugging Face hub, and the licence that the base names.

Format: https://huggingface.co/docs/hub/model-cards, metrics in its `model-index`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from orchestrator.serve.bundle_inputs import BundleInputs, base_label
from orchestrator.spec.hub_ids import parse_hub_data
from orchestrator.spec.tasks import metric_facts
from orchestrator.transfer.records import ModelScores, TransferReport

UNKNOWN = "unknown"
"""The hub's identifier for an unknown licence."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENCE_TEXTS = (
    ("apache-2.0", r"apache license\s+version 2\.0"),
    ("mit", r"\bmit license\b|permission is hereby granted, free of charge"),
    ("bsd-3-clause", r"bsd 3-clause"),
    ("llama3.1", r"llama 3\.1 community license"),
    ("llama3.2", r"llama 3\.2 community license"),
    ("llama3.3", r"llama 3\.3 community license"),
    ("llama3", r"llama 3 community license"),
    ("llama2", r"llama 2 community license"),
    ("gemma", r"gemma terms of use"),
)
"""Hub identifier, and a pattern for the beginning of the licence's text."""


class Licence(NamedTuple):
    """Licence as the base's files name it."""

    values: dict[str, str]
    """`license`, and for a custom one `license_name` and `license_link`."""
    said_by: str
    """File that names it; empty if none does."""


def front_matter(inputs: BundleInputs, transfer: TransferReport) -> str:
    """Return the card's metadata between its `---` lines."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": inputs.base.traits.head.pipeline_tag,
        "base_model": base_id(inputs),
        "base_model_relation": "finetune",
        **licence_of(Path(inputs.base.folder)).values,
        "tags": ["fine-tuned", inputs.trial.tune, inputs.base.task],
    }
    sources = list(_hub_data_sets(inputs))
    if sources:
        values["datasets"] = sources
    results = list(_metrics(transfer))
    if results:
        values["model-index"] = [{"name": inputs.name, "results": [_result(inputs, results, sources)]}]
    written = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False  # type: ignore[assignment]
    yaml.dump(values, written)
    return f"---\n{written.getvalue()}---"


def base_id(inputs: BundleInputs) -> str:
    """Return the base's hub id if the spec or the base gives one, else its name; never a path of this machine."""
    shown = base_label(inputs.base_name)
    if HUB_ID.fullmatch(shown):
        return shown
    own = _json(Path(inputs.base.folder) / "config.json").get("_name_or_path")
    return own if isinstance(own, str) and HUB_ID.fullmatch(own) else shown


def licence_of(base: Path) -> Licence:
    """Find the licence in the base's README.md, its config.json, or its licence file, in this order."""
    head = _head_of(base / "README.md")
    # The hub allows a list; a card names one licence.
    if isinstance(head.get("license"), list):
        head["license"] = next(iter(head["license"]), None)
    if isinstance(head.get("license"), str):
        names = ("license", "license_name", "license_link")
        return Licence({name: str(head[name]) for name in names if isinstance(head.get(name), str)}, "README.md")
    config = _json(base / "config.json").get("license")
    if isinstance(config, str) and config:
        return Licence({"license": config.lower()}, "config.json")
    for file in sorted(base.glob("LICENSE*")):
        # Licences wrap their lines differently; 4,000 characters contain every title.
        text = " ".join(_text(file)[:4000].lower().split())
        known = next((name for name, pattern in LICENCE_TEXTS if re.search(pattern, text)), None)
        if known is not None:
            return Licence({"license": known}, file.name)
        return Licence({"license": "other", "license_name": "base-model-licence", "license_link": file.name}, file.name)
    return Licence({"license": UNKNOWN}, "")


def licence_sentence(base: Path) -> str:
    """Return what a reader must know about the licence."""
    found = licence_of(base)
    if not found.said_by:
        return "The base model's files name no licence: check it before you use or share this model."
    name = found.values.get("license_name") or found.values["license"]
    return f"The base model's licence ({name}, by its {found.said_by}) and terms apply."


def _metrics(transfer: TransferReport) -> Iterator[dict[str, Any]]:
    """Return the model's finite metrics on the test set."""
    own: ModelScores | None = next((scores for scores in transfer.scores if scores.model == "promoted"), None)
    for name, value in own.metrics.items() if own is not None else ():
        if math.isfinite(value):
            facts = metric_facts(name)
            value = round(float(value), 6)
            yield {"type": facts.hub_type or name, "value": value, "name": facts.hub_title or facts.title}


def _result(inputs: BundleInputs, metrics: list[dict[str, Any]], sources: list[str]) -> dict[str, Any]:
    task = inputs.base.traits.head.pipeline_tag
    data = {"type": sources[0] if sources else "private", "name": f"test set of {inputs.name}", "split": "test"}
    return {"task": {"type": task}, "dataset": data, "metrics": metrics}


def _hub_data_sets(inputs: BundleInputs) -> Iterator[str]:
    """Return the ids of data sets that the spec takes from the hub; local files are not published."""
    data = inputs.spec.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    for source in train if isinstance(train, list | tuple) else [train]:
        path = source.get("path") if isinstance(source, dict) else source
        if isinstance(path, str) and (found := parse_hub_data(path)) is not None:
            yield found.id


def _head_of(file: Path) -> dict[str, Any]:
    """Return the YAML metadata of a README.md; empty if there is none that can be parsed."""
    found = re.match(r"\A---\r?\n(.*?)\r?\n---", _text(file), re.DOTALL)
    try:
        value = YAML(typ="safe", pure=True).load(found[1]) if found else {}
    except YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(file) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
