"""The comparison that `scripts/same_numbers` makes, over run folders of two steps that nobody had to train."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.spec import load_spec
from scripts.comparison.figures import Difference, differences, exact, run_figures, tensors
from scripts.comparison.sides import CASES, JOBS, Side

LOSS = 2.5
NEXT_LOSS = math.nextafter(LOSS, 3.0)
ADAPTER = {"lora_A": np.array([[1.0, 2.0]], np.float32), "lora_B": np.zeros((2, 1), np.float32)}


def write_run(run: Path) -> Path:
    """A run folder with one trial and a bundle."""
    trial, rung = run / "trials" / "t000-abc", run / "trials" / "t000-abc" / "rung-0"
    for folder in (rung / "adapter", run / "data", run / "test", run / "bundle"):
        folder.mkdir(parents=True)
    (trial / "trial.json").write_text(json.dumps({"trial": {"trial_id": "t000-abc", "number": 0, "control": None}}))
    steps = [{"step": step, "tokens": 9, "loss": LOSS, "grad_norm": 1.0, "tokens_per_s": 99.0} for step in (1, 2)]
    (trial / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    result = {"eval_loss": LOSS, "metrics": {"loss": LOSS}, "engine": {"executor": "torch", "fused_trials": 2}, "started_at": 1.0}
    (trial / "result-0.json").write_text(json.dumps(result))
    (run / "refit").mkdir()
    (run / "refit" / "trial.json").write_text(json.dumps({"trial_id": "t000-abc"}))
    (run / "refit" / "steps.jsonl").write_text(json.dumps(steps[0]) + "\n")
    save_file(ADAPTER, rung / "adapter" / "adapter_model.safetensors")
    np.savez(rung / "eval.npz", loss_sums=np.array([LOSS, LOSS]))
    np.savez(run / "data" / "train.npz", ids=np.arange(5))
    (run / "transfer.json").write_text(json.dumps({"verdict": "positive", "scores": [{"model": "promoted", "loss": LOSS}]}))
    save_file({"weight": np.ones(3, np.float32)}, run / "bundle" / "model.safetensors")
    return run


def replace_text(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new, 1))

    return change


def change_tensor(file: str, name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        found = load_file(run / file)
        found[name].flat[-1] = np.nextafter(found[name].flat[-1], np.float32(9))
        save_file(found, run / file)

    return change


def change_array(run: Path) -> None:
    np.savez(run / "trials/t000-abc/rung-0/eval.npz", loss_sums=np.array([LOSS, NEXT_LOSS]))


@pytest.mark.parametrize(
    ("change", "part", "name"),
    [
        (replace_text("trials/t000-abc/steps.jsonl", f'"loss": {LOSS}', f'"loss": {NEXT_LOSS!r}'), "trial 0", "step 1 loss"),
        (
            replace_text("trials/t000-abc/result-0.json", f'_loss": {LOSS}', f'_loss": {NEXT_LOSS!r}'),
            "trial 0",
            "rung 0 eval_loss",
        ),
        (
            replace_text("trials/t000-abc/result-0.json", f'"loss": {LOSS}', f'"loss": {NEXT_LOSS!r}'),
            "trial 0",
            "rung 0 metrics loss",
        ),
        (replace_text("transfer.json", "positive", "negative"), "bundle", "transfer verdict"),
        (change_tensor("trials/t000-abc/rung-0/adapter/adapter_model.safetensors", "lora_B"), "trial 0", "rung-0/adapter lora_B"),
        (change_tensor("bundle/model.safetensors", "weight"), "bundle", "bundle/model.safetensors weight"),
        (change_array, "trial 0", "rung-0/eval loss_sums"),
    ],
)
def test_a_last_bit_is_a_difference(tmp_path: Path, change: Callable[[Path], None], part: str, name: str) -> None:
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after")
    assert run_figures(before) == run_figures(after)
    change(after)
    found = {key: differences(figures, run_figures(after)[key]) for key, figures in run_figures(before).items()}
    assert [(key, different.name) for key, all_of_it in found.items() for different in all_of_it] == [(part, name)]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("trials/t000-abc/steps.jsonl", '"tokens_per_s": 99.0', '"tokens_per_s": 98.0'),
        ("trials/t000-abc/result-0.json", '"started_at": 1.0', '"started_at": 2.0'),
        ("trials/t000-abc/result-0.json", '"fused_trials": 2', '"fused_trials": 1'),
    ],
)
def test_what_depends_on_time_is_no_difference(tmp_path: Path, file: str, old: str, new: str) -> None:
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after")
    replace_text(file, old, new)(after)
    assert run_figures(before) == run_figures(after)


def test_a_figure_that_is_missing_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == [Difference("a", "1", None), Difference("c", None, "3")]
    assert str(Difference("a", "1", None)) == "a: 1 -> missing"


def test_a_step_that_is_missing_is_a_difference(tmp_path: Path) -> None:
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after")
    steps = after / "trials/t000-abc/steps.jsonl"
    steps.write_text(steps.read_text().splitlines(keepends=True)[0])
    found = differences(run_figures(before)["trial 0"], run_figures(after)["trial 0"])
    assert found
    assert all(each.name.startswith("step 2") and each.after is None for each in found)


def test_floats_are_exact_and_not_a_number_is_equal_to_itself() -> None:
    assert dict(exact({"x": [0.1, 1, None, math.nan]}, "top")) == {
        "top x 0": "0x1.999999999999ap-4",
        "top x 1": "1",
        "top x 2": "null",
        "top x 3": "nan",
    }


def test_tensors_have_dtype_shape_and_bytes_but_no_metadata(tmp_path: Path) -> None:
    plain, same, shaped = (tmp_path / name for name in ("plain", "same", "shaped"))
    save_file(ADAPTER, plain)
    save_file(dict(reversed(ADAPTER.items())), same, metadata={"format": "pt"})
    save_file({name: tensor.reshape(-1) for name, tensor in ADAPTER.items()}, shaped)
    assert plain.read_bytes() != same.read_bytes()
    assert dict(tensors(plain)) == dict(tensors(same))
    assert [each.name for each in differences(dict(tensors(plain)), dict(tensors(shaped)))] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("job", JOBS)
def test_the_specs_of_the_jobs_are_valid(tmp_path: Path, job: str) -> None:
    side = Side(tmp_path, tmp_path)
    side.write(job)
    assert load_spec(side.spec(job)).spec.name == job
    assert any(case.job == job for case in CASES.values())
