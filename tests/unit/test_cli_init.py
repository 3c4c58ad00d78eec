"""`orchestrator init`: what it takes a file for, and that its spec is one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.data.reading.guess import guess_use
from orchestrator.errors import DataError
from orchestrator.spec import load_spec

WORDS = ("war", "peace", "labor", "health", "energy", "schools", "taxes")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def rows_of(count: int = 60, **columns) -> list[dict]:
    """Rows whose values are made by a function of the row's number."""
    return [{name: make(number) for name, make in columns.items()} for number in range(count)]


def sentence(number: int) -> str:
    return f"The President spoke of {WORDS[number % 7]} and of {WORDS[number % 5]} in the year {1900 + number}."


def turns(number: int) -> list[dict]:
    return [{"role": "user", "content": sentence(number)}, {"role": "assistant", "content": WORDS[number % 7]}]


CASES = {
    "pair": (
        rows_of(prompt=sentence, completion=lambda n: f"about {n}"),
        "completion",
        {"prompt": "prompt", "completion": "completion"},
    ),
    "question": (
        rows_of(id=str, question=sentence, answer=sentence),
        "completion",
        {"prompt": "question", "completion": "answer"},
    ),
    "capitals": (rows_of(Question=sentence, Answer=sentence), "completion", {"prompt": "Question", "completion": "Answer"}),
    "instruction": (
        rows_of(instruction=sentence, output=sentence),
        "completion",
        {"prompt": "instruction", "completion": "output"},
    ),
    "translation": (rows_of(source=sentence, target=sentence), "completion", {"prompt": "source", "completion": "target"}),
    "summary": (rows_of(document=sentence, summary=sentence), "completion", {"prompt": "document", "completion": "summary"}),
    "answers with numbers": (
        rows_of(question=sentence, answer=lambda n: f"{n}"),
        "completion",
        {"prompt": "question", "completion": "answer"},
    ),
    "messages": (rows_of(messages=turns, id=str), "chat", {"messages": "messages"}),
    "messages by another name": (rows_of(dialog=turns), "chat", {"messages": "dialog"}),
    "messages as text": (rows_of(messages=lambda n: json.dumps(turns(n))), "chat", {"messages": "messages"}),
    "label": (rows_of(text=sentence, label=lambda n: n % 3), "classify", {"text": "text", "label": "label"}),
    "named label": (
        rows_of(id=str, review=sentence, sentiment=lambda n: "good" if n % 2 else "bad"),
        "classify",
        {"text": "review", "label": "sentiment"},
    ),
    "many classes": (
        rows_of(300, text=sentence, intent=lambda n: f"intent {n % 77}"),
        "classify",
        {"text": "text", "label": "intent"},
    ),
    "few answers": (
        rows_of(question=sentence, answer=lambda n: "yes" if n % 3 else "no"),
        "classify",
        {"text": "question", "label": "answer"},
    ),
    "unnamed classes": (rows_of(words=sentence, which=lambda n: WORDS[n % 4]), "classify", {"text": "words", "label": "which"}),
    "text": (rows_of(text=sentence), "text", {"text": "text"}),
    "text and more": (rows_of(id=str, content=sentence, year=lambda n: 1900 + n), "text", {"text": "content"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_taken_for_what_it_is(name: str, tmp_path: Path):
    rows, task, columns = CASES[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    look = guess_use(str(tmp_path / "rows.jsonl"))
    assert (look.task, dict(look.columns)) == (task, columns)


@pytest.mark.parametrize("name", ["question", "messages", "label", "text", "few answers"])
def test_the_spec_that_is_written_renders_reads_its_data_and_plans(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, task, _ = CASES[name]
    (tmp_path / "some data").mkdir()
    (tmp_path / "some data" / "speeches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    made = run("init", "some data/speeches.jsonl")
    assert made.exit_code == 0, made.stderr
    assert f"task      {task}: " in made.stdout
    assert made.stdout.splitlines()[-3:] == [
        "next      orchestrator data spec.yaml",
        "          orchestrator plan spec.yaml",
        "          orchestrator sweep spec.yaml",
    ]
    assert load_spec("spec.yaml").spec.name == "speeches"
    for command in ("render", "data", "plan"):
        done = run(command, "spec.yaml")
        assert done.exit_code == 0, f"{command}: {done.stderr}"


def test_nothing_is_overwritten_and_a_link_is_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text("mine")
    Path("link.yaml").symlink_to("nowhere.yaml")
    for name in ("spec.yaml", "link.yaml"):
        refused = run("init", "--output", name)
        assert refused.exit_code == 2
        assert "is not overwritten" in refused.stderr
    assert Path("spec.yaml").read_text() == "mine"
    assert not Path("nowhere.yaml").exists()


def test_without_data_the_sample_is_taken_and_its_splits_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run("init", "--output", "first.yaml").exit_code == 0
    spec = load_spec("first.yaml").spec
    assert spec.name == "first-run"
    assert str(spec.data.test).endswith("samples/data/test.jsonl")
    assert spec.data.retain is not None


def test_a_folder_of_splits_gives_each_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows, _, _ = CASES["question"]
    folder = Path("qa")
    folder.mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(json.dumps({**row, "id": name}) + "\n" for row in rows))
    assert run("init", "qa").exit_code == 0
    data = load_spec("spec.yaml").spec.data
    assert (data.train, data.eval, data.test) == ("./qa/train-0000*.jsonl", "./qa/validation.jsonl", "./qa/test.jsonl")


def test_lengths_set_the_longest_row_and_what_is_unused_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with Path("long.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "answer", "note\x1b[31m"])
        writer.writerows([number, sentence(number) * 24, sentence(number), "x"] for number in range(80))
    made = run("init", "long.csv")
    assert made.exit_code == 0, made.stderr
    assert "unused    id, note\\x1b[31m" in made.stdout
    assert load_spec("spec.yaml").spec.data.max_tokens == 512


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "no such data file"),
        (["odd.jsonl"], "no columns for a task were found; the rows have a, b, c"),
        (["odd.jsonl", "--task", "chat"], "no columns for the task chat"),
        (["empty.jsonl"], "no row can be read"),
        (["pair.jsonl", "--task", "chatting"], "--task is 'chatting'"),
        (["pair.jsonl", "--base", "./org/model"], "no such folder"),
        (["pair.jsonl", "--base", "org/model"], "hf download org/model"),
        (["hub:org/name"], "not supported yet"),
        (["pair.jsonl", "--output", "no/folder.yaml"], "its folder does not exist"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(arguments, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("odd.jsonl").write_text("".join(json.dumps({"a": 1.5 * n, "b": [n], "c": {"n": n}}) + "\n" for n in range(30)))
    Path("empty.jsonl").write_text("")
    Path("pair.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    refused = run("init", *arguments)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not Path("spec.yaml").exists()


def test_a_task_that_is_given_is_kept_to(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CASES["few answers"][0]))
    assert dict(guess_use(str(tmp_path / "rows.jsonl"), "completion").columns) == {"prompt": "question", "completion": "answer"}
    with pytest.raises(DataError, match="no columns for the task chat"):
        guess_use(str(tmp_path / "rows.jsonl"), "chat")
