"""`orchestrator chat` and `predict`: answers from a bundle."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.output import print_json
from orchestrator.errors import DataError, UsageError

if TYPE_CHECKING:
    from orchestrator.serve.predict import Answer, Messages, Predictor

NEW_TOKENS = 256
TELL_EVERY_S = 10.0
SHOWN_CLASSES = 5
HELP = "type a question per line; /reset starts a new conversation, /quit or end of input exits"

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, such as runs/quickstart/bundle.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum number of tokens in an answer.")]
BaseFolder = Annotated[
    Path | None, typer.Option("--base-folder", metavar="DIR", help="The base model's folder, if it has moved.")
]


def chat(
    bundle: BundlePath,
    base: Annotated[bool, typer.Option("--base", help="Also answer with the base model, for comparison.")] = False,
    base_folder: BaseFolder = None,
    max_tokens: MaxTokens = NEW_TOKENS,
) -> None:
    """Talk to a bundle: questions from the terminal or a pipe, answers streamed."""
    _quieten()
    from orchestrator.serve.predict import open_predictor

    models = {"tuned": open_predictor(bundle)}
    if base or base_folder is not None:
        models["base"] = open_predictor(bundle, untouched=True, base=base_folder)
    tuned = models["tuned"]
    print(f"{tuned.name}: {tuned.task}; {HELP}", file=sys.stderr, flush=True)
    turns: dict[str, Messages] = dict.fromkeys(models, ())
    for line in _lines():
        if line == "/reset":
            turns = dict.fromkeys(models, ())
            continue
        for name, predictor in models.items():
            if len(models) > 1:
                print(f"{name}: ", end="", flush=True)
            turns[name] = _reply(predictor, line, turns[name], max_tokens)


def _lines() -> Iterator[str]:
    """Yield questions until the input ends, /quit, or an interrupt at the prompt."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line or line.strip() in ("/quit", "/exit"):
            return
        if line.strip() in ("/help", "/?"):
            print(HELP, file=sys.stderr, flush=True)
        elif line.strip():
            yield line.strip() if line.startswith("/") else line.rstrip("\n")


def _reply(predictor: Predictor, line: str, turns: Messages, max_tokens: int) -> Messages:
    """Print the answer and return the conversation extended by question and answer; unchanged if it cannot be answered."""
    from orchestrator.serve.predict import Question, with_turn

    asked = with_turn(turns, "user", line) if predictor.chats else ()
    try:
        answer = predictor.stream(Question(asked or line), _write, max_tokens)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return turns
    except KeyboardInterrupt:
        print(flush=True)
        return turns
    print(_classes(answer), flush=True)
    if not answer.ended:
        print(
            f"[cut off after {max_tokens} tokens, or where the model's positions end; --max-tokens]", file=sys.stderr, flush=True
        )
    return with_turn(asked, "assistant", answer.text) if asked else ()


def _write(piece: str) -> None:
    """Print a piece of an answer, with control codes made visible."""
    from orchestrator.units import printable

    print("".join(char if char in "\n\t" else printable(char) for char in piece), end="", flush=True)


def _classes(answer: Answer) -> str:
    if answer.probabilities is None:
        return ""
    shown = list(answer.probabilities.items())[:SHOWN_CLASSES]
    return "   ".join(f"{name} {share:.1%}" for name, share in shown)


def predict(
    bundle: BundlePath,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows with prompts, messages or texts.")],
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Answers; FILE.predictions.jsonl.")] = None,
    max_tokens: MaxTokens = NEW_TOKENS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Answer or classify every row of a file, into a JSON Lines file."""
    from orchestrator.store import write_atomic

    target = _target(file, output)
    if not (bundle / "manifest.json").is_file():
        raise UsageError("not a bundle: there is no manifest.json", where=str(bundle), expected="a bundle/ folder of a run")
    _quieten()
    from orchestrator.serve.predict import open_predictor, read_spec
    from orchestrator.serve.prediction_rows import answer_row, read_questions
    from orchestrator.spec.models import DataSpec

    spec = read_spec(bundle)
    asked = read_questions(file, spec["task"], DataSpec.model_validate(spec["data"]))
    predictor, started = open_predictor(bundle), time.monotonic()
    answers = _answers(predictor, [one.question for one in asked], max_tokens)
    several = len({one.file for one in asked}) > 1
    rows = [answer_row(one, answer, predictor.task, several_files=several) for one, answer in zip(asked, answers, strict=True)]
    if os.path.lexists(target):
        raise UsageError("the file was created meanwhile, and is not overwritten", where=str(target))
    write_atomic(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    cut = sum(not answer.ended for answer in answers)
    if as_json:
        print_json({"output": str(target), "rows": len(rows), "cut_off": cut, "seconds": time.monotonic() - started})
        return
    note = f", {cut} cut off at {max_tokens} tokens" if cut else ""
    print(f"{len(rows):,} rows answered in {time.monotonic() - started:.1f}s{note}: {target}")


def _target(file: str, output: Path | None) -> Path:
    """Return the file to write the answers to.

    Raises:
        UsageError: it exists, its folder does not, or none was given for a folder or a glob.
    """
    if output is None:
        if not Path(file).is_file():
            what = "no such file" if not Path(file).is_dir() and not set(file) & set("*?[") else "not one file"
            raise UsageError(what, where=file, expected="a file of rows", remedy="for a folder or a glob, give --output too")
        output = Path(file).with_name(f"{Path(file).name.split('.')[0]}.predictions.jsonl")
    if os.path.lexists(output):
        raise UsageError("the file exists, and is not overwritten", where=str(output), remedy="give another file with --output")
    if not output.absolute().parent.is_dir():
        raise UsageError("its folder does not exist", where=str(output), remedy="create it, or give another --output")
    return output


def _answers(predictor: Predictor, questions: list, max_tokens: int) -> list[Answer]:
    """Return the answers in the order of the questions, printing progress every TELL_EVERY_S."""
    from orchestrator.serve.predict import answer_all

    found: dict[int, Answer] = {}
    told = started = time.monotonic()
    for number, answer in answer_all(predictor, questions, max_tokens):
        found[number] = answer
        now = time.monotonic()
        if now - told >= TELL_EVERY_S:
            told = now
            rate = len(found) / (now - started)
            print(f"{len(found):,} of {len(questions):,} rows, {rate:.1f} rows/s", file=sys.stderr, flush=True)
    return [found[number] for number in range(len(questions))]


def _quieten() -> None:
    """Silence the progress bars and warnings of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
