"""`orchestrator init`: a first spec, derived from the data."""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from orchestrator.cli.output import AsJson, print_json
from orchestrator.errors import DataError, UsageError
from orchestrator.spec.tasks import TASKS

if TYPE_CHECKING:
    from orchestrator.anatomy import ModelAnatomy
    from orchestrator.data.reading.guess import Guess

GENERIC = ("train", "training", "data", "dataset", "rows", "examples", "all", "input", "files")
SPLIT_NAMES = {"train": ("train", "training"), "eval": ("eval", "validation", "valid", "val", "dev"), "test": ("test",)}
TOKEN_STEPS = tuple(2**power for power in range(6, 14))
MEASURED_ROWS = 500
FITTING_SHARE = 0.99
SPARE_TOKENS = 4
"""Tokens reserved for begin, end and separator."""
TURN_TOKENS = 8
"""Approximate number of tokens that a chat template adds to a turn."""
FEW_ROWS = 50


@dataclass(frozen=True)
class Draft:
    """A spec to be written, and the facts that it was derived from."""

    path: Path
    text: str
    look: Guess
    data: str
    lengths: str
    notes: tuple[str, ...]


def init(
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="A data file, folder or glob; without it, the sample data.")
    ] = None,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The pretrained model's folder, or sample.")] = "sample",
    task: Annotated[str, typer.Option("--task", help="chat, completion, text or classify; detected unless given.")] = "",
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The spec file to write.")] = Path("spec.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a first spec from looking at the data: task, columns, lengths."""
    from orchestrator.spec.loader import load_text
    from orchestrator.store import write_atomic

    if os.path.lexists(output):
        raise UsageError("the file exists, and is not overwritten", where=str(output), remedy="give another file with --output")
    if not output.absolute().parent.is_dir():
        raise UsageError("its folder does not exist", where=str(output), remedy="create it, or give another --output")
    draft = draft_spec(data, base, task, output)
    load_text(draft.text, draft.path)
    write_atomic(draft.path, draft.text)
    if as_json:
        found = {"task": draft.look.task, "columns": dict(draft.look.columns), "why": draft.look.why, "notes": draft.notes}
        print_json({"spec": str(output), "data": draft.data, "rows": len(draft.look.rows), **found})
        return
    _tell(draft, output)


def draft_spec(data: str | None, base: str, task: str, output: Path) -> Draft:
    """Return a spec derived from data and base.

    Raises:
        UsageError: the task does not exist.
        DataError: no file, no row that can be read, or no columns for a task.
        BaseError: the base cannot be read.
    """
    from orchestrator.bases import locate_base
    from orchestrator.data.reading.guess import guess_use
    from orchestrator.samples import SAMPLE_DATA
    from orchestrator.spec.hub_ids import HUB
    from orchestrator.spec.models import BaseSpec, Task
    from orchestrator.spec.unsupported import is_url

    if task and task not in get_args(Task):
        raise UsageError(f"--task is {task!r}", expected=", ".join(get_args(Task)), remedy="leave it out to detect the task")
    source = data if data is not None else str(SAMPLE_DATA / "train.jsonl")
    if is_url(source) or source.startswith(HUB):
        raise DataError("not supported yet: data on a hub or an object store", where=source, remedy="copy it to a local file")
    path = output.absolute()
    splits = _splits_of(Path(source)) if data is not None else _sample_splits()
    look = guess_use(splits["train"], next((known for known in get_args(Task) if known == task), None))
    located = locate_base(BaseSpec(model=base), Path.cwd())
    anatomy, folder = located.anatomy(), located.for_data()
    tokens, lengths = _max_tokens(look, folder, anatomy.max_positions)
    notes = tuple(_notes(look, folder))
    facts = {
        "name": _name(source if data is not None else "first-run", path.parent),
        "base": base if base == "sample" or located.hub else _relative(base, path.parent),
        **{name: _relative(split, path.parent) for name, split in splits.items()},
        "max_tokens": tokens,
        "layers": _layers(anatomy),
    }
    return Draft(path, _spec_text(facts, look, source), look, source, lengths, notes)


def _splits_of(source: Path) -> dict[str, str]:
    """Return the file or glob of each split in a folder with files named train, validation, test; else the source as `train`."""
    if not source.is_dir():
        return {"train": str(source)}
    found: dict[str, str] = {}
    for split, names in SPLIT_NAMES.items():
        pattern = re.compile(rf"({'|'.join(names)})([-_.].*)?\.\w+", re.IGNORECASE)
        files = sorted(file for file in source.iterdir() if file.is_file() and pattern.fullmatch(file.name))
        if len(files) == 1:
            found[split] = str(files[0])
        elif files:
            prefix = os.path.commonprefix([file.name for file in files])  # noqa: RUF071 - of the names' letters
            found[split] = f"{glob.escape(str(source))}/{glob.escape(prefix)}*{files[0].suffix}"
    return found if "train" in found else {"train": str(source)}


def _sample_splits() -> dict[str, str]:
    from orchestrator.samples import SAMPLE_DATA

    return {name: str(SAMPLE_DATA / f"{name}.jsonl") for name in ("train", "eval", "test", "retain")}


def _relative(path: str, folder: Path) -> str:
    """Return the path relative to the spec's folder, or absolute if they share only the root."""
    whole = os.path.normpath(Path.cwd() / Path(path).expanduser())
    near = os.path.relpath(whole, folder)
    shared = os.path.commonpath([whole, folder.absolute()])
    if shared == "/":
        return whole
    return near if near.startswith(".") else f"./{near}"


def _name(source: str, folder: Path) -> str:
    """Return the run's name: the file's, or its folder's if the file's is generic; numbered if runs/ already has it."""
    path = Path(os.path.normpath(Path.cwd() / source))
    candidates = [part.split(".")[0] for part in (path.name, path.parent.name, path.parent.parent.name)]
    wanted = next((part for part in candidates if part.lower() not in (*GENERIC, "") and "*" not in part), "first-run")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-._")[:80] or "first-run"
    taken = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(free for free in taken if not (folder / "runs" / free).exists())


def _max_tokens(look: Guess, base: Path, max_positions: int) -> tuple[int, str]:
    """Return the smallest of TOKEN_STEPS that fits FITTING_SHARE of the first rows, and a sentence about it."""
    from orchestrator.data.reading.guess import contents

    counts = sorted(_token_counts(contents(look, MEASURED_ROWS), base, look))
    wanted = counts[math.ceil(FITTING_SHARE * len(counts)) - 1]
    if TASKS[look.task].cuts_into_chunks:
        bound = min(512, max_positions)
        return bound, f"texts are cut into chunks of {bound} tokens"
    bound = min(next((step for step in TOKEN_STEPS if step >= wanted), TOKEN_STEPS[-1]), max_positions)
    kept = sum(count <= bound for count in counts) / len(counts)
    return bound, f"{kept:.0%} of the first {len(counts):,} rows have at most {bound} tokens"


def _token_counts(texts: list[str], base: Path, look: Guess) -> list[int]:
    """Count the tokens of each text; estimated at three characters a token if the base has no tokenizer.json."""
    turns = [TURN_TOKENS * text.count("<|role|>") for text in texts] if TASKS[look.task].uses_chat_template else [0] * len(texts)
    file = base / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        encoded = Tokenizer.from_file(str(file)).encode_batch(texts)
        counts = [len(one.ids) for one in encoded]
    else:
        counts = [len(text) // 3 for text in texts]
    return [count + extra + SPARE_TOKENS for count, extra in zip(counts, turns, strict=True)]


def _layers(anatomy: ModelAnatomy) -> list[str]:
    """Return policies for the upper quarter, the upper half, and all of the blocks."""
    counts = sorted({-(-anatomy.num_blocks // 4), anatomy.num_blocks // 2} - {0, anatomy.num_blocks})
    return [*(f"last:{count}" for count in counts), "all"]


def _notes(look: Guess, base: Path) -> list[str]:
    notes: list[str] = []
    if look.bad:
        notes.append(f"{len(look.bad)} rows cannot be read, the first: {look.bad[0]}; `orchestrator data` lists them")
    if len(look.rows) < FEW_ROWS:
        notes.append(f"only {len(look.rows)} rows: a search needs a few hundred to distinguish the choices")
    if TASKS[look.task].uses_chat_template and not _has_chat_template(base):
        notes.append("the base has no chat template: put a chat_template.jinja into its folder, or use an instruct base")
    return notes


def _has_chat_template(base: Path) -> bool:
    if any((base / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    file = base / "tokenizer_config.json"
    return file.exists() and '"chat_template"' in file.read_text(encoding="utf-8", errors="replace")


def _spec_text(facts: Mapping[str, Any], look: Guess, source: str) -> str:
    """Return the commented YAML. Texts are quoted as JSON, which is valid YAML."""
    columns = ", ".join(f"{part}: {json.dumps(column, ensure_ascii=False)}" for part, column in look.columns.items())
    optional = {
        "eval": ("eval: 0.1", "a share of train, or a file: trials are compared on it"),
        "test": ("test: 0.1", "a share of train, or a file: read once, for the verdict"),
        "retain": ("retain: general.jsonl", "text that represents what the model must not forget"),
    }
    splits = [
        (f"  {name}: {_quoted(facts[name])}" if name in facts else f"  # {example}", meaning)
        for name, (example, meaning) in optional.items()
    ]
    lines = [
        (f"name: {_quoted(facts['name'])}", "the run's folder under output"),
        ("base:", ""),
        (f"  model: {_quoted(facts['base'])}", "a model of the hub, a folder in its layout, or sample"),
        ("  # quantize: nf4", "keeps the frozen weights in 4 bits, for GPUs with little memory"),
        (f"task: {look.task}", f"chat | completion | text | classify; detected: {look.why}"),
        ("data:", ""),
        (f"  train: {_quoted(facts['train'])}", "a file, a folder, a glob, or a list of {path, weight}"),
        *splits,
        *([] if all(part == column for part, column in look.columns.items()) else [(f"  columns: {{{columns}}}", "")]),
        (
            f"  max_tokens: {facts['max_tokens']}",
            "longer rows are dropped, counted and listed" if not TASKS[look.task].cuts_into_chunks else "of a chunk",
        ),
        ("search:", ""),
        (f"  layers: {json.dumps(facts['layers'])}", "which blocks are trained; also head, first:N, blocks:0-3, top:0.25"),
        ("  tune: [lora]", "lora | full"),
        ("  trials: 12", ""),
        ("  # max_forgetting: 0.1", "largest accepted increase of the loss on retain, nats per token"),
        ("output: runs", ""),
    ]
    head = [
        f"# Written by `orchestrator init` from {' '.join(source.split())}.",
        "# Paths are relative to this file. Every key: docs/spec.md, or `orchestrator render --schema`.",
    ]
    return "\n".join([*head, *(f"{code:<34}  # {comment}" if comment else code for code, comment in lines)]) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if not re.fullmatch(r"[\w./-]*[A-Za-z/][\w./-]*", text) else text


def _tell(draft: Draft, output: Path) -> None:
    from orchestrator.units import printable

    look = draft.look
    columns = ", ".join(f"{printable(column)} ({part})" for part, column in look.columns.items())
    more = " and more" if look.has_more else ""
    print(f"read      {printable(draft.data)}: {len(look.rows):,} rows{more}")
    print(f"task      {look.task}: {look.why}")
    print(f"columns   {columns}")
    if look.unused:
        print(f"unused    {', '.join(map(printable, look.unused))}")
    print(f"lengths   {draft.lengths}")
    for note in draft.notes:
        print(f"note      {printable(note)}")
    print(f"wrote     {printable(str(output))}")
    for title, command in (("next", "data"), ("", "plan"), ("", "sweep")):
        print(f"{title:<9} orchestrator {command} {printable(str(output))}")
