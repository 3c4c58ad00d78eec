"""A YAML file as plain values, with the line and column of every key and value.

YAML 1.2 by ruamel.yaml: `1e-4` is a number, `no` is text, dates are text. The node tree is walked here instead of being
constructed by the library, so that all mistakes are reported at once and every value keeps its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.reader import ReaderError

from orchestrator.errors import SpecError, SpecProblem

KeyPath = tuple[str | int, ...]
Place = tuple[int, int]
"""Line and column, counted from 1."""

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
"""Limit on the values in the file, before and after aliases and merges are expanded. A spec with every key has fewer than 100."""
MAX_DEPTH = 40
"""Limit on the nesting of mappings and lists, and of merged mappings."""
TAG = "tag:yaml.org,2002:"
MERGE_KEY = "<<"


def spell_path(path: KeyPath) -> str:
    """Return the dotted form: `("search", "layers", 1)` -> `search.layers[1]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


@dataclass
class Source:
    """The content of a YAML file with the place of each part."""

    file: str
    text: str
    data: Any = None
    keys: dict[KeyPath, Place] = field(default_factory=dict[KeyPath, Place])
    values: dict[KeyPath, Place] = field(default_factory=dict[KeyPath, Place])
    problems: list[SpecProblem] = field(default_factory=list[SpecProblem])
    overrides: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])
    """Options that give values instead of the file, by the values' path; each as it was written."""

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """Return the place of a value (or its key); for what the file does not have, the place of the nearest enclosing value."""
        if path in self.values and not (key and path in self.keys):
            return self.values[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.keys.get(path) or self.values.get(path, (1, 1))

    def problem(self, path: KeyPath, message: str, hint: str = "", *, key: bool = False) -> SpecProblem:
        option = self.option(path)
        if option or not self.values:
            return SpecProblem(spell_path(path), message, option or self.file, hint=hint)
        line, column = self.place(path, key=key)
        return SpecProblem(spell_path(path), message, self.file, line, column, hint)

    def option(self, path: KeyPath) -> str:
        """Return the option that gives the value at `path`, something around it, or a part of it that is not in the file."""
        around = [self.overrides[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in self.overrides]
        within = [option for inner, option in self.overrides.items() if path and inner[: len(path)] == path]
        return next(iter(around), "") or (next(iter(within), "") if path not in self.values else "")


def read_source(path: Path) -> Source:
    """Read and walk a YAML file; duplicate keys, custom tags and keys that are not text are added to `problems`.

    Raises:
        SpecError: the file is missing, not a file, not UTF-8, too long, empty, or not YAML; it has more values or levels than any
            spec, before or after its aliases and merges are expanded.
    """
    return parse_source(_read_text(path), str(path))


def parse_source(text: str, file: str) -> Source:
    """Walk YAML text like `read_source`; `file` is the name used in messages."""
    source = Source(file, text)
    try:
        root = _compose(source)
    except MarkedYAMLError as error:
        raise SpecError([_syntax(source.file, error)]) from None
    except ReaderError as error:
        raise SpecError([_forbidden(source, error)]) from None
    except (YAMLError, RecursionError) as error:
        raise SpecError([SpecProblem("", f"not valid YAML: {str(error).splitlines()[0]}", source.file)]) from None
    if root is None:
        raise SpecError([SpecProblem("", "the file is empty", source.file, 1, 1, "start from jobs/specs/quickstart.yaml")])
    source.data = _Walk(source).value(root, ())
    return source


def _compose(source: Source) -> Any:
    """Return the root node, or None for an empty file. Limited while it is parsed, since parsing time grows faster than the
    text.

    Raises:
        SpecError: too many or too deeply nested values.
        YAMLError: not YAML.
    """
    # The pure-Python parser can be wrapped, so that a small file which expands to very many values is stopped while it is parsed.
    reader: Any = YAML(typ="safe", pure=True)
    constructor, parser = reader.get_constructor_parser(source.text)
    next_event, depth, count = parser.get_event, 0, 0

    def counted() -> Any:
        nonlocal depth, count
        event = next_event()
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        count += isinstance(event, NodeEvent)
        if depth > MAX_DEPTH or count > 2 * MAX_VALUES:
            raise SpecError([_too_much(source.file, (), _start(event))])
        return event

    parser.get_event = counted
    try:
        return constructor.composer.get_single_node()
    finally:
        parser.dispose()


def _too_much(file: str, path: KeyPath, place: Place) -> SpecProblem:
    hint = f"a file may have {MAX_VALUES} values and {MAX_DEPTH} levels, its aliases and merges written out"
    return SpecProblem(spell_path(path[:4]), "too many or too deeply nested values", file, *place, hint)


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise SpecError([SpecProblem("", "is a folder; a spec is a YAML file", str(path))])
        raw = path.read_bytes()
    except FileNotFoundError:
        near = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"beside it: {', '.join(near[:5])}" if near else "check the path"
        raise SpecError([SpecProblem("", "there is no such file", str(path), hint=hint)]) from None
    except OSError as error:
        raise SpecError([SpecProblem("", f"cannot be read: {error.strerror}", str(path))]) from None
    if len(raw) > MAX_BYTES:
        raise SpecError(
            [SpecProblem("", f"{len(raw)} bytes; a spec has at most {MAX_BYTES}", str(path), hint="is this the data?")]
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        message = f"not UTF-8: byte 0x{raw[error.start]:02x}"
        raise SpecError([SpecProblem("", message, str(path), line, column, "save the file as UTF-8")]) from None


def _forbidden(source: Source, error: Any) -> SpecProblem:
    before = source.text[: error.position]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    code = ord(source.text[error.position])
    return SpecProblem("", f"the character U+{code:04X} is not allowed in YAML", source.file, line, column, "remove it")


def _syntax(file: str, error: Any) -> SpecProblem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    problem = str(error.problem or error.context or "unknown reason").splitlines()[0]
    hint = ""
    if "\\t" in problem:
        hint = "indent with spaces, YAML allows no tabs there"
    elif "mapping values are not allowed" in problem:
        hint = "check the indentation, and put text with a colon and a space in quotes"
    elif "block end" in problem:
        hint = "check the indentation"
    elif "expected a single document" in (error.context or ""):
        hint = "one file holds one spec: remove what follows `---`"
    return SpecProblem("", f"not valid YAML: {problem}", file, line, column, hint)


class _Walk:
    """Converts ruamel's nodes (untyped: `id`, `tag`, `value`, `start_mark`) into plain values and records their places."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.constructor: Any = YAML(typ="safe", pure=True).constructor
        self.count = 0
        self._pairs: dict[int, list[tuple[Any, Any]]] = {}
        """Of mappings that were merged, by the identity of their nodes: one that many others merge is written out once."""
        self._merging: list[int] = []

    def value(self, node: Any, path: KeyPath) -> Any:
        self.count += 1
        place = _start(node)
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            raise SpecError([_too_much(self.source.file, path, place)])
        nothing = node.id == "scalar" and not node.value and not node.style
        self.source.values[path] = self.source.keys.get(path, place) if nothing else place
        if node.id == "mapping":
            return self.mapping(node, path)
        if node.id == "sequence":
            return [self.value(child, (*path, number)) for number, child in enumerate(node.value)]
        return self.scalar(node, path)

    def scalar(self, node: Any, path: KeyPath) -> Any:
        kind = str(node.tag).removeprefix(TAG)
        if kind in ("int", "float", "bool", "null"):
            try:
                return self.constructor.construct_object(node)
            except (ValueError, YAMLError):
                return str(node.value)
        if kind not in ("str", "timestamp"):
            self.source.problems.append(self.source.problem(path, f"the tag {node.tag} is not supported here", "remove the tag"))
        return str(node.value)

    def mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in self.pairs(node):
            place = _start(key_node)
            if key_node.id != "scalar":
                self.source.problems.append(SpecProblem(spell_path(path), "a key must be text", self.source.file, *place))
                continue
            key = str(key_node.value)
            inner = (*path, key)
            if key in result:
                message = f"the key occurs twice, first in line {self.source.keys[inner][0]}"
                self.source.problems.append(SpecProblem(spell_path(inner), message, self.source.file, *place, "keep one"))
                continue
            self.source.keys[inner] = place
            result[key] = self.value(value_node, inner)
        return result

    def pairs(self, node: Any) -> list[tuple[Any, Any]]:
        """Return the mapping's own pairs, then those of mappings merged by `<<` whose keys are not among them.

        Raises:
            SpecError: a mapping merges itself, or merges are nested too deeply or expand to too many pairs.
        """
        # A mapping that many others merge is expanded once: without this a file of 1.7 KB with nested merges took hours.
        if id(node) in self._pairs:
            return self._pairs[id(node)]
        if id(node) in self._merging or len(self._merging) > MAX_DEPTH:
            raise SpecError([_too_much(self.source.file, (), _start(node))])
        self._merging.append(id(node))
        found: list[tuple[Any, Any]] = []
        merged: list[Any] = []
        for key_node, value_node in node.value:
            if key_node.id == "scalar" and key_node.value == MERGE_KEY and not key_node.style:
                merged += self._merged(key_node, value_node)
            else:
                found.append((key_node, value_node))
        own = {str(key_node.value) for key_node, _ in found}
        for mapping in merged:
            for key_node, value_node in self.pairs(mapping):
                if str(key_node.value) not in own:
                    own.add(str(key_node.value))
                    found.append((key_node, value_node))
            self.count += 1
            if len(found) > MAX_VALUES or self.count > MAX_VALUES:
                raise SpecError([_too_much(self.source.file, (), _start(mapping))])
        self._merging.pop()
        self._pairs[id(node)] = found
        return found

    def _merged(self, key: Any, value: Any) -> list[Any]:
        children = value.value if value.id == "sequence" else [value]
        if any(child.id != "mapping" for child in children):
            message = "`<<` takes a mapping, or a list of mappings"
            self.source.problems.append(
                SpecProblem(MERGE_KEY, message, self.source.file, *_start(key), "merge an anchor: `<<: *name`")
            )
        return [child for child in children if child.id == "mapping"]


def _start(node: Any) -> Place:
    return node.start_mark.line + 1, node.start_mark.column + 1
