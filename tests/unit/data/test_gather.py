"""From files to examples: what is told of the reading, and how mistakes are grouped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.gather import bad_rows_error, find_sources, read_examples
from orchestrator.data.reading.measure import check_first_rows, measure_data
from orchestrator.data.reading.row import BadRow
from orchestrator.data.summary import LeftOut
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec, load_spec


def gather(loaded: LoadedSpec) -> tuple[dict[str, list[Example]], LeftOut]:
    left_out = LeftOut(loaded.folder)
    return read_examples(loaded.spec, find_sources(loaded, left_out), left_out), left_out


def told(left_out: LeftOut) -> list[str]:
    return [notice.message for notice in left_out.notices]


def test_reasons_are_grouped_and_none_is_hidden() -> None:
    bad = [BadRow("a", n, "one", f"found {n}") for n in range(1, 31)] + [BadRow("b", 7, "two", last_line=9)]
    lines = str(bad_rows_error(bad)).splitlines()
    assert lines[:3] == ["31 rows cannot be used:", "  30 rows: one: a:1 (found 1), :2, :3 and 27 more", "  1 row: two: b:7-9"]
    assert "skip_bad_rows" in lines[-1]
    assert "does not skip a file" in bad_rows_error([BadRow("a", 1, "broken", ends_file=True)]).remedy


def test_one_line_says_how_rows_are_read_and_one_what_is_not(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("data/a.jsonl", [{**row, "id": 1, "\x1b[31m": 2} for row in rows_of_pairs(3)])
    prepare.write("data/b.json", json.dumps(rows_of_pairs(2, 3)))
    prepare.write("data/c.jsonl.gz", gzip.compress(json.dumps(rows_of_pairs(1, 5)[0]).encode()))
    found, left_out = gather(prepare.spec(train="data"))
    assert len(found["train"]) == 6
    assert told(left_out) == [
        "train: 3 files (1 JSON Lines, 1 JSON array, 1 gzip JSON Lines); "
        "6 rows read as prompt_completion by the columns 'prompt' and 'completion'",
        "train: columns that are not read: '\\x1b[31m', 'id'",
    ]


def test_layouts_and_keys_of_chats_are_told(prepare: Any) -> None:
    turns = [{"from": "human", "value": "a", "id": 1}, {"from": "gpt", "value": "b", "weight": 0}, {"from": "gpt", "value": ""}]
    prepare.jsonl("train.jsonl", [{"conversations": turns}] * 3 + [{"messages": [{"role": "user", "content": "x"}]}])
    _, left_out = gather(prepare.spec("chat"))
    assert told(left_out) == [
        "train: train.jsonl is JSON Lines; 3 rows read as sharegpt by the column 'conversations'; "
        "1 row read as messages by the column 'messages'; turns with ShareGPT's from and value in 3 of them",
        "train: keys of turns that are not read (in how many turns): 'id' (3)",
        "train: 3 turns of the assistant are empty and are not trained on",
        "train: 3 turns have a weight; those of weight 0 are not trained on",
    ]


def test_an_alpaca_input_that_is_not_read_is_a_warning_with_the_remedy(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [{"instruction": "i", "input": "x", "output": f"o{n}"} for n in range(3)])
    _, left_out = gather(prepare.spec(columns={"prompt": "instruction", "completion": "output"}))
    (warning,) = [notice for notice in left_out.notices if notice.level == "warning"]
    assert "'input'; these look like Alpaca rows" in warning.message
    assert "data.format: alpaca" in warning.remedy
    found, left_out = gather(prepare.spec())
    assert "### Input:\nx" in str(found["train"][0].prompt)
    assert all(notice.level == "info" for notice in left_out.notices)


def test_damage_is_never_skipped(prepare: Any) -> None:
    rows = "prompt,completion\n" + "a,b\n" * 4
    for name, content in {
        "quote.csv": (rows + '"open,b\n' + "a,b\n" * 35).encode(),
        "cut.jsonl.gz": gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 50)[:-4],
        "array.json": b'[{"prompt": "p", "completion": "c"}, {"prompt": ',
        "header.csv": b"prompt,answer\na,b\n",
    }.items():
        prepare.write(name, content)
        with pytest.raises(DataError, match="1 row cannot be used") as caught:
            gather(prepare.spec(train=name, skip_bad_rows=True))
        assert name in str(caught.value)


@pytest.mark.parametrize("how", ["line", "paragraph"])
def test_a_text_file_is_one_document_unless_asked_otherwise(prepare: Any, how: str) -> None:
    prepare.write("book.txt", "\n\n".join(f"sentence {n}" for n in range(30)))
    with pytest.raises(DataError, match=r"a text file is one document, so train has 1 document \(.*has 59 lines\)") as caught:
        gather(prepare.spec("text", train="book.txt"))
    assert "data.text_documents: line" in caught.value.remedy
    found, left_out = gather(prepare.spec("text", train="book.txt", text_documents=how))
    assert [example.line for example in found["train"]] == list(range(1, 60, 2))
    assert f"each {how} of a text file is one document" in told(left_out)[-1]
    summary = prepare.run("text", train="book.txt", text_documents=how)
    assert sum(split.documents for split in summary.splits.values()) == 30


def test_alpaca_prompts_reach_the_sets_without_a_separator(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(20)])
    prepare.run()
    assert all(prompt.endswith("### Response:") for prompt in prepare.load("train").prompts)


def test_splits_of_a_folder_give_way_to_no_share(prepare: Any, rows_of_pairs: Any) -> None:
    for name, start, count in (("train", 0, 30), ("validation", 30, 4), ("test", 40, 5)):
        prepare.jsonl(f"data/{name}.jsonl", rows_of_pairs(count, start))
    summary = prepare.run(train="data")
    assert {name: split.documents for name, split in summary.splits.items()} == {"train": 30, "eval": 4, "test": 5}
    assert summary.dropped == ()


def test_wrong_columns_are_found_in_the_first_rows(prepare: Any, rows_of_pairs: Any) -> None:
    prepare.jsonl("train.jsonl", [{"question": "q", "answer": "a"}] * 300)
    with pytest.raises(DataError, match="100 rows: no column 'prompt' and 'completion'"):
        measure_data(prepare.spec())
    prepare.jsonl("train.jsonl", [*rows_of_pairs(3), {"prompt": 1}])
    with pytest.raises(DataError, match="1 row: no column 'completion'"):
        check_first_rows(prepare.spec())
    check_first_rows(prepare.spec(skip_bad_rows=True))


def test_sizes_are_measured_alike_in_every_format(prepare: Any, rows_of_pairs: Any) -> None:
    rows = [{"prompt": f"question {n}" * 20, "completion": f"answer {n}" * 10} for n in range(2000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    prepare.write("train.jsonl", lines)
    prepare.write("train.jsonl.gz", gzip.compress(lines.encode()))
    prepare.write("train.json", json.dumps(rows))
    prepare.write("train.csv", "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    parquet.write_table(pa.Table.from_pylist(rows), prepare.folder / "train.parquet")
    sizes = {
        name: measure_data(prepare.spec(train=name)).size
        for name in ("train.jsonl", "train.jsonl.gz", "train.json", "train.csv", "train.parquet")
    }
    for name, size in sizes.items():
        assert size.train_documents == pytest.approx(1600, rel=0.1), name
        assert size.train_tokens == pytest.approx(sizes["train.jsonl"].train_tokens, rel=0.25), name
    assert sizes["train.jsonl"].train_documents == sizes["train.parquet"].train_documents == 1600


def test_large_compressed_files_are_estimated(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.reading.measure.SAMPLE_BYTES", 20_000)
    lines = "".join(json.dumps({"prompt": f"question {n * 7919 % 10007}", "completion": f"{n}"}) + "\n" for n in range(20_000))
    for name, content in {"train.jsonl": lines.encode(), "train.jsonl.gz": gzip.compress(lines.encode())}.items():
        prepare.write(name, content)
        assert measure_data(prepare.spec(train=name)).size.train_documents == pytest.approx(16_000, rel=0.3), name


CASES = {
    "C02_csv_semicolon": {"train": 40},
    "C06b_csv_open_quote_skip": "36 lines to the end of the file",
    "D01_json_array": {"train": 40},
    "D02_array_in_jsonl": {"train": 40},
    "D03b_sharegpt_renamed": {"train": 40},
    "D04_alpaca": {"train": 40},
    "D05_tools_column": {"train": 40},
    "D06_tool_calls": {"train": 40},
    "D07_content_parts": {"train": 40},
    "D08_message_weight0": {"train": 40},
    "D08b_function_call_legacy": {"train": 40},
    "D11_last_turn_user": {"train": 40},
    "D13b_empty_completions_skip": {"train": 38},
    "D14_whitespace_completions": "20 rows: column 'completion' is empty",
    "E02_utf16_bom": {"train": 40},
    "E10_second_reason_hidden": "25 rows: no column 'completion'",
    "F01_folder_readme_txt": {"train": 40},
    "F02_ipynb_checkpoints": {"train": 40},
    "F03_hf_layout_folder": {"train": 40, "eval": 10, "test": 10},
    "F07_mixed_suffix_json": {"train": 900},
    "F08_gz": {"train": 40},
    "F09_txt_lines": "data.text_documents: line",
    "G01_group_empty_csv": {"train": 60},
    "P06_far_date": {"train": 40},
    "P07_tz": {"train": 40},
}
"""Rows of each split, or what the error says."""


@pytest.mark.parametrize("case", CASES)
def test_recorded_cases(real_data: Path, case: str) -> None:
    folder = real_data / "cases" / "data" / case
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    expected = CASES[case]
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            gather(load_spec(folder / "spec.yaml"))
        assert expected in str(caught.value)
        return
    found, left_out = gather(load_spec(folder / "spec.yaml"))
    assert {name: len(examples) for name, examples in found.items()} == expected
    assert left_out.notices
