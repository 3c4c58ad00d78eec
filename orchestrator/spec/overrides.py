"""Values that an option gives instead of the spec's file: `--set search.trials=4 --set "search.layers=[last:2, all]"`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.source import KeyPath, Source, parse_source, spell_path

OPTION = "--set"
STEP = re.compile(r"\.?([A-Za-z_][\w-]*)|\[(\d+)\]")
EXAMPLE = "write key=value, for example search.trials=4 or data.columns.prompt=question"


@dataclass(frozen=True)
class Override:
    """One value and its place in the spec."""

    path: KeyPath
    value: Any
    option: str
    """The option as given, for messages: `--set search.trials=4`."""


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Parse `key=value` texts: a dotted key, `[n]` for an item of a list, and a YAML value (empty: null).

    Raises:
        SpecError: lists every text that cannot be parsed, with its option.
    """
    found: list[Override] = []
    problems: list[SpecProblem] = []
    for text in texts:
        option = f"{OPTION} {text}"
        key, sign, value = text.partition("=")
        path = parse_path(key.strip())
        if not sign or not path:
            problems.append(SpecProblem("", "no key and value" if not sign else f"not a key: {key!r}", option, hint=EXAMPLE))
            continue
        try:
            source = parse_source(value, option) if value.strip() else Source(option, value)
        except SpecError as error:
            problems += [SpecProblem(spell_path(path), problem.message, option, hint=problem.hint) for problem in error.problems]
            continue
        problems += [SpecProblem(spell_path(path), problem.message, option, hint=problem.hint) for problem in source.problems]
        found.append(Override(path, source.data, option))
    if problems:
        raise SpecError(problems)
    return found


def override_values(values: Mapping[str, Any]) -> list[Override]:
    """Return overrides of the Python API: values by dotted key.

    Raises:
        SpecError: a key cannot be parsed.
    """
    wrong = [key for key in values if not parse_path(key)]
    if wrong:
        raise SpecError(
            [SpecProblem("", f"not a key: {key!r}", "overrides", hint="for example 'search.trials'") for key in wrong]
        )
    return [Override(parse_path(key), value, f"overrides[{key!r}]") for key, value in values.items()]


def parse_path(key: str) -> KeyPath:
    """Parse a dotted key: `search.layers[1]` -> `("search", "layers", 1)`; empty if it is not one."""
    path: list[str | int] = []
    position = 0
    while position < len(key):
        step = STEP.match(key, position)
        if step is None or (position > 0) != (step[0][0] in ".["):
            return ()
        path.append(step[1] if step[2] is None else int(step[2]))
        position = step.end()
    return tuple(path)


def apply_overrides(source: Source, overrides: Sequence[Override]) -> None:
    """Apply overrides in order to what a file contains; those that cannot be applied are added to `source.problems`."""
    for override in overrides:
        problem = _put(source.data, override.path, override.value)
        source.overrides[override.path] = override.option
        if problem:
            source.problems.append(SpecProblem(spell_path(override.path), problem, override.option))


def _put(data: Any, path: KeyPath, value: Any) -> str:
    """Set a value, creating sections on the way; return what is wrong, or an empty text."""
    for depth, step in enumerate(path):
        around, last = spell_path(path[:depth]) or "the spec", depth == len(path) - 1
        if isinstance(data, dict) and isinstance(step, str):
            section = cast("dict[str, Any]", data)
            if last:
                section[step] = value
            elif section.get(step) is None:
                section[step] = {}
            data = section[step]
        elif isinstance(data, list) and isinstance(step, int):
            items = cast("list[Any]", data)
            if step >= len(items):
                return f"{around} has {len(items)} items, the last one is [{len(items) - 1}]"
            if last:
                items[step] = value
            data = items[step]
        else:
            return f"{around} is not a {'mapping with keys' if isinstance(step, str) else 'list with items'}"
    return ""
