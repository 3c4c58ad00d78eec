"""From a spec to sets on disk: counts, places, refusals, and the same again the second time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from orchestrator.data import data_size, documents_of_steps, prepare_data
from orchestrator.errors import DataError, RunConflictError
from orchestrator.plan.data_size import auto_tokens_per_step
from orchestrator.plan.schedule import StepSize
from orchestrator.spec import load_spec
from orchestrator.store import read_json

LABELLED = [{"text": f"sentence {n}", "label": "ab"[n % 2]} for n in range(20)]


def test_a_share_of_each_split_and_every_row_once(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(50))
    summary = prepare.run(eval=0.1, test=0.2)
    counts = {name: split.documents for name, split in summary.splits.items()}
    assert counts == {"train": 35, "eval": 5, "test": 10}
    lines = np.concatenate([prepare.load(name).rows for name in counts])
    assert sorted(lines.tolist()) == list(range(1, 51))
    assert summary.dropped == ()
    assert summary.files == ("train.jsonl",)
    train = prepare.load("train")
    assert summary.splits["train"].tokens == train.num_tokens
    assert summary.splits["train"].supervised_tokens == train.num_supervised.sum()
    assert summary.splits["train"].sha256 == train.sha256
    assert train.answers[0] == f"answer {train.rows[0] - 1}"
    assert "«answer" in summary.one_example
    assert summary == type(summary).model_validate(read_json(prepare.out / "summary.json"))


def test_the_seed_decides_and_nothing_else(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(50))
    hashes = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c"), (-5, "d")):
        prepare.out = prepare.folder / folder
        hashes.append({name: split.sha256 for name, split in prepare.run(seed=seed).splits.items()})
    assert hashes[0] == hashes[1]
    assert len({tuple(h.values()) for h in hashes}) == 3


def test_rows_in_two_splits_are_removed_counted_and_listed(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(40))
    prepare.jsonl("eval.jsonl", rows_of_pairs(10, 35))
    prepare.jsonl("test.jsonl", rows_of_pairs(10, 38))
    summary = prepare.run(eval="eval.jsonl", test="test.jsonl")
    assert {name: split.documents for name, split in summary.splits.items()} == {"train": 35, "eval": 3, "test": 10}
    assert prepare.dropped(summary) == {
        ("eval", "also occurs in test"): (7, tuple(f"eval.jsonl:{n}" for n in range(4, 11))),
        ("train", "also occurs in test"): (2, ("train.jsonl:39", "train.jsonl:40")),
        ("train", "also occurs in eval"): (3, ("train.jsonl:36", "train.jsonl:37", "train.jsonl:38")),
    }


def test_a_train_that_is_all_in_eval_is_refused_with_the_count(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(5))
    with pytest.raises(DataError, match=r"no row is left for train \(5 also occurs in eval[;)]"):
        prepare.run(eval="train.jsonl", test=0.2)


def test_bad_rows_are_all_named_up_to_the_limit(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", [*rows_of_pairs(30), *["{"] * 15, *[{"prompt": "x"}] * 15])
    prepare.write("eval.csv", "prompt,completion\na,b,c\nok,fine\n")
    with pytest.raises(DataError) as caught:
        prepare.run(eval="eval.csv")
    lines = str(caught.value).splitlines()
    train = prepare.folder / "train.jsonl"
    assert lines[:4] == [
        "31 rows cannot be used:",
        "  15 rows: malformed JSON: Expecting property name enclosed in double quotes: "
        f"{train}:31 (column 2), :32, :33 and 12 more",
        f"  15 rows: no column 'completion': {train}:46 (it has prompt; data.columns renames them), :47, :48 and 12 more",
        f"  1 row: more fields than the header: {prepare.folder / 'eval.csv'}:2 (3; the header has 2: prompt, completion)",
    ]
    assert "skip_bad_rows" in caught.value.remedy
    assert caught.value.exit_code == 2
    assert not prepare.out.exists()


def test_skipped_bad_rows_are_counted_whole_and_listed_in_part(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", [*rows_of_pairs(30), *["[]"] * 25])
    prepare.write("eval.csv", "prompt,completion\na,b,c\nok,fine\n")
    summary = prepare.run(eval="eval.csv", skip_bad_rows=True)
    dropped = prepare.dropped(summary)
    count, places = dropped["train", "malformed: a JSON list, expected an object"]
    assert (count, len(places), places[0]) == (25, 20, "train.jsonl:31")
    assert dropped["eval", "malformed: more fields than the header"] == (1, ("eval.csv:2",))
    assert summary.splits["eval"].documents == 1
    assert sum(entry.count for entry in summary.dropped) == 26


def test_a_split_of_bad_rows_only_is_refused_even_when_they_are_skipped(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", ["{", "{"])
    with pytest.raises(DataError, match="no row of train can be used"):
        prepare.run(skip_bad_rows=True)
    prepare.write("train.jsonl", "")
    with pytest.raises(DataError, match="the file holds no row"):
        prepare.run()


def test_all_missing_paths_are_named_together(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(5))
    with pytest.raises(DataError) as caught:
        prepare.run(eval="evil.jsonl", test="tst.jsonl", retain="x/y.txt")
    assert "3 data paths without a file" in str(caught.value)
    for name in ("evil.jsonl", "tst.jsonl", "y.txt"):
        assert name in str(caught.value)
    with pytest.raises(DataError, match=r"did you mean train\.jsonl\?"):
        prepare.run(eval="trian.jsonl")


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        ({"eval": "trian.jsonl"}, '"trian.jsonl"', "trian.jsonl: no such data file"),
        ({"train": [{"path": "train.jsonl"}, {"path": "more.jsonl"}]}, '"more.jsonl"', "more.jsonl: no such data file"),
        ({"eval": "none.csv", "test": "gone.csv"}, '"gone.csv"', "2 data paths without a file"),
        ({"train": "one.jsonl"}, '"one.jsonl"', "no row is left for train"),
        ({"max_tokens": 8, "long_rows": "error"}, '"error"', " longer than data.max_tokens = 8"),
        ({"max_tokens": 8, "eval": "wide.jsonl"}, '"wide.jsonl"', "no row is left for eval"),
    ],
)
def test_the_place_in_the_spec_is_named_too(
    prepare: Any, rows_of_pairs: Any, options: dict[str, Any], value: str, message: str
) -> None:
    prepare.jsonl("train.jsonl", [{"prompt": "a", "completion": str(n)} for n in range(9)] + rows_of_pairs(9))
    prepare.jsonl("one.jsonl", rows_of_pairs(1))
    prepare.jsonl("wide.jsonl", [{"prompt": "word " * 20, "completion": "x"}])
    loaded = prepare.spec(**options)
    with pytest.raises(DataError) as caught:
        prepare.run(**options)
    assert f"{loaded.path}:1:{loaded.text.index(value) + 1}: " in str(caught.value)
    assert message in str(caught.value)


def test_empty_answers_are_named_in_every_split_and_can_be_left_out(prepare: Any, rows_of_pairs: Any) -> None:
    empty = {"prompt": "p", "completion": " \n"}
    prepare.jsonl("train.jsonl", [*rows_of_pairs(9), empty])
    prepare.jsonl("eval.jsonl", [*rows_of_pairs(3, 50), {**empty, "prompt": "q"}])
    with pytest.raises(DataError) as caught:
        prepare.run(eval="eval.jsonl", test=0.2)
    reason = "column 'completion' is empty (white space only)"
    places = f"{prepare.folder}/train.jsonl:10, {prepare.folder}/eval.jsonl:4"
    assert f"2 rows: {reason}: {places}" in str(caught.value)
    dropped = prepare.dropped(prepare.run(eval="eval.jsonl", test=0.2, skip_bad_rows=True))
    assert dropped["train", f"malformed: {reason}"] == (1, ("train.jsonl:10",))
    assert dropped["eval", f"malformed: {reason}"] == (1, ("eval.jsonl:4",))


@pytest.mark.parametrize("how", ["error", "drop", "truncate_prompt"])
def test_long_rows(prepare: Any, rows_of_pairs: Any, how: str) -> None:
    long_prompt, long_answer = {"prompt": "word " * 50, "completion": "x"}, {"prompt": "x", "completion": "word " * 50}
    prepare.jsonl("train.jsonl", [*rows_of_pairs(9), long_prompt, long_answer])
    prepare.jsonl("eval.jsonl", rows_of_pairs(3, 50))
    options = {"eval": "eval.jsonl", "test": "eval2.jsonl", "max_tokens": 32, "long_rows": how}
    prepare.jsonl("eval2.jsonl", rows_of_pairs(3, 60))
    if how == "error":
        with pytest.raises(DataError) as caught:
            prepare.run(**options)
        assert "2 rows longer than data.max_tokens = 32" in str(caught.value)
        assert "train.jsonl:10 (train), " in str(caught.value)
        return
    summary = prepare.run(**options)
    dropped = prepare.dropped(summary)
    if how == "drop":
        assert dropped == {("train", "longer than data.max_tokens = 32"): (2, ("train.jsonl:10", "train.jsonl:11"))}
    else:
        assert dropped == {
            ("train", "longer than data.max_tokens = 32: the prompt's beginning was cut, the row is kept"): (
                1,
                ("train.jsonl:10",),
            ),
            ("train", "longer than data.max_tokens = 32"): (1, ("train.jsonl:11",)),
        }
        assert prepare.load("train").lengths[-1] == 32
    assert summary.splits["train"].longest_document_tokens <= 32


def test_long_texts_to_classify_are_cut_at_their_end(prepare: Any) -> None:
    rows = [{"text": f"short {number}", "label": "ab"[number % 2]} for number in range(20)]
    for name, part in (("train", rows[:9]), ("eval", rows[9:13]), ("test", rows[13:])):
        prepare.jsonl(f"{name}.jsonl", [*part, {"text": f"{name} " * 50, "label": "a"}])
    paths = {name: f"{name}.jsonl" for name in ("eval", "test")}
    summary = prepare.run("classify", **paths, max_tokens=32, long_rows="truncate_prompt")
    reason = "longer than data.max_tokens = 32: the text's end was cut, the row is kept"
    assert prepare.dropped(summary)["train", reason] == (1, ("train.jsonl:10",))
    assert prepare.load("train").lengths.max() == 32


def test_a_split_of_long_rows_only_is_refused(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(9))
    prepare.jsonl("eval.jsonl", [{"prompt": "word " * 50, "completion": "x"}])
    with pytest.raises(DataError, match=r"no row is left for eval \(1 longer than data\.max_tokens = 16\)"):
        prepare.run(eval="eval.jsonl", max_tokens=16)


def test_retention_is_chunked_capped_and_counted(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(20))
    prepare.jsonl("general.jsonl", [{"text": f"{n} " + "some words " * 40} for n in range(10)])
    summary = prepare.run(retain="general.jsonl", retain_tokens=300, max_tokens=64)
    retain = prepare.load("retain")
    assert summary.splits["retain"].tokens == retain.num_tokens <= 300
    assert retain.lengths.max() <= 64
    assert retain.num_supervised.sum() == retain.num_tokens - len(retain)
    count, _ = prepare.dropped(summary)["retain", "over data.retain_tokens = 300 (chunks)"]
    whole = prepare.run(retain="general.jsonl", retain_tokens=10**6, max_tokens=64)
    assert count + len(retain) == whole.splits["retain"].documents
    prepare.run()
    assert not (prepare.out / "retain.npz").exists()


def test_no_more_is_kept_to_replay_than_a_trial_can_replay(prepare: Any, rows_of_pairs: Any) -> None:
    """Of what is not scored; and nothing that is scored is among it."""
    prepare.jsonl("train.jsonl", rows_of_pairs(40))
    prepare.jsonl("general.jsonl", [{"text": f"{n // 2} " + "some words " * 30} for n in range(400)])
    data = {"retain": "general.jsonl", "retain_tokens": 300, "max_tokens": 64}
    summary = prepare.run(replay=0.1, **data)
    assert summary.splits["replay"].tokens <= 64 * 64
    scored = {tuple(prepare.load("retain").document(index)[0]) for index in range(len(prepare.load("retain")))}
    kept = prepare.load("replay")
    assert not scored & {tuple(kept.document(index)[0]) for index in range(len(kept))}
    counts = {reason: count for (split, reason), (count, _) in prepare.dropped(summary).items() if split == "replay"}
    whole = sum(counts.values()) + len(kept) + summary.splits["retain"].documents
    assert counts["more than a trial can replay (chunks)"] > 0
    assert whole == prepare.run(**data | {"retain_tokens": 10**6}).splits["retain"].documents


def test_retention_that_another_split_has_is_not_scored_but_counted_and_listed(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(20))
    prepare.jsonl("eval.jsonl", rows_of_pairs(5, 20))
    prepare.jsonl("test.jsonl", rows_of_pairs(5, 25))
    prepare.jsonl("general.jsonl", rows_of_pairs(20, 18))
    data = {"eval": "eval.jsonl", "test": "test.jsonl"}
    summary = prepare.run(retain="general.jsonl", **data)
    assert prepare.load("retain").rows.tolist() == list(range(13, 21))
    assert prepare.dropped(summary) == {
        ("retain", f"also occurs in {name}"): (len(lines), tuple(f"general.jsonl:{line}" for line in lines))
        for name, lines in (("train", range(1, 3)), ("eval", range(3, 8)), ("test", range(8, 13)))
    }
    for replay in (0.0, 0.1):
        with pytest.raises(DataError, match=r"no row is left for retain \(5 also occurs in test\)") as caught:
            prepare.run(retain="test.jsonl", replay=replay, **data)
        assert caught.value.expected == "text that is not in train, eval or test"


def test_sets_of_an_earlier_format_are_made_anew_but_never_under_trials_that_learned_from_others(
    prepare: Any, rows_of_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they come out the same, the trials go on."""
    prepare.jsonl("train.jsonl", rows_of_pairs(30))

    def again(**data: Any) -> str:
        return prepare_data(prepare.spec(**data), prepare.base, prepare.out, keep_sets=True).inputs_sha256

    monkeypatch.setattr("orchestrator.data.prepare.FORMAT", 1)
    old = prepare.run().inputs_sha256
    monkeypatch.undo()
    stamp = (prepare.out / "train.npz").stat().st_mtime_ns
    assert again() != old
    assert again() == again(dedupe="exact")
    assert (prepare.out / "train.npz").stat().st_mtime_ns == stamp
    again(dedupe="near")
    for other in ({"eval": 0.3}, {"eval_rows": 1}, {"max_tokens": 8}):
        with pytest.raises((RunConflictError, DataError)):
            again(**other)
    prepare.jsonl("train.jsonl", rows_of_pairs(31))
    with pytest.raises(RunConflictError, match="the data has changed since this run began"):
        again()
    assert (prepare.out / "train.npz").stat().st_mtime_ns == stamp


def test_long_retention_rows_are_told_even_when_none_is_left_to_replay(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(20))
    prepare.jsonl("general.jsonl", [{"prompt": "word " * 40, "completion": "x"}])
    with pytest.raises(DataError, match=r"1 row longer than data\.max_tokens = 32"):
        prepare.run(retain="general.jsonl", replay=0.1, max_tokens=32, long_rows="error")


def test_retention_may_have_answers(prepare: Any, rows_of_pairs: Any) -> None:
    """Beside text: of a question only the answer is supervised."""
    prepare.jsonl("train.jsonl", rows_of_pairs(20))
    prepare.jsonl("general.jsonl", [{"text": "some words"}, {"prompt": "who?", "completion": "me"}])
    prepare.run(retain="general.jsonl")
    retain = prepare.load("retain")
    assert list(retain.answers) == ["", "me"]
    assert 0 < retain.num_supervised[1] < retain.lengths[1] - 1


def test_eval_and_test_are_capped_by_a_seeded_choice(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(100))
    summary = prepare.run(eval=0.3, test=0.3, eval_rows=7, test_rows=5)
    assert (summary.splits["eval"].documents, summary.splits["test"].documents) == (7, 5)
    assert summary.splits["train"].documents == 88, "what is over a cap stays in train"
    assert summary.dropped == ()
    prepare.jsonl("test.jsonl", rows_of_pairs(30, 100))
    summary = prepare.run(eval=0.3, test="test.jsonl", eval_rows=7, test_rows=5)
    assert prepare.dropped(summary)["test", "over data.test_rows = 5"][0] == 25
    assert not [notice for notice in summary.notices if "left out" in notice.message], "that is what was asked for"


def test_groups_stay_in_one_split(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", [{**row, "user": n // 5} for n, row in enumerate(rows_of_pairs(60))])
    prepare.run(group="user", eval=0.2, test=0.2)
    users = [{(int(line) - 1) // 5 for line in prepare.load(name).rows} for name in ("train", "eval", "test")]
    assert all(users)
    assert sum(map(len, users)) == 12


def test_classes_are_those_of_train_sorted_and_numbered(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", LABELLED)
    summary = prepare.run("classify", eval=0.2, test=0.2)
    assert summary.classes == ("a", "b")
    train = prepare.load("train")
    assert summary.class_counts == tuple(np.bincount(train.labels))
    assert [LABELLED[line - 1]["label"] for line in train.rows] == ["ab"[number] for number in train.labels]
    assert summary.one_example.endswith("-> «a»")
    size = data_size(summary, load_spec(prepare.folder / "spec.yaml").spec, prepare.out)
    assert (size.num_classes, size.class_names) == (2, ("a", "b"))


def test_a_class_that_train_does_not_have_is_named_with_its_rows(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", LABELLED)
    prepare.write("eval.csv", "text,label\nx,a\ny,c\nz,c\n")
    with pytest.raises(DataError) as caught:
        prepare.run("classify", eval="eval.csv", test=0.2)
    assert "2 row(s) of eval or test with a class that train does not have" in str(caught.value)
    assert "eval.csv:4" in str(caught.value).partition("'c' in 2: ")[2]
    summary = prepare.run("classify", eval="eval.csv", test=0.2, skip_bad_rows=True)
    reason = "malformed: its class 'c' is not in train"
    assert prepare.dropped(summary)["eval", reason] == (2, ("eval.csv:3", "eval.csv:4"))
    assert summary.splits["eval"].documents == 1
    prepare.jsonl("train.jsonl", [{**row, "label": "a"} for row in LABELLED])
    with pytest.raises(DataError, match="train has only one class: a"):
        prepare.run("classify", eval=0.2, test=0.2)


def test_every_kind_of_file_gives_the_same_sets(prepare: Any, rows_of_pairs: Any) -> None:
    rows = rows_of_pairs(20)
    prepare.jsonl("train.jsonl", rows)
    prepare.write("train.csv", "completion,prompt\n" + "".join(f'"{r["completion"]}",{r["prompt"]}\n' for r in rows))
    parquet.write_table(pa.Table.from_pylist(rows), prepare.folder / "train.parquet")
    prepare.jsonl("parts/1.jsonl", rows[:8])
    prepare.jsonl("parts/2.jsonl", rows[8:])
    hashes = set()
    for path in ("train.jsonl", "train.csv", "train.parquet", "parts", "parts/*.jsonl"):
        prepare.run(train=path)
        train = prepare.load("train")
        hashes.add((tuple(train.ids.tolist()), tuple(train.offsets.tolist())))
    assert len(hashes) == 1


def test_text_files_are_documents(prepare: Any) -> None:
    for number in range(6):
        prepare.write(f"books/{number}.txt", f"chapter {number}. " + "It was a dark night. " * 10)
    summary = prepare.run("text", train="books", max_tokens=32, eval=0.2, test=0.2, columns={"text": "body"})
    assert summary.splits["train"].documents > 4
    assert sum(len(set(prepare.load(name).rows.tolist())) for name in summary.splits) == 3


def test_the_same_inputs_are_not_read_again_and_others_are(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(20))
    first = prepare.run()
    stamp = (prepare.out / "train.npz").stat().st_mtime_ns
    assert prepare.run() == first
    assert (prepare.out / "train.npz").stat().st_mtime_ns == stamp
    assert prepare.run(max_tokens=64).inputs_sha256 != first.inputs_sha256
    prepare.jsonl("train.jsonl", rows_of_pairs(21))
    assert prepare.run().inputs_sha256 != first.inputs_sha256


def test_damaged_or_missing_sets_are_made_again(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(20))
    first = prepare.run()
    content = bytearray((prepare.out / "train.npz").read_bytes())
    content[len(content) // 2] ^= 255
    for damage in (
        lambda: (prepare.out / "train.npz").write_bytes(bytes(content)),
        lambda: (prepare.out / "eval.npz").unlink(),
        lambda: (prepare.out / "summary.json").write_text("{"),
        lambda: (prepare.out / "summary.json").write_text("{}"),
    ):
        damage()
        assert prepare.run() == first
        assert prepare.load("train").sha256 == first.splits["train"].sha256


def test_the_size_for_the_plan_is_exact(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(50))
    summary = prepare.run(max_tokens=64)
    spec = load_spec(prepare.folder / "spec.yaml").spec
    size = data_size(summary, spec, prepare.out)
    train = prepare.load("train")
    assert size.exact
    assert size.train_documents == len(train)
    assert size.train_tokens == train.num_tokens
    steps = documents_of_steps(train.offsets, size.tokens_per_step, spec.train.seed, 0)
    assert (size.tokens_per_step, size.steps_per_epoch) == (
        auto_tokens_per_step(len(train), train.num_tokens, int(train.lengths.max()), spec.train.epochs),
        len(steps),
    )
    assert data_size(summary, spec, prepare.out, planned=StepSize(640)).tokens_per_step == 640, "of an earlier submission"
    fixed = spec.model_copy(update={"train": spec.train.model_copy(update={"tokens_per_step": 8192})})
    assert data_size(summary, fixed, prepare.out, planned=StepSize(640)).tokens_per_step == 8192
    assert size.longest_document_tokens == max(prepare.load(name).lengths.max() for name in summary.splits)
    prepare.jsonl("train.jsonl", rows_of_pairs(50, 1))
    assert data_size(prepare.run(max_tokens=64), spec, prepare.out).sets_sha256 != size.sets_sha256


def test_classes_without_a_row_to_spare_are_told(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [{"text": f"sentence {n}", "label": f"class {n}"} for n in range(8)])
    with pytest.raises(DataError) as error:
        prepare.run(task="classify", columns={"text": "text", "label": "label"})
    assert "no row is left for eval (train has 8 rows; train keeps a row of each class" in str(error.value)
    assert error.value.remedy
