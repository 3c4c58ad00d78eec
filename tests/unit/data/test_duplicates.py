"""Rows that say the same never stand on two sides, and are told: equal prompts, texts, groups, near-duplicates."""

from __future__ import annotations

import random
from typing import Any

import pytest

from orchestrator.errors import DataError

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("lan", "rig", "mut", "ver")]
SPLITS = ("train", "eval", "test")


def sentence(seed: int, length: int = 14) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def sides(prepare: Any, key: list[Any], file_of: str = "train.jsonl") -> dict[Any, set[str]]:
    """The splits in which each key stands; `key` by row of the file."""
    found: dict[Any, set[str]] = {}
    for name in SPLITS:
        for line in prepare.load(name).rows.tolist():
            found.setdefault(key[line - 1], set()).add(name)
    return found


def messages(summary: Any, level: str = "warning") -> str:
    return "\n".join(notice.line for notice in summary.notices if notice.level == level)


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


VARIANTS = (str, str.upper, lambda text: f"  {text.replace(' ', '  ')}\n", lambda text: text.replace("f", "\uff46"))
"""Ways to write one text."""


@pytest.mark.parametrize("kind", ["completion", "chat", "chat_prefix", "classify", "text"])
def test_a_question_stands_in_one_split(prepare: Any, kind: str) -> None:
    """G06 and L10: 24 questions, four rows of each, written in different ways."""
    rows: list[Any] = []
    for number in range(24):
        for variant, write in enumerate(VARIANTS):
            asked = write(sentence(number))
            rows.append(
                {
                    "completion": {"prompt": asked, "completion": f"answer {variant}"},
                    "chat": chat(asked, f"answer {variant}"),
                    "chat_prefix": chat(*[asked, "first", *([f"and then {n}" for n in range(2)] * variant)]),
                    "classify": {"text": asked, "label": "ab"[variant % 2]},
                    "text": {"text": asked},
                }[kind]
            )
    prepare.jsonl("train.jsonl", rows)
    summary = prepare.run(kind.removesuffix("_prefix"), eval=0.2, test=0.2)
    home = sides(prepare, [n // 4 for n in range(96)])
    assert len(home) == 24
    assert all(len(splits) == 1 for splits in home.values())
    if kind in ("completion", "chat"):
        assert "24 prompts (96 rows) with more than one answer" in messages(summary)
    if kind == "classify":
        assert "24 texts (96 rows) with more than one label" in messages(summary)
        assert "train.jsonl:1" in messages(summary)


def test_none_parts_them_and_says_so(prepare: Any) -> None:
    rows = [{"prompt": sentence(n // 4), "completion": f"answer {n % 4}"} for n in range(80)]
    prepare.jsonl("train.jsonl", rows)
    summary = prepare.run(eval=0.2, test=0.2, dedupe="none")
    assert any(len(splits) > 1 for splits in sides(prepare, [n // 4 for n in range(80)]).values())
    assert "rows of test have a prompt that also occurs in train" in messages(summary)
    assert "data.dedupe: exact" in messages(summary)
    assert summary.dropped == ()


def test_given_files_lose_what_a_judge_has(prepare: Any, rows_of_pairs: Any) -> None:
    own = rows_of_pairs(30)
    prepare.jsonl("train.jsonl", [*own, {"prompt": "ASKED  there", "completion": "x"}])
    prepare.jsonl("test.jsonl", [{"prompt": "asked there", "completion": "y"}, *rows_of_pairs(5, 50)])
    summary = prepare.run(test="test.jsonl", eval=0.2)
    assert prepare.dropped(summary) == {("train", "whose prompt also occurs in test"): (1, ("train.jsonl:31",))}
    kept = prepare.run(test="test.jsonl", eval=0.2, dedupe="none")
    assert kept.dropped == ()
    assert "1 of 6 rows of test have a prompt that also occurs in train" in messages(kept)


def test_an_instruction_for_all_rows_is_no_question(prepare: Any) -> None:
    """In shares and in given files: the answers tell the rows apart."""
    rows = [{"prompt": "Write a line.", "completion": sentence(n)} for n in range(40)]
    prepare.jsonl("train.jsonl", rows)
    prepare.jsonl("test.jsonl", [rows[0], *({"prompt": "write a line.", "completion": sentence(n)} for n in range(50, 55))])
    summary = prepare.run(eval=0.2, test="test.jsonl")
    assert prepare.dropped(summary) == {("train", "also occurs in test"): (1, ("train.jsonl:1",))}
    assert "40 of 40 rows of train have one prompt, 'write a line.': taken as an instruction" in messages(summary, "info")


def test_completions_without_a_prompt_are_compared_by_themselves(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [{"prompt": "", "completion": sentence(n % 20)} for n in range(40)])
    prepare.run(eval=0.2, test=0.2)
    assert all(len(splits) == 1 for splits in sides(prepare, [n % 20 for n in range(40)]).values())


def near(seed: int) -> str:
    return sentence(seed).replace(" ", ", ", 1) + " again"


@pytest.mark.parametrize("dedupe", ["exact", "near"])
def test_near_duplicates_are_told_and_kept_together_where_asked(prepare: Any, dedupe: str) -> None:
    rows = [{"text": sentence(n), "label": "ab"[n % 2]} for n in range(60)]
    rows += [{"text": near(n), "label": "ab"[n % 2]} for n in range(60)]
    prepare.jsonl("train.jsonl", rows)
    summary = prepare.run("classify", eval=0.2, test=0.2, dedupe=dedupe)
    home = sides(prepare, [n % 60 for n in range(120)])
    if dedupe == "near":
        assert all(len(splits) == 1 for splits in home.values())
        assert "near-duplicates" not in messages(summary)
        return
    parted = sum("test" in splits and "train" in splits for splits in home.values())
    assert parted > 5
    assert f"{parted} of 24 rows of test are near-duplicates of rows of train" in messages(summary)
    assert "data.dedupe: near" in messages(summary)


def test_near_duplicates_in_given_files(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [{"prompt": sentence(n), "completion": "x"} for n in range(40)])
    prepare.jsonl("test.jsonl", [{"prompt": near(n), "completion": "x"} for n in (*range(3), *range(90, 95))])
    told = prepare.run(test="test.jsonl", eval=0.2)
    assert "2 of 8 rows of test are near-duplicates of rows of train (test.jsonl:1" in messages(told, "info")
    assert "1 of 8 rows of test are near-duplicates of rows of eval (test.jsonl:3" in messages(told, "info")
    assert told.dropped == ()
    summary = prepare.run(test="test.jsonl", eval=0.2, dedupe="near")
    assert prepare.dropped(summary) == {
        ("train", "near-duplicate of a row of test"): (3, ("train.jsonl:1", "train.jsonl:2", "train.jsonl:3"))
    }


def test_groups_hold_across_given_files(prepare: Any) -> None:
    rows = [{"prompt": sentence(n), "completion": "x", "doc": f"d{n // 4}"} for n in range(40)]
    prepare.jsonl("train.jsonl", rows)
    prepare.jsonl(
        "test.jsonl",
        [{"prompt": sentence(90), "completion": "x", "doc": "d3"}, {"prompt": sentence(91), "completion": "y", "doc": ""}],
    )
    prepare.jsonl("eval.jsonl", [{"prompt": sentence(92), "completion": "z"}])
    for dedupe in ("exact", "none"):
        summary = prepare.run(test="test.jsonl", eval="eval.jsonl", group="doc", dedupe=dedupe)
        places = tuple(f"train.jsonl:{line}" for line in range(13, 17))
        assert prepare.dropped(summary) == {("train", "whose group also occurs in test"): (4, places)}


def test_a_group_column_that_a_given_file_lacks_is_told(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [{"prompt": sentence(n), "completion": "x", "doc": f"d{n // 4}"} for n in range(40)])
    prepare.jsonl("test.jsonl", [{"prompt": sentence(91), "completion": "y"}])
    summary = prepare.run(test="test.jsonl", group="doc")
    assert "test has no value in data.group = 'doc'" in messages(summary, "info")


def test_few_prompts_of_a_given_file_that_are_all_of_trains_are_refused_with_a_way_out(prepare: Any) -> None:
    rows = [{"prompt": f"Write a {'abcde'[n % 5]}.", "completion": sentence(n)} for n in range(60)]
    prepare.jsonl("train.jsonl", rows[:50])
    prepare.jsonl("test.jsonl", rows[50:])
    with pytest.raises(DataError, match=r"no row is left for train \(50 whose prompt also occurs in test") as caught:
        prepare.run(test="test.jsonl")
    assert "data.dedupe: none" in caught.value.remedy
    summary = prepare.run(test="test.jsonl", dedupe="none")
    assert summary.splits["train"].documents == 45


def test_empty_group_cells_are_no_group(prepare: Any) -> None:
    """G01: half of the rows would be one."""
    lines = [f"{sentence(n)},answer {n},{f'd{n // 2}' if n < 30 else ''}\n" for n in range(60)]
    prepare.write("train.csv", "prompt,completion,doc\n" + "".join(lines))
    summary = prepare.run(train="train.csv", group="doc")
    assert {name: split.documents for name, split in summary.splits.items()} == {"train": 48, "eval": 6, "test": 6}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "completion": "b"}] * 40, {}, r"no row is left for train \(all 40 rows are equal\)"),
        (
            [{"prompt": sentence(n % 2), "completion": f"{n}", "doc": n % 2} for n in range(60)],
            {"group": "doc"},
            r"train has 60 rows in 2 groups, the largest of 30 rows \(such as .*train.jsonl:\d\); rows that have "
            r"a value of data.group = 'doc' or a prompt in common stay in one split",
        ),
        (
            [{"text": sentence(0) + f" {'xyzuvw'[n]}{'xyzuvw'[n]}"} for n in range(6)],
            {"dedupe": "near"},
            r"train has 6 rows in 1 group .* or are near-duplicates, stay in one split",
        ),
    ],
)
def test_rows_that_cannot_be_parted_are_refused_with_the_reason(
    prepare: Any, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    prepare.jsonl("train.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        prepare.run("text" if "text" in rows[0] else "completion", **options)
    assert caught.value.remedy


def test_a_group_of_nearly_all_rows_stays_in_train(prepare: Any) -> None:
    """G03b"""
    prepare.jsonl("train.jsonl", [{"prompt": sentence(n), "completion": "x", "doc": max(0, n - 54)} for n in range(60)])
    summary = prepare.run(group="doc")
    assert summary.splits["train"].documents == 56
    assert "test has 2 rows where data.test asks for 6 of 60" in messages(summary)


def test_repeated_rows_of_train_are_kept_and_counted(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", rows_of_pairs(30) * 2)
    summary = prepare.run(eval=0.2, test=0.2)
    assert "18 of 36 rows of train duplicate another row; they are kept" in messages(summary, "info")
