"""Load a YAML file as a spec, or report everything that is wrong with it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError
from ruamel.yaml import YAML

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.checks import find_mistakes
from orchestrator.spec.hub_ids import HUB
from orchestrator.spec.messages import explain, found
from orchestrator.spec.models import FinetuneSpec, JobSpec, SearchSpec
from orchestrator.spec.overrides import Override, apply_overrides, override_values, parse_overrides
from orchestrator.spec.source import KeyPath, Place, Source, parse_source, read_source, spell_path
from orchestrator.spec.unsupported import is_url

PLACEHOLDERS: dict[KeyPath, Any] = {
    ("name",): "unnamed",
    ("base", "model"): "sample",
    ("task",): "text",
    ("data", "train"): "x.txt",
}
"""Stand-ins for required keys that are invalid, so that the rest can still be checked."""


@dataclass(frozen=True)
class LoadedSpec:
    """A spec and its source."""

    spec: JobSpec
    path: Path
    """Absolute path of the spec's file."""
    text: str
    places: Mapping[str, Place] = field(default_factory=dict[str, Place])
    """Line and column of every value in the file, by dotted path (`search.layers[1]`)."""
    defaulted: str = ""
    """Sentence that describes the default for a section that the file does not have."""
    overrides: Mapping[str, str] = field(default_factory=dict[str, str])
    """Options that override the file, by dotted path: `search.trials` -> `--set search.trials=4`."""

    @property
    def folder(self) -> Path:
        """Base folder of the spec's relative paths."""
        return self.path.parent

    @property
    def output_root(self) -> Path:
        """Absolute path of `output`."""
        return Path(self.resolve(self.spec.output))

    def resolve(self, path: str) -> str:
        """Return the absolute form of a path in the spec (a glob keeps its wildcards); the URL of an object store, and a data set
        of the hub, are returned unchanged."""
        if is_url(path) or path.startswith(HUB):
            return path
        return os.path.normpath(self.folder / Path(path).expanduser())

    def where(self, path: str) -> str:
        """Return `file:line:column` of a value, for errors found later; or the option that gave it, or only the file."""
        option = next((self.overrides[key] for key in self.overrides if _is_within(path, key)), "")
        if option:
            return option
        line, column = self.places.get(path, (0, 0))
        return f"{self.path}:{line}:{column}" if line else str(self.path)


def load_spec(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> LoadedSpec:
    """Read, validate and check a spec.

    Numbers are strict: a quoted number, or true instead of a number, is an error.

    Args:
        path: The YAML file.
        overrides: Values that replace the file's: `key=value` texts as `--set` takes them, or values by dotted key.

    Raises:
        SpecError: lists everything that is wrong, each with file:line:column or with the option that gave it.
    """
    path = Path(path).expanduser()
    given = override_values(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    return _load(read_source(path), path.absolute(), given)


def load_text(text: str, path: Path) -> LoadedSpec:
    """Load a spec from YAML text that is not (or not yet) in the file `path`.

    Raises:
        SpecError: lists everything that is wrong, as if it were there.
    """
    return _load(parse_source(text, str(path)), path.absolute(), [])


def load_values(values: Mapping[str, Any], folder: Path, overrides: Mapping[str, Any] | None = None) -> LoadedSpec:
    """Load a spec from a dictionary with the keys of a spec file, checked as `load_spec` checks one.

    Args:
        folder: Base of relative paths.

    Raises:
        SpecError: lists everything that is wrong, by key.
    """
    plain = json.loads(json.dumps(values, default=str))
    return _load(Source("the given spec", "", plain), folder.absolute() / "spec", override_values(overrides or {}))


def _load(source: Source, path: Path, overrides: Sequence[Override]) -> LoadedSpec:
    """Load the spec from a source; `path` is the absolute path that it comes from."""
    data = _mapping(source.data)
    if data is None:
        keys = ", ".join(JobSpec.model_fields)
        problem = source.problem((), f"{found(source.data)}; expected a mapping with the keys {keys}")
        raise SpecError([*source.problems, problem])
    apply_overrides(source, overrides)
    problems = list(source.problems)
    spec, broken = _validate(source)
    problems += broken.values()
    judged = spec or _salvage(data, list(broken))
    if judged is not None:
        for finding in find_mistakes(judged, path.parent):
            if not any(_related(place, bad) for place in (finding.path, *finding.needs) for bad in broken):
                problems.append(source.problem(finding.path, finding.message, finding.hint))
    if problems or spec is None:
        raise SpecError(sorted(problems, key=lambda problem: (problem.line, problem.column)))
    places = {spell_path(place): source.values[place] for place in source.values if place}
    options = {spell_path(place): option for place, option in source.overrides.items()}
    return LoadedSpec(spec, path, _text(source, spec, path), places, overrides=options)


def _text(source: Source, spec: JobSpec, path: Path) -> str:
    """Return the file's text; if options or a program gave values, the resolved spec with a comment about their origin."""
    if source.text and not source.overrides:
        return source.text
    origin = path.name if source.text else "a program's values"
    options = "".join(f"#   {' '.join(option.split())}\n" for option in source.overrides.values())
    return f"# Resolved from {origin}{', changed by' if options else ''}\n{options}{resolved_yaml(spec)}"


def resolved_yaml(spec: JobSpec) -> str:
    """Return the spec as YAML that loads again: every key with its value, defaults included."""
    yaml: Any = YAML()
    yaml.width = 120
    stream = StringIO()
    yaml.dump(spec.model_dump(mode="json"), stream)
    return stream.getvalue()


def require_section(loaded: LoadedSpec, job: Literal["sweep", "finetune"]) -> SearchSpec | FinetuneSpec:
    """Return the section that a job needs.

    Raises:
        SpecError: the spec does not have it.
    """
    section = loaded.spec.search if job == "sweep" else loaded.spec.finetune
    if section is None:
        name, other = ("search", "finetune") if job == "sweep" else ("finetune", "search")
        has_other = getattr(loaded.spec, other) is not None
        hint = f"add `{name}:`, or run `{'finetune' if job == 'sweep' else 'sweep'}`" if has_other else f"add `{name}:`"
        raise SpecError([SpecProblem(name, f"is missing; the job `{job}` needs this section", str(loaded.path), 1, 1, hint)])
    return section


def _mapping(data: Any) -> dict[str, Any] | None:
    return cast("dict[str, Any]", data) if isinstance(data, dict) else None


def _validate(source: Source) -> tuple[JobSpec | None, dict[KeyPath, SpecProblem]]:
    try:
        # Strict validation of JSON still accepts a list for a tuple, which strict validation of Python values does not.
        return JobSpec.model_validate_json(json.dumps(source.data), strict=True), {}
    except ValidationError as error:
        return None, explain(error.errors(include_url=False, include_context=False), source)


def _salvage(data: dict[str, Any], broken: list[KeyPath]) -> JobSpec | None:
    """Return the spec without its invalid places, so that the others are checked in the same pass."""
    rest = copy.deepcopy(data)
    for path in broken:
        _remove(rest, path)
    for path, value in PLACEHOLDERS.items():
        *parents, key = path
        section = rest
        for parent in parents:
            section = section.setdefault(str(parent), {})
        section.setdefault(str(key), value)
    try:
        return JobSpec.model_validate_json(json.dumps(rest), strict=True)
    except ValidationError:
        return None


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    """Remove an invalid value. An invalid policy is replaced, so that the others keep their numbers; other lists are removed
    whole."""
    if path[:2] == ("search", "layers") and len(path) == 3 and isinstance(path[2], int):
        # Each stand-in is a different policy, so that they are not reported as duplicates of each other.
        data["search"]["layers"][path[2]] = f"blocks:{9000 + path[2]}"
        return
    depth = next((number for number, step in enumerate(path) if isinstance(step, int)), len(path))
    section: Any = data
    for key in path[: depth - 1]:
        section = cast("dict[str, Any]", section).get(str(key)) if isinstance(section, dict) else None
    if isinstance(section, dict):
        cast("dict[str, Any]", section).pop(str(path[depth - 1]), None)


def _is_within(path: str, key: str) -> bool:
    """Return whether `search.layers[1]` is at or below `search.layers`."""
    return path == key or path.startswith((f"{key}.", f"{key}["))


def _related(one: KeyPath, other: KeyPath) -> bool:
    depth = min(len(one), len(other))
    return one[:depth] == other[:depth]
