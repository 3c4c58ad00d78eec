"""Other forms of the spec: its identity, its difference from another, its JSON Schema, and the resolved YAML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

from orchestrator.spec.loader import LoadedSpec, resolved_yaml
from orchestrator.spec.models import (
    ADAPTER_KEYS,
    BaseSpec,
    ClassifySpec,
    DataSpec,
    FinetuneSpec,
    JobSpec,
    SearchPoint,
    SearchSpec,
    Tune,
)
from orchestrator.values import content_hash

Job = Literal["sweep", "finetune"]
ABSENT = "(absent)"


def spec_sha256(spec: JobSpec, job: Job) -> str:
    """Return the identity of a run: a hash of the spec with its defaults, without what may change between submissions.

    Excluded: `output`, `resources`, `search.trials` (raising it extends a finished sweep) and the other job's section.
    """
    # Keys that were added to the spec later are left out at their defaults, so that runs begun before they existed keep their
    # identity.
    values = spec.model_dump(mode="json", exclude={"output", "resources", "finetune" if job == "sweep" else "search"})
    if job == "sweep" and values["search"] is not None:
        del values["search"]["trials"]
        if not values["search"]["points"]:
            del values["search"]["points"]
        if not values["search"]["learning_curve"]:
            del values["search"]["learning_curve"]
    for section, default in _adapter_sections(values):
        for key in ADAPTER_KEYS:
            if section[key] == default[key]:
                del section[key]
    if spec.classify in (None, ClassifySpec()):
        del values["classify"]
    if values["data"]["dedupe"] == "exact":
        del values["data"]["dedupe"]  # if the default now gives other sets, `prepare_data` reports it
    for source in values["data"]["train"] if isinstance(values["data"]["train"], list) else ():
        source["weight"] = 1.0 if source["weight"] is None else source["weight"]
    base = BaseSpec(model="").model_dump(mode="json")
    for key in ("add_tokens", "code_sha256", "extra_tensors"):
        if values["base"][key] == base[key]:
            del values["base"][key]
    usual = DataSpec(train="").model_dump(mode="json")
    for key in (
        "format",
        "template",
        "template_without_input",
        "delimiter",
        "text_documents",
        "train_on",
        "special_tokens_in_text",
    ):
        if values["data"][key] == usual[key]:
            del values["data"][key]
    for key in ("input", "system", "tools"):
        if values["data"]["columns"][key] == usual["columns"][key]:
            del values["data"]["columns"][key]
    return content_hash({"job": job, **values})


def _adapter_sections(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each section that describes adapters, and its defaults."""
    if values.get("search") is not None:
        yield values["search"], SearchSpec().model_dump(mode="json")
        point = SearchPoint(layers="all", learning_rate=1.0).model_dump(mode="json")
        yield from ((each, point) for each in values["search"].get("points", ()))
    if values.get("finetune") is not None:
        yield values["finetune"], FinetuneSpec().model_dump(mode="json")


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line such as `train.epochs: 2 -> 3` for each value that differs, in the order of `new`."""
    before, after = _flatten(old), _flatten(new)
    paths = [*after, *(path for path in before if path not in after)]
    return [
        f"{path}: {_spell(before.get(path, ABSENT))} -> {_spell(after.get(path, ABSENT))}"
        for path in paths
        if before.get(path, ABSENT) != after.get(path, ABSENT)
    ]


def json_schema() -> dict[str, Any]:
    """Return the spec's JSON Schema, for editors and checks."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}


def dump_yaml(loaded: LoadedSpec) -> str:
    """Return the resolved spec as YAML, with defaults and with its hashes as comments at the top; it loads as a spec."""
    jobs: list[Job] = []
    if loaded.spec.search is not None:
        jobs.append("sweep")
    if loaded.spec.finetune is not None:
        jobs.append("finetune")
    head = "".join(f"# sha256 ({job}): {spec_sha256(loaded.spec, job)}\n" for job in jobs)
    return head + resolved_yaml(loaded.spec)


def learning_rate_range(search: SearchSpec, tune: Tune) -> tuple[float, float]:
    """Return the range to search; for `full` a tenth of LoRA's unless given."""
    low, high = search.learning_rate.lora
    if tune == "lora":
        return low, high
    return search.learning_rate.full or (low / 10, high / 10)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    return flat


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
