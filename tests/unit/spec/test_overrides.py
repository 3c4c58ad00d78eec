"""Values of options in place of the spec's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import load_spec, load_values, spec_sha256
from orchestrator.spec.overrides import parse_path

SPEC = """\
name: x
base: {model: sample}
task: completion
data: {train: rows.jsonl, columns: {prompt: question}}
search: {layers: ["last:2", all], trials: 14}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "x.yaml").write_text(SPEC)
    return tmp_path / "x.yaml"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("search.trials=4", lambda spec: spec.search.num_trials == 4),
        ("search.layers=[last:1, head]", lambda spec: spec.search.layers == ("last:1", "head")),
        ("search.layers[1]=last:4", lambda spec: spec.search.layers == ("last:2", "last:4")),
        ("search.learning_rate.lora=[1e-4, 1e-3]", lambda spec: spec.search.learning_rate.lora == (1e-4, 1e-3)),
        ("search.learning_rate={lora: [1e-4, 1e-3]}", lambda spec: spec.search.learning_rate.lora == (1e-4, 1e-3)),
        (
            "data.columns.completion=answer",
            lambda spec: (spec.data.columns.prompt, spec.data.columns.completion) == ("question", "answer"),
        ),
        ("data.retain=", lambda spec: spec.data.retain is None),
        ('data.separator="\\t=\\n"', lambda spec: spec.data.separator == "\t=\n"),
        ("finetune={}", lambda spec: spec.finetune is not None),
        ("finetune.layers=last:2", lambda spec: spec.finetune.layers == "last:2"),
        ("data.train=[{path: a.jsonl, weight: 2}]", lambda spec: spec.data.train[0].weight == 2),
        ("search.probe=false", lambda spec: spec.search.probe is False),
    ],
)
def test_a_value_takes_the_place_of_the_files(spec: Path, text: str, found):
    assert found(load_spec(spec, [text]).spec)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("serach.trials=4", "--set serach.trials=4: serach: unknown key (did you mean search?)"),
        ("search.trails=4", "--set search.trails=4: search.trails: unknown key (did you mean trials?)"),
        ("search.trials=many", "--set search.trials=many: search.trials: found the text 'many'; expected a whole number above 0"),
        ("search.trials='4'", "drop the quotes"),
        ("search.layers=[last:2, lats:4]", "--set search.layers=[last:2, lats:4]: search.layers[1]"),
        ("search.trials.most=2", "search.trials is not a mapping with keys"),
        ("search.layers[7]=all", "search.layers has 2 items, the last one is [1]"),
        ("search.trials", "no key and value (write key=value"),
        ("=4", "not a key: ''"),
        ("search..trials=4", "not a key: 'search..trials'"),
        ("search.layers=[all", "--set search.layers=[all: search.layers: not valid YAML"),
        ("task=chta", "--set task=chta: task: found the text 'chta'; expected chat | completion | text | classify"),
        ("output=s3://bucket/runs", "--set output=s3://bucket/runs: output: not supported yet"),
    ],
)
def test_a_mistake_is_named_by_its_option(spec: Path, text: str, said: str):
    with pytest.raises(SpecError) as refused:
        load_spec(spec, [text])
    assert said in str(refused.value)
    assert refused.value.exit_code == 2


def test_all_mistakes_of_file_and_options_are_told_at_once(spec: Path):
    spec.write_text(SPEC + "train: {epoch: 2}\n")
    with pytest.raises(SpecError) as refused:
        load_spec(spec, ["search.trials=0", "data.max_tokens=1"])
    said = str(refused.value)
    assert f"{spec}:6:" in said
    assert "--set search.trials=0" in said
    assert "--set data.max_tokens=1" in said


def test_the_later_of_two_values_counts_and_an_override_mends_the_file(spec: Path):
    spec.write_text(SPEC.replace("trials: 14", "trials: many"))
    loaded = load_spec(spec, ["search.trials=3", "search.trials=5"])
    assert loaded.spec.search is not None
    assert loaded.spec.search.trials == 5


def test_the_run_records_the_resolved_spec_and_what_changed_it(spec: Path):
    plain, changed = load_spec(spec), load_spec(spec, ["train.epochs=3"])
    assert plain.text == SPEC
    assert changed.text.startswith("# Resolved from x.yaml, changed by\n#   --set train.epochs=3\n")
    assert "epochs: 3" in changed.text
    again = spec.with_name("again.yaml")
    again.write_text(changed.text)
    assert load_spec(again).spec == changed.spec


def test_the_identity_of_a_run_covers_them(spec: Path):
    hashes = [spec_sha256(load_spec(spec, texts).spec, "sweep") for texts in ([], ["train.epochs=3"], ["search.trials=99"])]
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2], "raising the trials extends a run"


def test_an_error_that_is_found_later_names_the_option(spec: Path):
    loaded = load_spec(spec, ["search.layers=[last:2, all]"])
    assert loaded.where("search.layers[1]") == "--set search.layers=[last:2, all]"
    assert loaded.where("data.train").endswith("x.yaml:4:15")


def test_a_dictionary_is_judged_like_a_file(tmp_path: Path):
    values = {"name": "x", "base": {"model": "sample"}, "task": "text", "data": {"train": tmp_path / "a.txt"}}
    loaded = load_values(values, tmp_path, {"search.layers": ("all",), "train.epochs": 1})
    assert loaded.folder == tmp_path
    assert loaded.spec.train.epochs == 1
    assert loaded.text.startswith("# Resolved from a program's values")
    with pytest.raises(SpecError, match=r"overrides\['search.trails'\]: search.trails: unknown key \(did you mean trials"):
        load_values(values, tmp_path, {"search.trails": 2})
    with pytest.raises(SpecError, match="the given spec: task: found the text 'txt'"):
        load_values({**values, "task": "txt"}, tmp_path)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("a", ("a",)),
        ("a.b[2].c", ("a", "b", 2, "c")),
        ("a[0][1]", ("a", 0, 1)),
        (".a", ()),
        ("a.", ()),
        ("a b", ()),
        ("[0]", ()),
        ("", ()),
    ],
)
def test_keys_are_dotted(key: str, path: tuple):
    assert parse_path(key) == path
