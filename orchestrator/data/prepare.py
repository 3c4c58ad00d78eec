"""Turn a spec's data section into tokenized sets on disk, and count everything left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.data.batching import documents_of_steps
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.encoder import Document, Encoder, has_encoder, load_tokenizer, mark_supervised
from orchestrator.data.encoding.end_tokens import declared_ends, end_tokens, note_end_tokens
from orchestrator.data.encoding.row_notices import RowNotices
from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.files import shown
from orchestrator.data.reading.gather import PLACES, Sources, bad_rows_error, find_sources, read_examples
from orchestrator.data.reading.row import BadRow
from orchestrator.data.retention import retention_sets
from orchestrator.data.rng import CAPS, generator
from orchestrator.data.sets import TokenizedSet, build_set
from orchestrator.data.splitting.labels import check_labels, note_missing_classes, sort_classes
from orchestrator.data.splitting.splits import make_splits
from orchestrator.data.summary import DataSummary, LeftOut, SplitSummary, listed
from orchestrator.data.vocabulary import compare_with_rows
from orchestrator.errors import DataError, IntegrityError, RunConflictError
from orchestrator.plan.data_size import tokens_per_step
from orchestrator.plan.remedies import most_replayed_tokens, needs_replayed_text
from orchestrator.plan.schedule import StepSize
from orchestrator.plan.values import DataSize
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import JobSpec
from orchestrator.spec.tasks import RETENTION_TASKS
from orchestrator.store import read_json, sha256_file, write_json
from orchestrator.units import printable
from orchestrator.values import content_hash

SETS = ("train", "eval", "test", "retain", "replay")
FORMAT = 6
CLASSIFY_FORMAT = 5
RETENTION_FORMAT = 7
"""Version of each kind of set: raised when the same inputs give other sets, so that affected older ones are rebuilt."""
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
)


def prepare_data(
    loaded: LoadedSpec,
    tokenizer_folder: Path,
    out_folder: Path,
    *,
    anatomy: ModelAnatomy | None = None,
    keep_sets: bool = False,
    planned_sha256: str = "",
) -> DataSummary:
    """Read, check, split, tokenize; write train, eval, test, retain and replay .npz and summary.json.

    Called again with the same inputs it returns the earlier summary, after checking that the sets are complete.

    Args:
        tokenizer_folder: The base's folder.
        out_folder: Created if it does not exist; summary.json is written last.
        anatomy: The base's, to compare its vocabulary with the tokens of the data.
        keep_sets: Do not replace existing sets by different ones, because trials were trained on them.
        planned_sha256: `DataSize.sets_sha256` of those sets, if a plan has it.

    Raises:
        DataError: a file is missing, rows cannot be used (all of them are named), a split or a row has nothing to
            train on, a token has no row in the base's embeddings.
        RunConflictError: the sets would differ, and `keep_sets`.
        BaseError: the base has no tokenizer, or no chat template where the task needs one.
    """
    spec = loaded.spec
    left_out = LeftOut(loaded.folder)
    sources = find_sources(loaded, left_out)
    inputs = _inputs_sha256(spec, sources, tokenizer_folder)
    # Hashing the files is much cheaper than reading, splitting and tokenizing them again.
    known = _made_before(out_folder, inputs)
    if known is not None:
        return known
    found = read_examples(spec, sources, left_out)
    if spec.traits.has_labels:
        check_labels(loaded, found, left_out)
    parts = make_splits(loaded, found, left_out)
    tokenizer = load_tokenizer(tokenizer_folder)
    ends = declared_ends(tokenizer_folder, tokenizer)
    apart, parts = has_encoder(tokenizer_folder), parts | {"retain": found.get("retain", [])}
    documents = _encode_all(loaded, tokenizer, ends, parts, left_out, apart=apart)
    classes = _classes(documents, spec, left_out) if spec.traits.has_labels else ()
    left_out.warn_of_losses({name: _num_rows(kept) for name, kept in documents.items()})
    sets = {name: _to_set(docs, classes) for name, docs in documents.items()}
    one_example = _show(documents["train"][0], tokenizer)
    if anatomy is not None:
        compare_with_rows(documents, tokenizer, anatomy, spec, left_out)
    del found, parts, documents  # by far the most memory, and the sets are to be written yet
    if spec.traits.has_answers:
        stops = end_tokens(sets["train"], ControlTokens(tokenizer), ends)
        sets = {name: replace(part, stop_ids=stops) for name, part in sets.items()}
        note_end_tokens(sets["train"], tokenizer, spec.task, left_out)
    files = tuple(left_out.relative(str(path)) for entries in sources.values() for entry in entries for path in entry.files)
    summary = _summary(inputs, sets, classes, left_out).model_copy(update={"files": files, "one_example": one_example})
    if keep_sets and _same_sets(out_folder, summary, planned_sha256):
        write_json(out_folder / "summary.json", summary)
    else:
        _write(out_folder, sets, summary)
    return summary


def _summary(inputs: str, sets: Mapping[str, TokenizedSet], classes: tuple[str, ...], left_out: LeftOut) -> DataSummary:
    return DataSummary(
        inputs_sha256=inputs,
        splits={name: _summarise(part) for name, part in sets.items()},
        dropped=left_out.summary(),
        notices=tuple(left_out.notices),
        classes=classes,
        stop_token_ids=sets["train"].stop_ids,
        class_counts=tuple(np.bincount(sets["train"].labels, minlength=len(classes)).tolist()) if classes else (),
        files=(),
        one_example="",
    )


def _num_rows(documents: Iterable[Document]) -> int:
    """Return the number of rows that the documents come from; chunks of one row are consecutive."""
    return sum(1 for _ in itertools.groupby(documents, key=lambda document: id(document.example)))


def _write(folder: Path, sets: Mapping[str, TokenizedSet], summary: DataSummary) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The summary marks the sets as complete: it goes first and is written last, so that a crash leaves no valid summary of
    # partial sets.
    (folder / "summary.json").unlink(missing_ok=True)
    for name in SETS:
        (folder / f"{name}.npz").unlink(missing_ok=True)
    for name, part in sets.items():
        part.save(folder / f"{name}.npz")
    write_json(folder / "summary.json", summary)


def _same_sets(folder: Path, summary: DataSummary, planned_sha256: str) -> bool:
    """Return True if an earlier call's sets are complete and equal to those of `summary`, even if the inputs' hash differs: an
    earlier version of this program may have hashed other things. False if they must be rewritten: damaged, or without the end
    tokens, which older versions did not store.

    Raises:
        RunConflictError: the earlier call's sets were others.

    """
    before = _summary_of(folder)
    # The plan's hash protects the trials even if the earlier summary is damaged.
    differs = bool(planned_sha256) and sets_sha256(summary) != planned_sha256
    if before is not None:
        differs = differs or sets_sha256(before) != sets_sha256(summary) or before.classes != summary.classes
    if differs:
        raise RunConflictError(
            "the data has changed since this run began, or this version tokenises it differently",
            where=str(folder),
            expected="the sets that its trials were trained on, from the same files, tokenizer and data section",
            remedy="put them back (or the version that began the run), or choose another `name`; nothing was overwritten",
        )
    return before is not None and before.stop_token_ids == summary.stop_token_ids and _whole(folder, before)


def sets_sha256(summary: DataSummary) -> str:
    """Return one hash over all sets."""
    return content_hash({name: part.sha256 for name, part in summary.splits.items()})


def data_size(summary: DataSummary, spec: JobSpec, folder: Path, *, planned: StepSize | None = None) -> DataSize:
    """Return the exact sizes that the plan needs.

    Args:
        folder: Where `prepare_data` wrote the sets: the number of steps depends on every document's length.
        planned: The value already chosen for `auto`: by an earlier submission of the run, whose trials continue with steps of
            that size, or for the ranks of a gang. Without it the value follows from the data only.
    """
    train = TokenizedSet.load(folder / "train.npz")
    in_a_step = tokens_per_step(spec.train, len(train), train.num_tokens, int(train.lengths.max()))
    # An extended run keeps its step size, or its older trials would not be comparable.
    if spec.train.tokens_per_step == "auto" and planned is not None:
        in_a_step = planned.tokens
    steps = documents_of_steps(train.offsets, in_a_step, spec.train.seed, 0)
    splits = summary.splits
    supervised = splits["train"].documents if summary.classes else splits["train"].supervised_tokens
    return DataSize(
        train_documents=splits["train"].documents,
        train_tokens=splits["train"].tokens,
        steps_per_epoch=len(steps),
        tokens_per_step=in_a_step,
        step_ranks=planned.ranks if planned is not None else 1,
        eval_tokens=splits["eval"].tokens,
        retain_tokens=splits["retain"].tokens if "retain" in splits else 0,
        replay_tokens=splits["replay"].tokens if "replay" in splits else 0,
        longest_document_tokens=max(part.longest_document_tokens for part in splits.values()),
        num_classes=len(summary.classes),
        class_names=summary.classes,
        supervised_share=supervised / max(1, splits["train"].tokens),
        # Mean document length as a token sees it: attention's cost per token grows with it.
        document_tokens=float(np.square(train.lengths, dtype=np.float64).sum() / max(1, splits["train"].tokens)),
        sets_sha256=sets_sha256(summary),
    )


def _summary_of(folder: Path) -> DataSummary | None:
    """Return the summary of an earlier call; None if it is missing or damaged."""
    try:
        return DataSummary.model_validate(read_json(folder / "summary.json"))
    except (FileNotFoundError, IntegrityError, ValidationError):
        return None


def _whole(folder: Path, summary: DataSummary) -> bool:
    """Return True if all sets of a summary exist undamaged."""
    try:
        return all(TokenizedSet.load(folder / f"{name}.npz").sha256 == part.sha256 for name, part in summary.splits.items())
    except (IntegrityError, DataError):
        return False


def _made_before(folder: Path, inputs_sha256: str) -> DataSummary | None:
    """Return the summary of an earlier call with the same inputs, if all its sets are complete."""
    known = _summary_of(folder)
    return known if known is not None and known.inputs_sha256 == inputs_sha256 and _whole(folder, known) else None


def _inputs_sha256(spec: JobSpec, sources: Sources, tokenizer_folder: Path) -> str:
    files = {name: [[sha256_file(path) for path in entry.files] for entry in entries] for name, entries in sources.items()}
    found = sorted({path for pattern in TOKENIZER_FILES for path in tokenizer_folder.glob(pattern) if path.is_file()})
    tokenizer = {path.name: sha256_file(path) for path in found}
    section = spec.data.model_dump(mode="json")
    # Only kinds of sets that a change affected are rebuilt, so that older runs of other kinds can still be resumed.
    number = RETENTION_FORMAT if "retain" in sources else CLASSIFY_FORMAT if spec.traits.has_labels else FORMAT
    inputs = {"format": number, "files": files, "tokenizer": tokenizer, "data": section, "task": spec.task}
    return content_hash(inputs | {"seed": spec.train.seed} | _replay_inputs(spec))


def _replay_inputs(spec: JobSpec) -> dict[str, int]:
    """Return the replay settings that decide how much retention text is kept for training."""
    return {"replay": most_replayed_tokens(spec, 10**6)} if needs_replayed_text(spec) else {}


@dataclass
class _RejectedRows:
    """Rows that stop the run, collected over the splits so that all are reported at once."""

    bad: list[BadRow] = field(default_factory=list)
    too_long: dict[str, int] = field(default_factory=dict)
    """Tokens of each row, by its place."""

    def raise_any(self, loaded: LoadedSpec) -> None:
        if self.bad:
            raise bad_rows_error(self.bad)
        if self.too_long:
            count, longest = len(self.too_long), max(self.too_long.values())
            raise DataError(
                f"{count} row{'s' if count > 1 else ''} longer than data.max_tokens = {loaded.spec.data.max_tokens}"
                f" (the longest of {longest:,} tokens): {shown(list(self.too_long), PLACES)}",
                where=loaded.where("data.long_rows"),
                remedy="raise data.max_tokens, or set data.long_rows to drop or truncate_prompt",
            )


def _encode_all(
    loaded: LoadedSpec,
    tokenizer: Any,
    ends: tuple[int, ...],
    parts: dict[str, list[Example]],
    left_out: LeftOut,
    *,
    apart: bool,
) -> dict[str, list[Document]]:
    """Encode the documents of each split.

    Args:
        ends: Ids at which the base stops as it is.
        parts: With `retain`, which may be empty.
        apart: Whether prompts go through an encoder of their own.
    """
    spec, refused, noticed = loaded.spec, _RejectedRows(), RowNotices()
    caps = {"eval": spec.data.eval_rows, "test": spec.data.test_rows}
    encoder = Encoder(tokenizer, spec.task, spec.data, ends=ends, noticed=noticed, apart=apart)
    documents: dict[str, list[Document]] = {}
    for name in ("train", "eval", "test"):
        chosen = _capped(name, parts[name], caps.get(name), spec.train.seed, left_out)
        documents[name] = _fitting(name, encoder, chosen, spec, left_out, refused)
    retain = parts["retain"]
    if retain:
        documents["retain"] = []
        for task in RETENTION_TASKS:  # every row by the columns that it has, whatever the spec's task
            if rows := [example for example in retain if example.retention_task == task]:
                # The checks for empty rows depend on the task that the row is read by.
                read_so = spec.model_copy(update={"task": task})
                encoder = Encoder(tokenizer, task, spec.data, ends=ends, noticed=noticed)
                documents["retain"] += _fitting("retain", encoder, rows, read_so, left_out, refused)
    noticed.report(left_out)
    refused.raise_any(loaded)
    for name, kept in documents.items():
        if not kept:
            gone = "; ".join(f"{count} {reason}" for reason, count in left_out.of(name).items())
            where = loaded.where(f"data.{name}")
            raise DataError(f"no row is left for {name} ({gone})", where=where, remedy="raise data.max_tokens, or fix the rows")
    return documents | retention_sets(loaded, documents, left_out) if retain else documents


def _fitting(
    name: str, encoder: Encoder, examples: list[Example], spec: JobSpec, left_out: LeftOut, refused: _RejectedRows
) -> list[Document]:
    """Yield documents with something to train on; long rows are handled by `long_rows`."""
    limit = f"data.max_tokens = {spec.data.max_tokens}"
    kept: list[Document] = []
    for document in encoder.encode(examples):
        bad = document if isinstance(document, BadRow) else _nothing_to_learn(document, spec)
        if bad is not None:
            left_out.add(name, f"malformed: {bad.reason}", bad.place)
            if not spec.data.skip_bad_rows:
                refused.bad.append(bad)
            continue
        assert isinstance(document, Document)
        place = document.example.place
        fitted = encoder.fit(document)
        if fitted is not document and spec.data.long_rows == "error":
            refused.too_long[f"{place} ({name})"] = len(document.ids)
        elif fitted is None:
            left_out.add(name, f"longer than {limit}", place)
        else:
            if fitted is not document:
                left_out.add(name, f"longer than {limit}: the {encoder.cut_part} was cut, the row is kept", place)
            kept.append(fitted)
    return kept


def _nothing_to_learn(document: Document, spec: JobSpec) -> BadRow | None:
    """Return why a document has nothing to train on, if so."""
    example = document.example
    if spec.traits.has_labels:
        return None if len(document.ids) else BadRow(example.file, example.line, "the text has no token")
    if document.num_supervised and (example.completion is None or str(example.completion).strip()):
        return None
    if spec.traits.uses_chat_template:
        what = "no turn of the assistant is trained on (empty, of weight 0, or not in the chat template's rendering)"
    elif spec.traits.has_answers:
        what = f"column {spec.data.columns.completion!r} is empty"
    else:
        what = "the text is too short"
    return BadRow(example.file, example.line, f"{what}: nothing to train on")


def _capped(name: str, examples: list[Example], cap: int | None, seed: int, left_out: LeftOut) -> list[Example]:
    """Return a seeded choice of at most `cap` examples, in their order."""
    if cap is None or len(examples) <= cap:
        return examples
    # Chosen at random: files are often sorted, and the first rows are not representative.
    chosen = set(generator(seed, CAPS).permutation(len(examples))[:cap].tolist())
    for index, example in enumerate(examples):
        if index not in chosen:
            left_out.add(name, f"over data.{name}_rows = {cap}", example.place)
    return [example for index, example in enumerate(examples) if index in chosen]


def _classes(documents: dict[str, list[Document]], spec: JobSpec, left_out: LeftOut) -> tuple[str, ...]:
    """Return the class names of train, sorted. Rows of eval and test with a class that train does not have are bad rows.

    Raises:
        DataError: one class only; or bad rows, and `data.skip_bad_rows` is false; or nothing but bad rows.
    """
    classes = tuple(sort_classes(str(document.example.label) for document in documents["train"]))
    if len(classes) < 2:
        what = f"train has only one class: {', '.join(classes)}"
        raise DataError(what, expected="at least two", remedy="check data.columns.label")
    unseen: list[Document] = []
    for name in ("eval", "test"):
        unknown = [document for document in documents[name] if str(document.example.label) not in classes]
        for document in unknown:
            left_out.add(name, f"malformed: its class {document.example.label!r} is not in train", document.example.place)
        # A split must not become empty by skipping.
        if unknown and len(unknown) < len(documents[name]) and spec.data.skip_bad_rows:
            documents[name] = [document for document in documents[name] if str(document.example.label) in classes]
        else:
            unseen += unknown
    if unseen:
        places: dict[str, list[str]] = {}
        for document in unseen:
            places.setdefault(printable(repr(document.example.label)), []).append(printable(document.example.place))
        lines = listed(f"{label} in {len(rows)}: {shown(rows, PLACES)}" for label, rows in places.items())
        raise DataError(
            f"{len(unseen)} row(s) of eval or test with a class that train does not have:\n  {lines}",
            expected=listed(classes, ", "),
            remedy="correct the labels, add rows of every class to train, or drop these rows with data.skip_bad_rows: true",
        )
    note_missing_classes({name: [document.example for document in kept] for name, kept in documents.items()}, left_out)
    return classes


def _to_set(documents: list[Document], classes: tuple[str, ...]) -> TokenizedSet:
    number = {name: index for index, name in enumerate(classes)}
    has_answers = any(document.answer for document in documents)
    return build_set(
        [(document.ids, document.supervised) for document in documents],
        labels=[number[str(document.example.label)] if document.example.label is not None else -1 for document in documents],
        rows=[document.example.line for document in documents],
        prompts=[document.prompt for document in documents] if has_answers else None,
        answers=[document.answer for document in documents] if has_answers else None,
    )


def _summarise(part: TokenizedSet) -> SplitSummary:
    return SplitSummary(
        documents=len(part),
        tokens=part.num_tokens,
        supervised_tokens=int(part.num_supervised.sum()),
        longest_document_tokens=int(part.lengths.max()),
        sha256=part.sha256,
    )


def _show(document: Document, tokenizer: Any) -> str:
    if document.example.label is not None:
        return f"{tokenizer.decode(document.ids.tolist())} -> «{document.example.label}»"
    return mark_supervised(document, tokenizer)
