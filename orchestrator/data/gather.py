"""From a spec to the examples of every split that has files: files found, rows read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.data.reading import BadRow, Row, find_files, read_rows
from orchestrator.data.rows import Example, to_example, to_retention_example
from orchestrator.data.summary import LeftOut, listed
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import DataSpec, JobSpec


@dataclass(frozen=True)
class Source:
    """A path of the spec and what it stands for."""

    path: str
    weight: float
    files: tuple[Path, ...]


Sources = dict[str, list[Source]]
"""By split; a split that is a share of train has none."""


def find_sources(loaded: LoadedSpec) -> Sources:
    """Every file that the spec's data section names.

    Raises:
        DataError: paths without a file, all of them.
    """
    sources: Sources = {}
    missing: list[tuple[str, DataError]] = []
    for name, key, path, weight in _named_paths(loaded.spec.data):
        entries = sources.setdefault(name, [])
        absolute = loaded.resolve(path)
        try:
            entries.append(Source(absolute, weight, tuple(find_files(absolute))))
        except DataError as error:
            missing.append((loaded.where(key), error))
    if len(missing) == 1:
        where, error = missing[0]
        raise DataError(f"{error.where}: {error.what}", where=where, expected=error.expected, remedy=error.remedy)
    if missing:
        lines = listed(f"{where}: {error.where}: {error.what}. {error.remedy}" for where, error in missing)
        raise DataError(f"{len(missing)} data paths without a file:\n  {lines}", remedy="mend the paths under `data`")
    return sources


def _named_paths(data: DataSpec) -> list[tuple[str, str, str, float]]:
    """(split, key in the spec, path, weight) of every path that the data section names."""
    if isinstance(data.train, str):
        named = [("train", "data.train", data.train, 1.0)]
    else:
        named = [
            ("train", f"data.train[{index}].path", source.path, source.weight or 1.0) for index, source in enumerate(data.train)
        ]
    others = (("eval", data.eval), ("test", data.test), ("retain", data.retain))
    return named + [(name, f"data.{name}", path, 1.0) for name, path in others if isinstance(path, str)]


def read_examples(spec: JobSpec, sources: Sources, left_out: LeftOut) -> dict[str, list[Example]]:
    """Examples of every split that has files; malformed rows stop the run together, or are counted with `skip_bad_rows`.

    Raises:
        DataError: rows that cannot be used, or a split without one that can.
    """
    found: dict[str, list[Example]] = {}
    bad: list[BadRow] = []
    for name, entries in sources.items():
        found[name] = []
        for number, source in enumerate(entries):
            for example in _read(spec, name, source.path):
                if isinstance(example, Example):
                    found[name].append(replace(example, source=number, weight=source.weight))
                else:
                    bad.append(example)
                    left_out.add(name, f"malformed: {example.reason}", example.place)
    if bad and not spec.data.skip_bad_rows:
        raise bad_rows_error(bad)
    for name, examples in found.items():
        if not examples:
            where = ", ".join(source.path for source in sources[name])
            raise DataError(f"no row of {name} can be used", where=where, expected="at least one", remedy="mend the file")
    return found


def bad_rows_error(bad: list[BadRow]) -> DataError:
    """All of them, in one error."""
    return DataError(
        f"{len(bad)} row{'s' if len(bad) != 1 else ''} cannot be used:\n  {listed(bad)}",
        remedy="mend them, or set data.skip_bad_rows: true to leave them out (they are counted and listed)",
    )


def _read(spec: JobSpec, split: str, path: str) -> list[Example | BadRow]:
    columns, group = spec.data.columns, spec.data.group

    def read(row: Row) -> Example | BadRow:
        if split == "retain":
            return to_retention_example(row, columns)
        has_group = split == "train" or group in row.values
        return to_example(row, spec.task, columns, group=group if has_group else None)

    return [row if isinstance(row, BadRow) else read(row) for row in read_rows(path)]
