"""Every kind of bad spec: the exact place, the message, the hint."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from orchestrator.errors import SpecError, SpecProblem, UsageError
from orchestrator.plan import read_cluster_file
from orchestrator.spec import load_spec
from orchestrator.spec.source import read_source

GOOD = """\
name: tutor
base:
  model: sample
task: completion
data:
  train: train.jsonl
  max_tokens: 512
train:
  epochs: 2
search:
  layers: [head, "last:2"]
  learning_rate: {lora: [1e-4, 5e-3]}
"""


def problems_of(path: Path, text: str | bytes) -> list[SpecProblem]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def one_problem(tmp_path: Path, old: str, new: str) -> SpecProblem:
    assert old in GOOD
    problems = problems_of(tmp_path / "spec.yaml", GOOD.replace(old, new, 1))
    assert len(problems) == 1, problems
    return problems[0]


ROWS = [
    # unknown keys: at the key
    ("  epochs: 2", "  epoch: 2", "train.epoch", 9, 3, "unknown key", "did you mean epochs?"),
    ("task: completion", "task: completion\nepochs: 3", "epochs", 5, 1, "unknown key", "it belongs under train"),
    ("  epochs: 2", "  zebra: 2", "train.zebra", 9, 3, "unknown key", "known here: epochs"),
    ("  learning_rate: {lora", "  learning-rate: {lora", "search.learning-rate", 12, 3, "unknown key", "learning_rate"),
    # wrong types: at the value
    ("epochs: 2", 'epochs: "2"', "train.epochs", 9, 11, "'2'", "drop the quotes"),
    ("[1e-4, 5e-3]", '["1e-4", 5e-3]', "search.learning_rate.lora[0]", 12, 26, "'1e-4'", "drop the quotes"),
    ("max_tokens: 512", "max_tokens: true", "data.max_tokens", 7, 15, "found true; expected a whole number", ""),
    ("max_tokens: 512", "max_tokens: 51.5", "data.max_tokens", 7, 15, "found 51.5; expected a whole number", ""),
    ("epochs: 2", "epochs: 0", "train.epochs", 9, 11, "expected a number above 0", ""),
    ("epochs: 2", "epochs: .nan", "train.epochs", 9, 11, "expected a number above 0, finite", ""),
    ("epochs: 2", "epochs: .inf", "train.epochs", 9, 11, "found inf; expected a number above 0, finite", ""),
    ("epochs: 2", "warmup: 5%", "train.warmup", 9, 11, "'5%'", "write 0.05"),
    ("max_tokens: 512", "pack: yes", "data.pack", 7, 9, "expected true or false", "write true"),
    ("max_tokens: 512", "eval: 2", "data.eval", 7, 9, "above 0 and below 1", ""),
    ("max_tokens: 512", 'eval: "0.1"', "data.eval", 7, 9, "a share is a number", "drop the quotes"),
    ("train: train.jsonl", "train: [{path: 3}]", "data.train[0].path", 6, 18, "expected text", "put it in quotes"),
    ("train: train.jsonl", "train: [{weight: 3}]", "data.train[0].path", 6, 11, "is missing", ""),
    ("name: tutor", "name: my tutor", "name", 1, 7, "letters, digits", ""),
    ("name: tutor", "name: 7", "name", 1, 7, "found 7", "put it in quotes"),
    ("  epochs: 2", "", "train", 8, 1, "the value is empty", "leave the key out"),
    ('[head, "last:2"]', "last:2", "search.layers", 11, 11, "expected a list", "write a list"),
    ('[head, "last:2"]', "[]", "search.layers", 11, 11, "empty list; expected a list of at least one", ""),
    ('[head, "last:2"]', "[head, {last: 2}]", "search.layers[1]", 11, 18, "mapping (last)", 'write "last:2"'),
    ("{lora: [1e-4, 5e-3]}", "[1e-4, 5e-3]", "search.learning_rate", 12, 18, "keys lora, full", "{lora: ...}"),
    ("[1e-4, 5e-3]", "[1e-4]", "search.learning_rate.lora", 12, 25, "a pair [low, high]", ""),
    ("[1e-4, 5e-3]", "[1e-4, 5e-3, 1]", "search.learning_rate.lora", 12, 25, "a pair [low, high]", ""),
    # choices
    ("task: completion", "task: complete", "task", 4, 7, "chat | completion | text | classify", "did you mean completion?"),
    ("model: sample", "model: sample\n  quantize: nf", "base.quantize", 4, 13, "none | nf4 | int8", "did you mean nf4?"),
    ("train:\n", "resources: {zero: true}\ntrain:\n", "resources.zero", 8, 19, "0 | 1 | 2 | 3 | auto", ""),
    ("train:\n", 'resources: {zero: "2"}\ntrain:\n', "resources.zero", 8, 19, "'2'", "drop the quotes"),
    ("train:\n", "resources: {gangs: atuo}\ntrain:\n", "resources.gangs", 8, 20, "or auto", "did you mean auto?"),
    # missing keys: at the parent
    ("name: tutor\n", "", "name", 1, 1, "is missing", ""),
    ("  model: sample", "  revision: main", "base.model", 2, 1, "is missing; expected text", ""),
    ("  train: train.jsonl\n", "", "data.train", 5, 1, "is missing", ""),
    # what only the whole spec can tell
    ("epochs: 2", "tokens_per_step: atuo", "train.tokens_per_step", 9, 20, "above 0 or auto", "did you mean auto?"),
    ("epochs: 2", "tokens_per_step: true", "train.tokens_per_step", 9, 20, "a whole number above 0 or auto", ""),
    ("epochs: 2", "tokens_per_step: 100", "data.max_tokens", 7, 15, "max_tokens (512)", "lower data.max_tokens to 100"),
    ("  max_tokens: 512\ntrain:\n", "train:\n  tokens_per_step: 100\n", "train.tokens_per_step", 8, 20, "max_tokens (512)", ""),
    ("[1e-4, 5e-3]", "[5e-3, 1e-4]", "search.learning_rate.lora", 12, 25, "is reversed", "write [0.0001, 0.005]"),
    ("max_tokens: 512", "eval: 0.5\n  test: 0.5", "data.eval", 7, 9, "nothing is left", ""),
    ("max_tokens: 512", "columns: {label: c}", "data.columns.label", 7, 20, "does not use this column", "prompt and completion"),
    ("max_tokens: 512", "columns: {completion: prompt}", "data.columns.completion", 7, 25, "already the column of prompt", ""),
    ("max_tokens: 512", "columns: {prompt: ''}", "data.columns.prompt", 7, 21, "empty", ""),
    ("train:\n", "classify: {pooling: mean}\ntrain:\n", "classify", 8, 11, "has no classifier", "write task: classify"),
    ("train:\n", "classify: {pooling: maen}\ntrain:\n", "classify.pooling", 8, 21, "auto", "did you mean mean?"),
    ("search:\n", "search:\n  metric: accuracy\n", "search.metric", 11, 11, "does not fit task completion", "loss | exact_match"),
    ("search:\n", "search:\n  metric: exact_mach\n", "search.metric", 11, 11, "is not a metric", "did you mean exact_match?"),
    ("search:\n", "search:\n  metric: 'a.b:c d'\n", "search.metric", 11, 11, "package.module:function", ""),
    ("train: train.jsonl", "train: ''", "data.train", 6, 10, "the path is empty", ""),
    ("train: train.jsonl", "train: []", "data.train", 6, 10, "list of sources is empty", ""),
    # policies
    ('"last:2"]', '"lst:2"]', "search.layers[1]", 11, 18, "not a layer policy", "did you mean last:2?"),
    ('"last:2"]', '"last:2+haed"]', "search.layers[1]", 11, 18, "not a layer policy", "did you mean last:2+head?"),
    ('"last:2"]', '"last:0"]', "search.layers[1]", 11, 18, "at least 1", ""),
    ('"last:2"]', '"blocks:5-2"]', "search.layers[1]", 11, 18, "is reversed", "blocks:2-5"),
    ('"last:2"]', '"top:0.5"]\n  probe: false', "search.layers[1]", 11, 18, ("search.probe: false turns scoring "
"off"), "name blocks"),
    ('"last:2"]', "none]", "search.layers[1]", 11, 18, "as a control it always runs", "remove it"),
    ('"last:2"]', '"last:2", "Last: 2"]', "search.layers[2]", 11, 28, "is a duplicate of", "remove one"),
    ("search:\n", "search:\n  tune: [lora, lora]\n", "search.tune[1]", 11, 16, "is a duplicate of", "remove one"),
    ("search:\n", "finetune: {layers: hed}\nsearch:\n", "finetune.layers", 10, 20, "not a layer policy", "did you mean head?"),
    # a fixed list of trials
    ("search:\n", "search:\n  points: [{layers: all, learning_rate: 1.0e-3}]\n", "search.points", 11, 11, "reads no points",
     "algorithm: fixed"),
    ("  layers: [head, \"last:2\"]\n", "  algorithm: fixed\n", "search.algorithm", 11, 14, "no points to try", "write points"),
    ("search:\n", "search:\n  algorithm: fixed\n  points: [{layers: all, learning_rate: 1.0e-3}]\n", "search.layers", 13, 11,
     "only its points", "every point has its own layers"),
    ("  layers: [head, \"last:2\"]\n", "  algorithm: fixed\n  points: [{layers: alll, learning_rate: 1.0e-3}]\n",
     "search.points[0].layers", 12, 21, "not a layer policy", "did you mean all?"),
    ("  layers: [head, \"last:2\"]\n",
     "  algorithm: fixed\n  points: [{layers: all, tune: full, lora_rank: 8, learning_rate: 1.0e-3}]\n",
     "search.points[0].lora_rank", 12, 49, "lora_rank does not apply to full fine-tuning", "tune: lora"),
    ("  layers: [head, \"last:2\"]\n", "  algorithm: fixed\n  points: [{layers: all}]\n",
     "search.points[0].learning_rate", 12, 12, "is missing", ""),
    # remedies against forgetting
    ("epochs: 2", "replay: 0.1", "train.replay", 9, 11, "there is no retention text to be replayed", "give data.retain"),
    ("epochs: 2", "anchor: l2sp", "train.anchor", 9, 11, "a mapping with the keys kind, strength or none", ""),
    ("epochs: 2", "anchor: {kind: l2sp, strength: -1}", "train.anchor.strength", 9, 34, "of at least 0", ""),
    ("epochs: 2", "anchor: {kind: l2sp, strength: 1}", "train.anchor", 9, 11, "stay frozen", "write product"),
    ("search:\n", "search:\n  tune: [full]\n  anchor: [{kind: ewc, strength: 1}]\n", "search.anchor[0]", 12, 12,
     "no retention text", "give data.retain"),
    ("search:\n", "search:\n  tune: [full]\n  anchor: [none, {kind: product, strength: 1}]\n", "search.anchor[1]", 12, 18,
     "have no adapter", "l2sp or ewc"),
    ("search:\n", "resources: {zero: 1}\nsearch:\n  anchor: [{kind: product, strength: 1}]\n", "search.anchor[0]", 12, 12,
     "zero: 1 requires DeepSpeed", "resources.zero"),
    ("epochs: 2", "anchor: {kind: product, strength: 1}\nresources: {zero: 0}", "train.anchor", 9, 11,
     "resources.zero: 0 requires DeepSpeed", "remove resources.zero"),
    ("epochs: 2", "anchor: {kind: product, strength: 1}\nresources: {offload: optimizer}", "train.anchor", 9, 11,
     "resources.offload: optimizer requires DeepSpeed", "remove resources.offload"),
    ("epochs: 2\nsearch:\n", "anchor: {kind: l2sp, strength: 1}\nfinetune: {tune: lora}\nsearch:\n  tune: [full]\n",
     "train.anchor", 9, 11, "with lora (finetune.tune) adapters", "or move it to search.anchor"),
    ("epochs: 2\nsearch:\n", "anchor: {kind: l2sp, strength: 1}\nfinetune: {tune: full}\nsearch:\n", "train.anchor", 9, 11,
     "with lora (search.tune) adapters", "or override it with search.anchor"),
    ("epochs: 2\nsearch:\n", "anchor: {kind: product, strength: 1}\nfinetune: {tune: full}\nsearch:\n", "train.anchor", 9, 11,
     "unfrozen weights (finetune.tune) have no adapter", "write l2sp or ewc"),
    ("epochs: 2\nsearch:\n", "anchor: {kind: l2sp, strength: 1}\nfinetune: {}\nsearch:\n", "train.anchor", 9, 11,
     "with lora (search.tune and finetune.tune) adapters", "write product"),
    ("search:\n", "search:\n  anchor: [{kind: product, strength: 3}, {kind: product, strength: 3.0}]\n", "search.anchor[1]", 11,
     42, "{kind: product, strength: 3} is a duplicate of {kind: product, strength: 3}", "remove one"),
    ("search:\n", "search:\n  layer_decay: [0.8, 0.8]\n", "search.layer_decay[1]", 11, 22, "is a duplicate of", "remove one"),
    ("search:\n", "search:\n  layer_decay: [1.2]\n", "search.layer_decay[0]", 11, 17, "at most 1", ""),
    # not built yet
    ("model: sample", "model: smaple", "base.model", 3, 10, "there is no folder 'smaple'", "did you mean sample?"),
    ("train: train.jsonl", "train: s3://bucket/x", "data.train", 6, 10, "not supported yet", "local file"),
    ("train: train.jsonl", "train: [{path: hub:a/b/c}]", "data.train[0].path", 6, 18, "not a data set of the hub",
     "write hub:org/name, hub:org/name@revision"),
    ("max_tokens: 512", "retain: gs://x/y", "data.retain", 7, 11, "not supported yet", "local file"),
    ("task:", "output: s3://x\ntask:", "output", 4, 9, "not supported yet", "local or mounted"),
    ("model: sample", "model: sample\n  code_sha256: abc", "base.code_sha256", 4, 16, "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "path", "line", "column", "message", "hint"), ROWS, ids=lambda value: str(value)[:32])
def test_place_message_and_hint(
    tmp_path: Path, old: str, new: str, path: str, line: int, column: int, message: str, hint: str
) -> None:
    problem = one_problem(tmp_path, old, new)
    assert (problem.path, problem.line, problem.column) == (path, line, column)
    assert problem.file == str(tmp_path / "spec.yaml")
    assert message in problem.message
    assert hint in problem.hint
    assert str(problem).startswith(f"{tmp_path / 'spec.yaml'}:{line}:{column}: {path}: ")


def test_the_good_spec_is_good(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(GOOD)
    spec = load_spec(tmp_path / "spec.yaml").spec
    assert spec.search is not None
    assert spec.search.learning_rate.lora == (1e-4, 5e-3)


L2SP = "{kind: l2sp, strength: 1}"


@pytest.mark.parametrize(
    ("search", "finetune"),
    [
        ("tune: [lora, full]", "full"),
        ("anchor: [{kind: product, strength: 1}]", "full"),
        ("tune: [full]\n  anchor: [{kind: l2sp, strength: 2}]", "full"),
    ],
)
def test_an_anchor_of_train_is_judged_by_the_sections_that_take_it(tmp_path: Path, search: str, finetune: str) -> None:
    text = GOOD.replace("epochs: 2", f"anchor: {L2SP}\nfinetune: {{tune: {finetune}}}").replace("search:", f"search:\n  {search}")
    (tmp_path / "spec.yaml").write_text(text)
    assert load_spec(tmp_path / "spec.yaml").spec.train.anchor != "none"


def test_points_with_anchors_of_their_own_are_not_judged_by_that_of_train(tmp_path: Path) -> None:
    points = "[{layers: all, learning_rate: 1.0e-3, anchor: none}]"
    text = GOOD.replace("epochs: 2", f"anchor: {L2SP}").replace(
        '  layers: [head, "last:2"]\n', f"  algorithm: fixed\n  points: {points}\n"
    )
    (tmp_path / "spec.yaml").write_text(text)
    assert load_spec(tmp_path / "spec.yaml").spec.search is not None
    problems = problems_of(tmp_path / "spec.yaml", text.replace(", anchor: none", ""))
    assert [(problem.path, "(search.points)" in problem.message) for problem in problems] == [("train.anchor", True)]


def test_a_duplicate_key_is_refused_at_its_second_place(tmp_path: Path) -> None:
    problem = one_problem(tmp_path, "  epochs: 2", "  epochs: 2\n  epochs: 3")
    assert (problem.path, problem.line, problem.column) == ("train.epochs", 10, 3)
    assert "twice, first in line 9" in problem.message


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        GOOD.replace("model: sample", "model: smaple")
        .replace("max_tokens: 512", 'max_tokens: "512"')
        .replace("epochs: 2", "epochs: 2\n  epochs: 3\n  epoks: 2")
        .replace('"last:2"', "4, lst:2")
        .replace("[1e-4, 5e-3]", "[5e-3, 1e-4]")
    )
    problems = problems_of(tmp_path / "spec.yaml", text)
    assert [(problem.path, problem.line) for problem in problems] == [
        ("base.model", 3),
        ("data.max_tokens", 7),
        ("train.epochs", 10),
        ("train.epoks", 11),
        ("search.layers[1]", 13),
        ("search.layers[2]", 13),
        ("search.learning_rate.lora", 14),
    ]


def test_a_union_gives_one_line_without_jargon(tmp_path: Path) -> None:
    problem = one_problem(tmp_path, "max_tokens: 512", "eval: [1]")
    assert problem.message == "found a list of 1; expected a number above 0 and below 1 or text"


@pytest.mark.parametrize(
    ("text", "line", "column", "message", "hint"),
    [
        ("", 1, 1, "empty", "quickstart"),
        ("# nothing but a comment\n", 1, 1, "empty", "quickstart"),
        ("- a\n", 1, 1, "found a list of 1; expected a mapping", ""),
        ("name: x\n\tbase: y\n", 2, 1, "not valid YAML", "spaces"),
        ("name: a: b\n", 1, 8, "not valid YAML", "quotes"),
        ("name: x\n---\nname: y\n", 2, 1, "not valid YAML", "one spec"),
        ("name: [x\n", 2, 1, "not valid YAML", ""),
        (b"name: x\nbase: caf\xe9\n", 2, 10, "not UTF-8: byte 0xe9", "save the file as UTF-8"),
        (b"name: a\x07b\n", 1, 8, "U+0007", ""),
        ("a: &a [*a]\n", 1, 4, "too deeply nested", ""),
    ],
)
def test_what_is_no_yaml_mapping(tmp_path: Path, text: str | bytes, line: int, column: int, message: str, hint: str) -> None:
    (problem,) = problems_of(tmp_path / "spec.yaml", text)
    assert (problem.line, problem.column) == (line, column)
    assert message in problem.message
    assert hint in problem.hint


CHAIN = "x0: &a0 {k: 1}\n"
MULTIPLIED = {
    "lists of lists": ("x0: &a0 [lol]\n", "[*a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}]", 40),
    "mappings of mappings": (CHAIN, "{{p: *a{0}, q: *a{0}, r: *a{0}, s: *a{0}}}", 40),
    "mappings that grow by merging": (CHAIN, "{{<<: *a{0}, k{0}: 1}}", 1500),
    "a merge of merges that grow": (CHAIN, "{{<<: [*a{0}, *a0], k{0}: 1}}", 1500),
}
BOUNDLESS = {
    **{
        name: first + "".join(f"x{i}: &a{i} {rest.format(i - 1)}\n" for i in range(1, count))
        for name, (first, rest, count) in MULTIPLIED.items()
    },
    "a mapping that merges itself": "a: &a {<<: *a, k: 1}\n",
    "a mapping that merges what merges it": "a: &a {b: &b {<<: *a}, <<: *b}\n",
    "a list of itself": "a: &a [*a]\n",
    "merges inside merges": "a: " + "{<<: " * 2000 + "{}" + "}" * 2000,
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep blocks": "".join(" " * depth + "a:\n" for depth in range(600)),
    "deep dashes": "- " * 20_000 + "a",
    "question marks": "? " * 20_000,
    "a long list": "a: [" + "1," * 99_000 + "1]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(40_000)),
    "many policies": GOOD.replace('[head, "last:2"]', "[" + "hea," * 90_000 + "head]"),
}


@pytest.mark.parametrize("name", BOUNDLESS)
def test_a_file_of_a_few_bytes_cannot_keep_the_reader_busy(tmp_path: Path, name: str) -> None:
    """Aliases, merges, depth and length are bounded, in specs and in cluster files; each is refused at its place."""
    path = tmp_path / "spec.yaml"
    started = time.process_time()
    problems = problems_of(path, BOUNDLESS[name])
    with pytest.raises(UsageError) as caught:
        read_cluster_file(path)
    assert time.process_time() - started < 4
    assert any("too many or too deeply nested" in problem.message for problem in problems)
    assert all(problem.line for problem in problems)
    assert "too many or too deeply nested" in caught.value.what
    assert re.search(r"spec.yaml:\d+:\d+$", caught.value.where)


def test_merges_of_merges_cost_what_they_say(tmp_path: Path) -> None:
    """`<<: [*a, *a]` over and over took a time that doubles with every line; it comes to one mapping."""
    lines = "".join(f"x{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
    path = tmp_path / "spec.yaml"
    path.write_text("x0: &a0 {k: 1}\n" + lines)
    started = time.process_time()
    assert read_source(path).data["x59"] == {"k": 1}
    assert time.process_time() - started < 2


def test_what_is_merged_must_be_a_mapping(tmp_path: Path) -> None:
    problem = one_problem(tmp_path, "  epochs: 2", "  <<: 3\n  epochs: 2")
    assert (problem.line, problem.column) == (9, 3)
    assert "`<<` takes a mapping" in problem.message


def test_a_custom_tag_is_refused_and_not_run(tmp_path: Path) -> None:
    problem = one_problem(tmp_path, "name: tutor", "name: !!python/object/apply:os.getcwd tutor")
    assert (problem.line, problem.column) == (1, 7)
    assert "tag" in problem.message


def test_a_missing_file_names_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    with pytest.raises(SpecError, match="no such file") as caught:
        load_spec(tmp_path / "main.yaml")
    assert "mine.yaml" in str(caught.value)


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is a folder"):
        load_spec(tmp_path)


def test_a_file_of_data_is_no_spec(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("x: 1\n" * 300_000)
    with pytest.raises(SpecError, match="is this the data"):
        load_spec(tmp_path / "big.yaml")
