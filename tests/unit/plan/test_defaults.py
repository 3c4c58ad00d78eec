"""What stands in for a section that the spec does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import read_anatomy, resolve_base
from orchestrator.errors import SpecError
from orchestrator.plan import make_plan
from orchestrator.plan.defaults import default_finetune, default_search, usual_lora_rate, with_section
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import LoadedSpec, load_spec, spec_sha256

MINIMAL = {"name": "mine", "base": {"model": "sample"}, "task": "completion", "data": {"train": "train.jsonl"}}


def filled(loaded: LoadedSpec, job: Any) -> LoadedSpec:
    base = resolve_base(loaded.spec.base.model, loaded.folder)
    return with_section(loaded, job, lambda: read_anatomy(base, need_weights=False))


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(json.dumps({**MINIMAL, **sections}))
    return path


@pytest.mark.parametrize(
    ("blocks", "layers"),
    [
        (1, ("all",)),
        (2, ("last:1", "all")),
        (3, ("last:1", "all")),
        (6, ("last:2", "last:3", "all")),
        (8, ("last:2", "last:4", "all")),
        (32, ("last:8", "last:16", "all")),
        (80, ("last:20", "last:40", "all")),
    ],
)
def test_the_default_search_follows_the_depth(base: Any, blocks: int, layers: tuple[str, ...]) -> None:
    found = default_search(base("tiny").model_copy(update={"num_blocks": blocks}))
    assert (found.layers, found.tune, found.lora_rank, found.trials) == (layers, ("lora",), (16,), 12)


@pytest.mark.parametrize(
    ("hidden_size", "usual", "lora"),
    [(192, 3e-3, (5e-4, 9e-3)), (2000, 5e-4, (8e-5, 1.5e-3)), (4096, 3e-4, (5e-5, 9e-4)), (8192, 2e-4, (3e-5, 5e-4))],
)
def test_rates_follow_the_width(base: Any, hidden_size: int, usual: float, lora: tuple[float, float]) -> None:
    anatomy = base("tiny").model_copy(update={"hidden_size": hidden_size})
    assert default_finetune(anatomy).learning_rate == usual
    assert default_search(anatomy).learning_rate.lora == pytest.approx(lora, rel=0.35)
    assert usual_lora_rate(anatomy) == pytest.approx(usual, rel=0.2)


@pytest.mark.parametrize("job", ["sweep", "finetune"])
def test_a_spec_with_neither_section_gets_the_one_that_is_asked_for(tmp_path: Path, job: Any) -> None:
    loaded = filled(load_spec(write(tmp_path)), job)
    name = "search" if job == "sweep" else "finetune"
    assert getattr(loaded.spec, name) is not None
    assert loaded.defaulted.startswith(f"the spec has no `{name}` section; the default")
    assert filled(loaded, job) == loaded, "asked again it stays what it is"


def test_written_out_it_is_the_same_run(tmp_path: Path) -> None:
    loaded = filled(load_spec(write(tmp_path)), "sweep")
    assert loaded.spec.search is not None
    written = load_spec(write(tmp_path, search=loaded.spec.search.model_dump(mode="json")))
    assert spec_sha256(written.spec, "sweep") == spec_sha256(loaded.spec, "sweep")
    assert filled(written, "sweep").defaulted == ""


def test_the_other_jobs_section_is_no_reason_to_guess(tmp_path: Path) -> None:
    loaded = load_spec(write(tmp_path, finetune={}))
    assert filled(loaded, "finetune") is loaded
    with pytest.raises(SpecError, match="the job `sweep` needs this section"):
        filled(loaded, "sweep")


def test_the_plan_tells_it_in_a_line(tmp_path: Path, base: Any, data: Any, cores: Any) -> None:
    loaded = filled(load_spec(write(tmp_path)), "sweep")
    plan = make_plan(loaded, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64)
    assert plan.notes[0] == (
        "the spec has no `search` section; the default search: last:2, last:4, all x lora r16 at 0.0005 to 0.009, 12 trials"
    )


def test_a_shallow_base_gets_the_layers_that_it_has(tmp_path: Path) -> None:
    config = json.loads((SAMPLE_BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    base = {"model": str(tmp_path)}
    shallow = filled(load_spec(write(tmp_path, base=base, search={"trials": 4})), "sweep")
    assert shallow.spec.search is not None
    assert (shallow.spec.search.layers, shallow.spec.search.trials) == (("last:1", "all"), 4)
    assert shallow.defaulted == "`search` names no layers; the base has 2 of them: last:1, all"
    deep = load_spec(write(tmp_path, search={"trials": 4}))
    assert filled(deep, "sweep") is deep
    named = load_spec(write(tmp_path, base=base, search={"layers": ["last:4"]}))
    assert filled(named, "sweep") is named, "what is written is judged where it is written"
