"""Pydantic's validation errors in plain words: one problem per place, with what was found, what was expected, and a hint."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.errors import SpecProblem
from orchestrator.spec.models import NAME_PATTERN, JobSpec
from orchestrator.spec.policy import EXAMPLES
from orchestrator.spec.source import KeyPath, Source

PATTERNS = {NAME_PATTERN: "letters, digits, `.`, `_` and `-`, at most 100, a letter or digit first"}
YES_AND_NO = {"yes": "true", "on": "true", "no": "false", "off": "false"}


@dataclass(frozen=True)
class Shape:
    """A type annotation with its constraints."""

    annotation: Any
    constraints: tuple[Any, ...] = ()


def explain(errors: Sequence[ErrorDetails], source: Source) -> dict[KeyPath, SpecProblem]:
    """Return one problem for each place that is wrong, by its path."""
    by_path: dict[KeyPath, list[str]] = {}
    for error in errors:
        by_path.setdefault(_data_path(error, source.data), []).append(error["type"])
    inner = {path[:depth] for path in by_path for depth in range(len(path))}
    return {path: _problem(path, kinds, source) for path, kinds in by_path.items() if path not in inner}


def _data_path(error: ErrorDetails, data: Any) -> KeyPath:
    """Return the error's location without the names of union members that pydantic inserts."""
    path: KeyPath = ()
    *_, last = (None, *error["loc"])
    for step in error["loc"]:
        children = _children(data)
        if step in children:
            path, data = (*path, step), children[step]
        elif step is last and error["type"] == "missing" and isinstance(step, str):
            path = (*path, step)
    return path


def _children(data: Any) -> dict[str | int, Any]:
    """Return the values one level below a value."""
    if isinstance(data, dict):
        return cast("dict[str | int, Any]", data)
    return dict(enumerate(cast("list[Any]", data))) if isinstance(data, list) else {}


def _problem(path: KeyPath, kinds: list[str], source: Source) -> SpecProblem:
    if "extra_forbidden" in kinds:
        return _unknown_key(path, source)
    shape = _shape_at(path)
    if "missing" in kinds and path not in source.values:
        return source.problem(path, f"is missing; expected {describe(shape)}")
    value = _value_at(path, source.data)
    finite = ", finite" if "finite_number" in kinds else ""
    return source.problem(path, f"{found(value)}; expected {describe(shape)}{finite}", _hint(value, shape))


def _unknown_key(path: KeyPath, source: Source) -> SpecProblem:
    *parents, key = path
    model = _model_of(_shape_at(tuple(parents)).annotation)
    known = list(model.model_fields) if model else []
    near = near_names(str(key), known)
    home = [name for name in _sections_with(str(key)) if name != ".".join(map(str, parents))]
    if near:
        hint = f"did you mean {near[0]}?"
    elif home:
        hint = f"it belongs under {' or '.join(home)}" if home[0] else "it belongs at the top level"
    else:
        hint = f"known here: {', '.join(known)}"
    return source.problem(path, "unknown key", hint, key=True)


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return known names that are similar to `name`, the most similar first."""
    by_folded = {other.lower().replace("-", "_"): other for other in known}
    folded = difflib.get_close_matches(name.lower().replace("-", "_"), by_folded, n=2, cutoff=0.6)
    return [by_folded[match] for match in folded]


def _sections_with(key: str) -> Iterator[str]:
    """Yield the sections that have such a key; the top level is the empty text."""
    if key in JobSpec.model_fields:
        yield ""
    for name, field in JobSpec.model_fields.items():
        model = _model_of(field.annotation)
        if model and key in model.model_fields:
            yield name


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    models = [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]
    return models[0] if models else None


def _shape_at(path: KeyPath) -> Shape:
    shape = Shape(JobSpec)
    for step in path:
        if isinstance(step, int):
            items = [member for member in _members(shape.annotation) if get_origin(member) is tuple]
            arguments = get_args(items[0]) if items else (object,)
            shape = Shape(arguments[0] if step >= len(arguments) or arguments[-1] is Ellipsis else arguments[step])
        else:
            model = _model_of(shape.annotation)
            field = model.model_fields.get(step) if model else None
            shape = Shape(field.annotation, tuple(field.metadata)) if field else Shape(object)
    return _flat(shape)


def _flat(shape: Shape) -> Shape:
    """Unwrap annotated types and nested fields: a bare annotation and its constraints."""
    annotation, constraints = shape.annotation, list(shape.constraints)
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        constraints += extra
    flat: list[Any] = []
    for constraint in constraints:
        flat += constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]
    return Shape(annotation, tuple(flat))


def describe(shape: Shape) -> str:
    """Describe what a place expects: `a number above 0`, `none | nf4 | int8`, `a list, each text`."""
    shape = _flat(shape)
    annotation = shape.annotation
    members = [member for member in _members(annotation) if member is not type(None)]
    if len(members) > 1 or len(members) < len(_members(annotation)):
        return " or ".join(describe(Shape(member, shape.constraints)) for member in members)
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        item = describe(Shape(items[0]))
        whole = "a list of at least one" if any(isinstance(constraint, MinLen) for constraint in shape.constraints) else "a list"
        return f"{whole}, each {item}" if items[-1] is Ellipsis else f"a pair [low, high], each {item}"
    model = _model_of(annotation)
    if model is not None:
        return f"a mapping with the keys {', '.join(model.model_fields)}"
    if annotation is bool:
        return "true or false"
    if annotation is str:
        patterns = [PATTERNS.get(getattr(constraint, "pattern", None) or "") for constraint in shape.constraints]
        return next((f"text: {pattern}" for pattern in patterns if pattern), "text")
    number = "a whole number" if annotation is int else "a number" if annotation is float else "something else"
    return number + _bounds(shape.constraints)


def _bounds(constraints: Sequence[Any]) -> str:
    words: list[str] = []
    for constraint in constraints:
        match constraint:
            case Gt(gt=bound):
                words.append(f"above {bound:g}")
            case Ge(ge=bound):
                words.append(f"of at least {bound:g}")
            case Lt(lt=bound):
                words.append(f"below {bound:g}")
            case Le(le=bound):
                words.append(f"of at most {bound:g}")
            case _:
                pass
    return (" " + " and ".join(words)) if words else ""


def found(value: object) -> str:
    """Describe a value briefly, as the file has it."""
    match value:
        case None:
            return "the value is empty"
        case bool():
            return f"found {str(value).lower()}"
        case str():
            return f"found the text {value[:60]!r}"
        case list():
            count = len(cast("list[object]", value))
            return f"found a list of {count}" if count else "found an empty list"
        case dict():
            keys = [str(key) for key in cast("dict[object, object]", value)]
            return f"found a mapping ({', '.join(keys[:3])})"
        case _:
            return f"found {value}"


def _value_at(path: KeyPath, data: Any) -> Any:
    for step in path:
        data = data[step]
    return data


def _hint(value: object, shape: Shape) -> str:
    members = [_flat(Shape(member)).annotation for member in _members(shape.annotation)]
    choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    match value:
        case bool():
            return ""
        case str():
            return _text_hint(value, members, choices)
        case dict() if str in members:
            keys = [key for key in cast("dict[str, object]", value) if key in EXAMPLES]
            inner = [cast("dict[str, object]", value)[key] for key in keys]
            return f'a colon and a space make a mapping; write "{keys[0]}:{inner[0]}"' if keys else ""
        case int() | float() if str in members and float not in members:
            return "put it in quotes"
        case int() | float() | dict() if any(get_origin(member) is tuple for member in members):
            return "write a list in [ ]"
        case list() if (model := _model_of(shape.annotation)) is not None:
            return f"write keys, for example {{{next(iter(model.model_fields))}: ...}}"
        case None if type(None) not in members and _model_of(shape.annotation):
            return "leave the key out, or give it keys"
        case _:
            return ""


def _text_hint(value: str, members: list[Any], choices: list[str]) -> str:
    numeric = int in members or float in members or any(choice.isdigit() for choice in choices)
    if numeric and is_number(value):
        return "drop the quotes"
    if numeric and value.endswith("%") and is_number(value[:-1]):
        return f"write {float(value[:-1]) / 100:g}"
    if bool in members and value.lower() in YES_AND_NO:
        return f"write {YES_AND_NO[value.lower()]}"
    near = near_names(value, choices)
    if near:
        return f"did you mean {near[0]}?"
    if any(get_origin(member) is tuple for member in members) and str not in members:
        return "write a list in [ ]"
    return ""


def is_number(text: str) -> bool:
    """Return whether a text would be a number without its quotes."""
    try:
        float(text)
    except ValueError:
        return False
    return True
