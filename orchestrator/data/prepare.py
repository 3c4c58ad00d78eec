"""From a spec's data section to tokenised sets on disk, with a count of everything that was left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from orchestrator.data.batching import documents_of_steps
from orchestrator.data.encoding import Document, Encoder, load_tokenizer, mark_supervised
from orchestrator.data.gather import Sources, bad_rows_error, find_sources, read_examples
from orchestrator.data.reading import BadRow
from orchestrator.data.retention import retention_sets
from orchestrator.data.rows import RETENTION_TASKS, Example
from orchestrator.data.seeded import CAPS, generator
from orchestrator.data.sets import TokenizedSet, build_set
from orchestrator.data.splits import make_splits
from orchestrator.data.summary import DataSummary, LeftOut, SplitSummary, listed
from orchestrator.errors import DataError, IntegrityError, RunConflictError
from orchestrator.plan.remedies import most_replayed_tokens, needs_replayed_text
from orchestrator.plan.values import DataSize
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import JobSpec
from orchestrator.store import read_json, sha256_file, write_json
from orchestrator.values import content_hash

SETS = ("train", "eval", "test", "retain", "replay")
FORMAT = 2
CLASSIFY_FORMAT = 3
RETENTION_FORMAT = 4
"""Raised when the same inputs give other sets, so that older ones are made anew: those that are concerned."""
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


def prepare_data(loaded: LoadedSpec, tokenizer_folder: Path, out_folder: Path, *, keep: bool = False) -> DataSummary:
    """Read, check, split, tokenise; write train, eval, test, retain and replay .npz and summary.json.

    Called again with the same inputs it returns what it wrote, once the sets are found to be whole.

    Args:
        tokenizer_folder: The base's folder.
        out_folder: Made where it does not exist; summary.json is written last.
        keep: Trials were trained on the sets that are there: refuse other inputs instead of replacing them.

    Raises:
        DataError: a file is missing, rows cannot be used (all of them are named), a split or a row has nothing to
            learn from.
        RunConflictError: other inputs, and `keep`.
        BaseError: the base has no tokenizer, or no chat template where the task needs one.
    """
    spec = loaded.spec
    left_out = LeftOut(loaded.folder)
    sources = find_sources(loaded, left_out)
    inputs = _inputs_sha256(spec, sources, tokenizer_folder)
    known = _made_before(out_folder, inputs)
    if known is not None:
        return known
    if keep and _inputs_of(out_folder) not in (None, inputs):
        raise RunConflictError(
            "the data has changed since this run began",
            where=str(out_folder),
            expected="the files, tokenizer and data section that its trials were trained on",
            remedy="put them back, or choose another `name`; nothing was overwritten",
        )
    found = read_examples(spec, sources, left_out)
    parts = make_splits(loaded, found, left_out)
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = _encode_all(loaded, tokenizer, parts, found.get("retain", []), left_out)
    classes = _classes(documents) if spec.task == "classify" else ()
    sets = {name: _to_set(docs, classes) for name, docs in documents.items()}
    summary = DataSummary(
        inputs_sha256=inputs,
        splits={name: _summarise(part) for name, part in sets.items()},
        dropped=left_out.summary(),
        notices=tuple(left_out.notices),
        classes=classes,
        class_counts=tuple(np.bincount(sets["train"].labels, minlength=len(classes)).tolist()) if classes else (),
        files=tuple(left_out.relative(str(path)) for entries in sources.values() for entry in entries for path in entry.files),
        one_example=_show(documents["train"][0], tokenizer),
    )
    out_folder.mkdir(parents=True, exist_ok=True)
    (out_folder / "summary.json").unlink(missing_ok=True)
    for name in SETS:
        (out_folder / f"{name}.npz").unlink(missing_ok=True)
    for name, part in sets.items():
        part.save(out_folder / f"{name}.npz")
    write_json(out_folder / "summary.json", summary)
    return summary


def data_size(summary: DataSummary, spec: JobSpec, folder: Path) -> DataSize:
    """What the plan needs to know, exactly.

    Args:
        folder: Where `prepare_data` wrote the sets: the number of steps depends on every document's length.
    """
    train = TokenizedSet.load(folder / "train.npz")
    steps = documents_of_steps(train.offsets, spec.train.tokens_per_step, spec.train.seed, 0)
    splits = summary.splits
    supervised = splits["train"].documents if summary.classes else splits["train"].supervised_tokens
    return DataSize(
        train_documents=splits["train"].documents,
        train_tokens=splits["train"].tokens,
        steps_per_epoch=len(steps),
        eval_tokens=splits["eval"].tokens,
        retain_tokens=splits["retain"].tokens if "retain" in splits else 0,
        replay_tokens=splits["replay"].tokens if "replay" in splits else 0,
        longest_document_tokens=max(part.longest_document_tokens for part in splits.values()),
        num_classes=len(summary.classes),
        class_names=summary.classes,
        supervised_share=supervised / max(1, splits["train"].tokens),
        document_tokens=float(np.square(train.lengths, dtype=np.float64).sum() / max(1, splits["train"].tokens)),
        sets_sha256=content_hash({name: part.sha256 for name, part in splits.items()}),
    )


def _inputs_of(folder: Path) -> str | None:
    """The inputs' hash of an earlier call; None where its summary is missing or damaged."""
    try:
        return DataSummary.model_validate(read_json(folder / "summary.json")).inputs_sha256
    except (FileNotFoundError, IntegrityError, ValidationError):
        return None


def _made_before(folder: Path, inputs_sha256: str) -> DataSummary | None:
    """The summary of an earlier call with the same inputs whose sets are all whole."""
    file = folder / "summary.json"
    if not file.exists():
        return None
    try:
        known = DataSummary.model_validate(read_json(file))
        if known.inputs_sha256 == inputs_sha256 and all(
            TokenizedSet.load(folder / f"{name}.npz").sha256 == split.sha256 for name, split in known.splits.items()
        ):
            return known
    except (IntegrityError, DataError, ValidationError):
        return None
    return None


def _inputs_sha256(spec: JobSpec, sources: Sources, tokenizer_folder: Path) -> str:
    files = {name: [[sha256_file(path) for path in entry.files] for entry in entries] for name, entries in sources.items()}
    found = sorted({path for pattern in TOKENIZER_FILES for path in tokenizer_folder.glob(pattern) if path.is_file()})
    tokenizer = {path.name: sha256_file(path) for path in found}
    section = spec.data.model_dump(mode="json")
    number = RETENTION_FORMAT if "retain" in sources else CLASSIFY_FORMAT if spec.task == "classify" else FORMAT
    inputs = {"format": number, "files": files, "tokenizer": tokenizer, "data": section, "task": spec.task}
    return content_hash(inputs | {"seed": spec.train.seed} | _replay_inputs(spec))


def _replay_inputs(spec: JobSpec) -> dict[str, int]:
    """How much is replayed of each token that is trained on decides how much text is kept for it."""
    return {"replay": most_replayed_tokens(spec, 10**6)} if needs_replayed_text(spec) else {}


@dataclass
class _Refused:
    """Rows that stop the run, collected over the splits so that all are told at once."""

    bad: list[BadRow] = field(default_factory=list)
    unsupervised: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)

    def raise_any(self, loaded: LoadedSpec) -> None:
        if self.bad:
            raise bad_rows_error(self.bad)
        if self.unsupervised:
            raise DataError(
                f"{len(self.unsupervised)} row(s) without a supervised token, from which nothing could be learned:\n  "
                + listed(self.unsupervised),
                expected="an answer that is not empty (chat: at least one turn of the assistant)",
                remedy="remove or mend these rows",
            )
        if self.too_long:
            raise DataError(
                f"{len(self.too_long)} row(s) longer than data.max_tokens = {loaded.spec.data.max_tokens}:\n"
                f"  {listed(self.too_long)}",
                where=loaded.where("data.long_rows"),
                remedy="raise data.max_tokens, or set data.long_rows to drop or truncate_prompt",
            )


def _encode_all(
    loaded: LoadedSpec, tokenizer: Any, parts: dict[str, list[Example]], retain: list[Example], left_out: LeftOut
) -> dict[str, list[Document]]:
    spec = loaded.spec
    caps = {"eval": spec.data.eval_rows, "test": spec.data.test_rows}
    encoder = Encoder(tokenizer, spec.task, spec.data)
    refused = _Refused()
    documents: dict[str, list[Document]] = {}
    for name, examples in parts.items():
        chosen = _capped(name, examples, caps.get(name), spec.train.seed, left_out)
        documents[name] = _fitting(name, encoder, chosen, spec, left_out, refused)
    if retain:
        documents["retain"] = _encode_retention(tokenizer, retain, spec, left_out, refused)
    refused.raise_any(loaded)
    for name, kept in documents.items():
        if not kept:
            gone = "; ".join(f"{count} {reason}" for reason, count in left_out.of(name).items())
            where = loaded.where(f"data.{name}")
            raise DataError(f"no row is left for {name} ({gone})", where=where, remedy="raise data.max_tokens, or mend the rows")
    return documents | retention_sets(loaded, documents, left_out) if retain else documents


def _encode_retention(
    tokenizer: Any, retain: list[Example], spec: JobSpec, left_out: LeftOut, refused: _Refused
) -> list[Document]:
    """Every row by the columns that it has, whatever the spec's task."""
    kept: list[Document] = []
    for task in RETENTION_TASKS:
        rows = [example for example in retain if example.retention_task == task]
        if rows:
            read_so = spec.model_copy(update={"task": task})
            kept += _fitting("retain", Encoder(tokenizer, task, spec.data), rows, read_so, left_out, refused)
    return kept


def _fitting(
    name: str, encoder: Encoder, examples: list[Example], spec: JobSpec, left_out: LeftOut, refused: _Refused
) -> list[Document]:
    """Documents with something to learn, long rows by `long_rows`."""
    limit = f"data.max_tokens = {spec.data.max_tokens}"
    kept: list[Document] = []
    for document in encoder.encode(examples):
        if isinstance(document, BadRow):
            left_out.add(name, f"malformed: {document.reason}", document.place)
            if not spec.data.skip_bad_rows:
                refused.bad.append(document)
            continue
        place = document.example.place
        if not (len(document.ids) if spec.task == "classify" else document.num_supervised):
            refused.unsupervised.append(f"{place} ({name})")
            continue
        fitted = encoder.fit(document)
        if fitted is not document and spec.data.long_rows == "error":
            refused.too_long.append(f"{place} ({name}): {len(document.ids)} tokens")
        elif fitted is None:
            left_out.add(name, f"longer than {limit}", place)
        else:
            if fitted is not document:
                left_out.add(name, f"longer than {limit}: the {encoder.cut_part} was cut, the row is kept", place)
            kept.append(fitted)
    return kept


def _capped(name: str, examples: list[Example], cap: int | None, seed: int, left_out: LeftOut) -> list[Example]:
    """A seeded choice of at most `cap` examples, in their order."""
    if cap is None or len(examples) <= cap:
        return examples
    chosen = set(generator(seed, CAPS).permutation(len(examples))[:cap].tolist())
    for index, example in enumerate(examples):
        if index not in chosen:
            left_out.add(name, f"over data.{name}_rows = {cap}", example.place)
    return [example for index, example in enumerate(examples) if index in chosen]


def _classes(documents: dict[str, list[Document]]) -> tuple[str, ...]:
    """Class names of train, sorted.

    Raises:
        DataError: one class only, or a class that train does not have.
    """
    classes: tuple[str, ...] = tuple(sorted({str(document.example.label) for document in documents["train"]}))
    if len(classes) < 2:
        what = f"train has one class only: {', '.join(classes)}"
        raise DataError(what, expected="at least two", remedy="check data.columns.label")
    unseen = [
        f"{document.example.place} ({name}): {document.example.label}"
        for name in ("eval", "test")
        for document in documents[name]
        if str(document.example.label) not in classes
    ]
    if unseen:
        raise DataError(
            f"{len(unseen)} row(s) with a class that train does not have:\n  {listed(unseen)}",
            expected=listed(classes, ", "),
            remedy="mend the labels, or give train rows of every class",
        )
    return classes


def _to_set(documents: Iterable[Document], classes: tuple[str, ...]) -> TokenizedSet:
    documents = list(documents)
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
