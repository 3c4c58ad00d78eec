"""Suggest what a user probably meant by columns that no layout reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from orchestrator.spec.models import ColumnsSpec, Task
from orchestrator.spec.tasks import TASKS
from orchestrator.units import printable, quoted

SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "problem", "source", "context", "request", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "reply", "chosen", "result", "assistant", "summary"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns", "history", "message"),
    "text": ("content", "body", "document", "sentence", "review", "tweet", "title", "passage", "article", "prompt"),
    "label": ("labels", "category", "class", "target", "intent", "sentiment", "topic", "score", "rating"),
}
"""Column names for a part in other data sets; suggested, never used automatically."""
MOST_NAMES = 15
NAME_LENGTH = 40
PLAIN = re.compile(r"[^\W\d](?:[\w .-]*\w)?")


def missing_hint(task: Task, columns: ColumnsSpec, missing: Sequence[str], names: Collection[str]) -> str:
    """Return `; did you mean data.columns: {prompt: question}?`, or another task; empty if nothing is similar."""
    found = [str(name) for name in names]
    other = _other_task(task, found)
    if other:
        return f"; {other}"
    parts = {getattr(columns, part): part for part in SYNONYMS}
    renamed: dict[str, str] = {}
    for name in missing:
        part = parts.get(name)
        near = _near(part, name, [other for other in found if other not in renamed.values()]) if part else ""
        if part and near:
            renamed[part] = near
    if not renamed:
        return "; data.columns renames them" if found else ""
    return f"; did you mean data.columns: {{{', '.join(f'{part}: {_yaml(name)}' for part, name in renamed.items())}}}?"


def names_found(names: Collection[str]) -> str:
    """Return the existing columns, as many as fit on one line."""
    found = sorted(map(str, names))
    cut = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name in found[:MOST_NAMES]]
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return printable(", ".join(cut)) + more if found else "none"


def _yaml(name: str) -> str:
    """Return a name as written in a spec: quoted if YAML would parse it as something else."""
    return printable(name) if PLAIN.fullmatch(name) else quoted(name)


def _near(part: str, name: str, found: Sequence[str]) -> str:
    lowered = {other.lower().strip(): other for other in reversed(found)}
    for known in (name.lower(), part, *SYNONYMS[part]):
        if known in lowered:
            return lowered[known]
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.75)
    return lowered[near[0]] if near else ""


def _other_task(task: Task, found: Sequence[str]) -> str:
    if found and set(found) <= {"train", "validation", "valid", "dev", "eval", "test"}:
        return "one object with several splits: write each into its own file"
    if set(found) >= {"columns", "data"} or (len(found) > 1 and all(name.isdecimal() for name in found)):
        return "a table as pandas writes it? it writes rows with to_json(path, orient='records', lines=True)"
    if not TASKS[task].uses_chat_template and ("messages" in found or "conversations" in found):
        return "such rows are chats: set task: chat"
    if "chosen" in found and "rejected" in found:
        return "preference pairs are not supported: choose the column of the answers with data.columns"
    if TASKS[task].uses_separator and "text" in found and "label" in found:
        return "such rows have labels: set task: classify"
    if TASKS[task].has_answers and found == ["text"]:
        return "such rows are plain text: set task: text"
    return ""
