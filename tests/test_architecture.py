"""The architecture holds: imports go strictly downward, heavy libraries stay in their packages, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "orchestrator"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS: dict[str, tuple[int, int]] = {
    "errors": (0, 1),
    "units": (0, 0),
    "values": (0, 0),
    "samples": (0, 0),
    "spec": (1, 0),
    "anatomy": (2, 0),
    "work": (3, 0),
    "plan": (4, 0),
    "transfer": (4, 0),
    "store": (5, 1),
    "hub": (5, 2),
    "bases": (5, 3),
    "run": (5, 4),
    "data": (5, 5),
    "train": (5, 6),
    "probe": (5, 7),
    "serve": (5, 8),
    "runtime": (6, 0),
    "report": (6, 0),
    "this_machine": (6, 0),
    "inputs": (7, 0),
    "api": (8, 0),
    "cli": (9, 0),
    "": (10, 0),
    "__main__": (10, 0),
}
"""Package -> layer and, on layer 5 alone, the place in its order. The one without a name is `orchestrator` itself: it has the
names of the Python API, and imports it when they are used."""
PURE = ["", *(package for package, (layer, _) in LAYERS.items() if layer <= 3)]
HEAVY = ("ray", "torch", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
HOMES = {"ray": {"runtime"}, "deepspeed": {"train"}}
THIN = ("orchestrator.runtime.search", "orchestrator.runtime.exchange", "orchestrator.runtime.watchdog")
"""What Ray imports in the processes of a Tune trial, the exchange and the heartbeat board: nothing that computes."""
PROSE = {"reason", "message", "what", "sentence", "remedy", "failure", "note", "detail", "promotion_reason", "rule_reason"}
"""Names of texts for people: nothing may be decided by what they contain."""
TAKES_APART = {"startswith", "endswith", "partition", "rpartition", "split", "removeprefix", "removesuffix", "find", "index"}
READS_PROSE = {
    "orchestrator/work/failure.py": "the failures that older versions recorded as text",
    "orchestrator/data/summary.py": "why rows are left out is text alone, there and in the data's summary on disk",
    "orchestrator/data/reading/examples.py": "likewise, for rows that cannot be read",
    "orchestrator/data/reading/formats/csv_rows.py": "likewise",
}
LONGEST_FILE = 450
LONGEST_FUNCTION = 60
LONGEST_LOOP = 100
"""What the training loop may take."""


def package_of(path: Path) -> str:
    """`orchestrator/plan/memory/resident.py` -> `plan`; `orchestrator/errors.py` -> `errors`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if first == "__init__":
        return ""
    return first


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at its top or inside a function."""
    module = [*path.relative_to(REPOSITORY).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module[: len(module) - node.level] if node.level else []
            target = ".".join([*package, *([node.module] if node.module else [])])
            yield node.lineno, target
            yield from ((node.lineno, f"{target}.{alias.name}") for alias in node.names)


def imported_packages(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "orchestrator" and len(parts) > 1 and parts[1] in LAYERS:
            yield line, parts[1]


def may_import(package: str, other: str) -> bool:
    if package == other:
        return True
    (layer, place), (below, other_place) = LAYERS[package], LAYERS[other]
    return layer > below or (layer == below and place > other_place)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(modules: dict[str, Path], name: str) -> set[str]:
    """The project's modules that a module imports, at its top, in functions and for type checking alike.

    `from package import name` is an import of the submodule `name` where there is one, of the package otherwise.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno} is a relative import"
            members = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in modules else str(node.module) for member in members.values()}
    return (found & set(modules)) - {name}


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a cycle, its first node again at the end; empty without one."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for other in sorted(edges[path[-1]] - done):
            if other in path:
                return [*path[path.index(other) :], other]
            if cycle := walk([*path, other]):
                return cycle
        done.add(path[-1])
        return []

    return next((cycle for node in sorted(edges) if node not in done and (cycle := walk([node]))), [])


def loaded_by(modules: Iterable[str]) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after importing the modules."""
    script = (
        "import importlib, sys\n"
        f"for name in {list(modules)!r}: importlib.import_module(name)\n"
        f"print(*(library for library in {HEAVY!r} if library in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_every_package_has_its_layer() -> None:
    assert {package_of(path) for path in FILES} <= set(LAYERS), "a new package needs a layer"


def test_the_rule_itself() -> None:
    assert may_import("cli", "runtime")
    assert may_import("train", "data")
    assert not may_import("data", "train")
    assert not may_import("plan", "transfer")
    assert not may_import("runtime", "report")
    assert not may_import("spec", "anatomy")
    assert not may_import("values", "errors")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_strictly_downward(path: Path) -> None:
    package = package_of(path)
    wrong = [
        f"{relative(path)}:{line} imports {other}" for line, other in imported_packages(path) if not may_import(package, other)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_package_alone(library: str) -> None:
    wrong = [
        f"{relative(path)}:{line}"
        for path in FILES
        for line, name in imports_of(path)
        if name.split(".")[0] == library and package_of(path) not in HOMES[library]
    ]
    assert not wrong, f"{library} belongs in {HOMES[library]}: {wrong}"


def test_pure_layers_import_nothing_heavy() -> None:
    assert loaded_by(module_name(path) for path in FILES if package_of(path) in PURE) == []


def test_a_tune_trial_and_the_exchange_import_nothing_that_computes() -> None:
    """Each concurrent trial is a process: with torch and transformers it takes twice the memory, and seconds longer to start."""
    assert loaded_by(THIN) == ["ray"]


def test_a_rank_imports_deepspeed_only_when_it_is_planned() -> None:
    """It takes seconds and memory, and it must learn its device before it is imported."""
    assert "deepspeed" not in loaded_by(["orchestrator.train.host"])


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {module_name(path): path for path in FILES}
    edges = {name: imported_modules(modules, name) for name in modules}
    assert " -> ".join(find_cycle(edges)) == ""


def prose_read_by(source: str) -> list[int]:
    """Lines on which a text for people is searched or taken apart: `"memory" in result.reason`, `message.split(":")`."""

    def is_prose(node: ast.expr) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return name in PROSE

    lines: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            searched = zip(node.ops, node.comparators, strict=True)
            lines += [node.lineno for op, right in searched if isinstance(op, ast.In | ast.NotIn) and is_prose(right)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TAKES_APART:
            lines += [node.lineno] if is_prose(node.func.value) else []
    return lines


def test_prose_that_is_read_is_found() -> None:
    source = "a = 'x' in result.reason\nb = e.what.removeprefix('y')\nc = message.split()\nd = kind in known\ne = name.split()"
    assert sorted(prose_read_by(source)) == [1, 2, 3]


def test_nothing_is_decided_by_a_text_for_people() -> None:
    """A reworded sentence must not change what a run does: what is decided by is a field (`Failure.kind`, for one)."""
    found = {relative(path): lines for path in FILES if (lines := prose_read_by(path.read_text()))}
    assert {name: lines for name, lines in found.items() if name not in READS_PROSE} == {}
    assert set(found) == set(READS_PROSE), "an exception that is no longer needed"


def test_the_report_reads_a_run_through_its_reader_alone() -> None:
    reading = {"read_json", "read_jsonl", "read_record", "read_text", "read_bytes", "glob", "rglob", "iterdir", "walk", "load"}
    wrong = [
        f"{relative(path)}:{node.lineno} {name}"
        for path in FILES
        if package_of(path) == "report"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.Attribute)
        and (name := node.id if isinstance(node, ast.Name) else node.attr) in reading
        and "style.css" not in path.read_text().splitlines()[node.lineno - 1]  # the report's own file
    ]
    assert not wrong, f"reading a run belongs in orchestrator/run: {wrong}"


def test_one_function_writes_the_deepspeed_config() -> None:
    writers = [
        f"{relative(path)}:{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(isinstance(part, ast.Constant) and part.value == "zero_optimization" for part in ast.walk(node))
    ]
    mentions = [relative(path) for path in FILES if "zero_optimization" in path.read_text()]
    assert len(writers) <= 1, writers
    assert len(mentions) == len(writers), mentions
    assert all(mention.startswith("orchestrator/train/") for mention in mentions)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE, f"{relative(path)} has {len(text.splitlines())} lines"
    limit = LONGEST_LOOP if path == PACKAGE / "train" / "loop.py" else LONGEST_FUNCTION
    long = [
        f"{relative(path)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > limit
    ]
    assert not long, "\n".join(long)
