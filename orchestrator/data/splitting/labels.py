"""Check class labels: variants of one name, numbers to predict, classes that cannot be trained or scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.data.reading.examples import Example
from orchestrator.data.splitting.minhash import normalised
from orchestrator.data.summary import LeftOut, Notice
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec
from orchestrator.units import printable

WHOLE = re.compile(r"-?\d+")
NAMED = 8
"""Number of classes named in one sentence."""
FEW_ROWS = 2
MIN_VALUES = 20
"""Number of different numbers from which labels look like a quantity, if most occur on at most FEW_ROWS rows."""
SKEWED = 0.9
"""Share of rows in one class above which always predicting it is nearly always right."""


def sort_classes(names: Iterable[str]) -> list[str]:
    """Sort numerically if all are whole numbers ("9" before "10"), else by characters."""
    found = set(names)
    # Numeric order for numeric names: "9" before "10". The name breaks ties such as "1" and "01".
    if all(WHOLE.fullmatch(name) for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def refuse_quantities(counts: Mapping[str, int], where: str) -> None:
    """Raise if the labels are decimals that mostly occur once or twice: they are measured values, not classes.

    Raises:
        DataError: they are.
    """
    numbers = _numbers(counts)
    if _looks_like_a_quantity(counts, numbers) and any(number % 1 for number in numbers):
        values = ", ".join(list(counts)[:3])
        raise DataError(
            f"the labels look like numbers to predict, not classes: {len(counts)} different values ({values}, ...) "
            f"in {sum(counts.values())} rows",
            where=where,
            expected="classes, each with several rows; regression is not supported",
            remedy="check data.columns.label, or write ranges of the numbers as classes (such as low, middle, high)",
        )


def label_notices(counts: Mapping[str, int]) -> list[Notice]:
    """Return warnings about the classes of train.

    Args:
        counts: Rows of each class.
    """
    total = sum(counts.values())
    found: list[tuple[str, str]] = []
    for twins in _twins(counts):
        names = " and ".join(f"{printable(repr(name))} ({counts[name]:,} rows)" for name in twins)
        how = "in the way a number is written" if _numbers(twins) else "in case or blanks only"
        found.append((f"classes that differ {how}: {names}", "spell them the same way if they are one class"))
    single = [name for name, count in counts.items() if count == 1]
    if _looks_like_a_quantity(counts, _numbers(counts)):
        found.append(
            (
                f"the labels look like numbers to predict, not classes: {len(counts)} different numbers in {total} rows",
                "check data.columns.label, or write ranges of the numbers as classes",
            )
        )
    # Mostly unique labels: probably an identifier or free text, rather than rare classes.
    elif single and len(single) > len(counts) / 2:
        found.append(
            (
                f"{len(single):,} of {len(counts):,} classes have a single row: {_named(single)}",
                "check data.columns.label: an identifier or free text is not a class",
            )
        )
    elif single:
        found.append(
            (
                f"{len(single):,} of {len(counts):,} classes have a single row, which train keeps: {_named(single)}",
                "give more rows of them, or merge them with others: they are in neither eval nor test",
            )
        )
    if counts and len(counts) > 1 and max(counts.values()) > SKEWED * total:
        name = max(counts, key=lambda name: counts[name])
        found.append(
            (
                f"class {printable(repr(name))} has {counts[name]:,} of {total:,} rows ({counts[name] / total:.0%})",
                "always predicting it has that accuracy: use search.metric: macro_f1, or give more rows of the other classes",
            )
        )
    return [Notice(level="warning", message=message, remedy=remedy) for message, remedy in found]


def check_labels(loaded: LoadedSpec, found: Mapping[str, list[Example]], left_out: LeftOut) -> None:
    """Warn about the classes of all rows that train, and the shares taken from it, come from.

    Raises:
        DataError: they are numbers to predict.
    """
    counts = Counter(str(example.label) for example in found["train"])
    refuse_quantities(counts, loaded.where("data.columns.label"))
    left_out.notices += label_notices(counts)


def note_missing_classes(splits: Mapping[str, Sequence[Example]], left_out: LeftOut) -> None:
    """Warn of classes that train has and eval or test does not."""
    classes = sort_classes(str(example.label) for example in splits["train"])
    for name in ("eval", "test"):
        have = {str(example.label) for example in splits[name]}
        missing = [label for label in classes if label not in have]
        if missing:
            left_out.warn(
                f"{len(missing):,} of {len(classes):,} classes have no row in {name}: {_named(missing)}",
                f"{name} does not measure them: give more rows, or a larger data.{name}",
            )


def _twins(counts: Iterable[str]) -> list[list[str]]:
    """Return groups of names that differ only in case, blanks, Unicode form, or number format."""
    alike: dict[str | float, list[str]] = {}
    for name in counts:
        number = _numbers([name])
        alike.setdefault(number[0] if number else normalised(name), []).append(name)
    return [sorted(names) for names in alike.values() if len(names) > 1]


def _numbers(names: Iterable[str]) -> list[float]:
    """Return the names as finite numbers; empty if one is not a number."""
    try:
        values = [float(name) for name in names]
    except ValueError:
        return []
    # float() also accepts "nan" and "inf", which are names here.
    return values if all(abs(value) < float("inf") for value in values) else []


def _looks_like_a_quantity(counts: Mapping[str, int], numbers: Sequence[float]) -> bool:
    few = sum(count <= FEW_ROWS for count in counts.values())
    return len(numbers) >= MIN_VALUES and few > len(counts) / 2


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(printable(repr(name)) for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
