"""The text the sample base learns from: public-domain speeches, standard-library docstrings, household sentences."""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from scripts.sample_base import household

MIN_DOCSTRING_CHARS = 80
# Long enough to give several retention rows, short enough that holding them out costs little training text.
HELDOUT_CHARS = range(8_000, 30_000)
NUM_HELDOUT_SPEECHES = 8
NUM_HOUSEHOLD_DOCUMENTS = 200
PARAGRAPHS_PER_DOCUMENT = 8
RETENTION_ROW_WORDS = 250
RETENTION_ROWS_PER_SPEECH = 5


@dataclass(frozen=True)
class Corpus:
    """Documents by source, and the speeches that training never sees."""

    speeches: tuple[str, ...]
    docstrings: tuple[str, ...]
    household: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def train(self) -> list[str]:
        return [*self.speeches, *self.docstrings, *self.household]


def read_speeches(files: list[Path]) -> list[str]:
    """`{"text"}` rows of all files, line breaks inside a paragraph joined: they are an artefact of the source."""
    texts = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            paragraphs = re.split(r"\n\s*\n", json.loads(line)["text"])
            texts.append("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
    return texts


def module_docstrings(path: Path) -> list[str]:
    """Every docstring in one source file, in order; nothing for files that this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of the library's own tests hold invalid escapes on purpose
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text and len(text) >= MIN_DOCSTRING_CHARS]


def read_docstrings() -> list[str]:
    """One document per standard-library module, and the language reference that `help()` shows."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents, seen = [], set()
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.relative_to(library).parts:
            continue
        fresh = [text for text in dict.fromkeys(module_docstrings(path)) if text not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    topics = importlib.import_module("pydoc_data.topics").topics
    documents.extend(text for _, text in sorted(topics.items()) if len(text) >= MIN_DOCSTRING_CHARS)
    return documents


def write_household(seed: int) -> list[str]:
    paragraphs = household.paragraphs(NUM_HOUSEHOLD_DOCUMENTS * PARAGRAPHS_PER_DOCUMENT, seed)
    starts = range(0, len(paragraphs), PARAGRAPHS_PER_DOCUMENT)
    return ["\n\n".join(paragraphs[start : start + PARAGRAPHS_PER_DOCUMENT]) for start in starts]


def collect(speech_files: list[Path], seed: int) -> Corpus:
    """All the text, with the held-out speeches drawn by `seed` and taken out whole."""
    speeches = read_speeches(speech_files)
    candidates = [index for index, text in enumerate(speeches) if len(text) in HELDOUT_CHARS]
    chosen = set(random.Random(seed).sample(candidates, NUM_HELDOUT_SPEECHES))
    return Corpus(
        speeches=tuple(text for index, text in enumerate(speeches) if index not in chosen),
        docstrings=tuple(read_docstrings()),
        household=tuple(write_household(seed)),
        heldout=tuple(speeches[index] for index in sorted(chosen)),
    )


def retention_rows(text: Corpus) -> list[str]:
    """The beginning of each held-out speech in rows of at most RETENTION_ROW_WORDS words."""
    rows = []
    for speech in text.heldout:
        words = speech.split()[: RETENTION_ROWS_PER_SPEECH * RETENTION_ROW_WORDS]
        starts = range(0, len(words), RETENTION_ROW_WORDS)
        rows.extend(" ".join(words[start : start + RETENTION_ROW_WORDS]) for start in starts)
    return rows
