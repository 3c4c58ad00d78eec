"""A finished bundle that answers: a prompt at a time, and a file of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.errors import DataError, UsageError
from orchestrator.serve import commit_bundle, stage_bundle, trained_model, verify
from orchestrator.serve.predict import Question, answer_all, open_predictor
from orchestrator.transfer.records import TransferReport

from .test_bundle import CLASSES, Trials

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w7 {% endif %}"


def make_bundle(folder: Path, task: str) -> Path:
    trials = Trials(folder, task=task)
    if task == "chat":
        (trials.base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    values = {
        "name": "asked",
        "base": {"model": str(trials.base)},
        "task": task,
        "data": {"train": "rows.jsonl", "separator": " w5 "},
    }
    values["data"]["columns"] = {"prompt": "question"}
    inputs = trials.trial(spec=values)
    staged = stage_bundle(inputs, folder / "run" / "bundle")
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    return commit_bundle(staged, inputs, TransferReport(verdict="positive", sentence="positive", verification=figures))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("completion"), "completion")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("classify"), "classify")


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def by_hand(bundle: Path, text: str, count: int) -> str:
    """The greedy answer of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


def test_an_answer_is_that_of_plain_transformers_alone_streamed_and_in_a_batch(bundle: Path):
    predictor = open_predictor(bundle)
    questions = [Question(text) for text in ("w1 w2 w3", "w9", "w10 w11 w12 w13 w14 w15 w16")]
    batched = dict(answer_all(predictor, questions, 6))
    for number, question in enumerate(questions):
        pieces: list[str] = []
        streamed = predictor.stream(question, pieces.append, 6)
        assert streamed == predictor.answer([question], 6)[0]
        assert "".join(pieces).strip() == streamed.text.strip()
        assert streamed.text == by_hand(bundle, f"{question.content} w5 ", 6)
        assert batched[number].text == streamed.text
        assert not streamed.ended


def test_what_ends_an_answer_is_what_the_bundles_generation_config_says(bundle: Path, tmp_path: Path):
    """The token that the model happens to say third is made an end token."""
    predictor = open_predictor(bundle)
    third = predictor.tokenizer(predictor.answer([Question("w1 w2")], 6)[0].text, add_special_tokens=False)["input_ids"][2]
    predictor.model.generation_config.eos_token_id = [2, third]
    ending = type(predictor)(**{**vars(predictor), "end_ids": frozenset({2, third})})
    answer = ending.answer([Question("w1 w2"), Question("w3")], 6)[0]
    assert answer.ended
    assert len(answer.text.split()) <= 2


def test_a_file_is_answered_in_its_own_order_and_never_overwritten(bundle: Path, tmp_path: Path):
    rows = [{"question": " ".join(["w1"] * (1 + number % 5)), "completion": "w2", "id": number} for number in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("predict", bundle, file, "--max-tokens", 4, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["rows"] == 20
    target = tmp_path / "rows.predictions.jsonl"
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == list(range(1, 21))
    assert [answer["prompt"] for answer in answers] == [row["question"] for row in rows]
    assert answers[0]["answer"] == answers[5]["answer"], "the same question"
    before = target.read_bytes()
    refused = run("predict", bundle, file)
    assert refused.exit_code == 2
    assert "is not overwritten" in refused.stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"question": "w1"}\n{"question": {"w1": 3}}\n{"ask": "w2"}\n',
            ["2 rows cannot be answered", "rows.jsonl:2", "rows.jsonl:3"],
        ),
        ('{"question": "w1"}\n{broken\n', ["rows.jsonl:2", "malformed JSON"]),
        ('{"question": "  "}\n', ["rows.jsonl:1", "the prompt is empty"]),
        ('{"question": "' + "w1 " * 80 + '"}\n', ["rows.jsonl:1: 82 tokens, and the model has 64 positions"]),
        ("", ["holds no row"]),
    ],
)
def test_rows_that_cannot_be_asked_are_named_and_nothing_is_written(bundle: Path, tmp_path: Path, content: str, said: list[str]):
    (tmp_path / "rows.jsonl").write_text(content)
    refused = run("predict", bundle, tmp_path / "rows.jsonl")
    assert refused.exit_code == 2
    for part in said:
        assert part in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_classes_come_with_their_probabilities(classifier: Path, tmp_path: Path):
    (tmp_path / "texts.csv").write_text("text,label\nw1 w2 w3,low\nw4,mid\n")
    done = run("predict", classifier, tmp_path / "texts.csv", "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == ["w1 w2 w3", "w4"]
    for answer in answers:
        assert set(answer["probabilities"]) == set(CLASSES)
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0, abs=1e-3)
        assert answer["class"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)
    talked = run("chat", classifier, stdin="w1 w2 w3\n")
    assert talked.exit_code == 0
    assert answers[0]["class"] in talked.stdout.split()[0]
    with pytest.raises(UsageError, match="has no classes"):
        open_predictor(classifier, untouched=True)


def test_a_conversation_goes_on_and_begins_anew(tmp_path: Path):
    bundle = make_bundle(tmp_path, "chat")
    predictor = open_predictor(bundle)
    first = predictor.answer([Question(({"role": "user", "content": "w1"},))], 4)[0].text
    talked = run("chat", bundle, "--max-tokens", 4, "--base", stdin="w1\nw2\n/reset\nw1\n/quit\nw3\n")
    assert talked.exit_code == 0, talked.stderr
    tuned = [line.removeprefix("tuned: ") for line in talked.stdout.splitlines() if line.startswith("tuned: ")]
    assert len(tuned) == 3
    assert tuned[0] == tuned[2] == first
    assert sum(line.startswith("base: ") for line in talked.stdout.splitlines()) == 3
    turns = [("user", "w1"), ("assistant", first), ("user", "w2")]
    history = Question(tuple({"role": role, "content": content} for role, content in turns))
    assert tuned[1] == predictor.answer([history], 4)[0].text
    rows = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w9"}]}, {"prompt": "w1"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("predict", bundle, tmp_path / "rows.jsonl", "--max-tokens", 4).exit_code == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "rows.predictions.jsonl").read_text().splitlines()]
    assert answers == [first, first], "an answer in the row is not read"


def test_a_damaged_or_missing_bundle_is_refused(bundle: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"question": "w1"}\n')
    for command in (["chat", tmp_path], ["predict", tmp_path, tmp_path / "rows.jsonl"]):
        refused = run(*command)
        assert refused.exit_code == 2
        assert "not a bundle" in refused.stderr
    with pytest.raises(DataError, match="64 positions"):
        open_predictor(bundle).answer([Question("w1 " * 90)], 4)
