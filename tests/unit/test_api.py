"""The Python API: what it takes for a spec, and that it is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import SpecError, UsageError
from orchestrator.spec import JobSpec, load_spec


@pytest.fixture
def values(tmp_path: Path) -> dict:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n' * 200)
    data = {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 32}
    return {"name": "x", "base": {"model": "sample"}, "task": "completion", "data": data, "search": {"trials": 5}}


def test_importing_it_imports_nothing_heavy():
    code = """
        import sys, orchestrator
        assert orchestrator.__version__
        heavy = [name for name in ("torch", "ray", "transformers", "pandas", "pydantic") if name in sys.modules]
        assert not heavy, heavy
        assert callable(orchestrator.sweep) and callable(orchestrator.plan)
        import orchestrator.plan.values, orchestrator.plan
        assert callable(orchestrator.plan) and orchestrator.plan.make_plan
        heavy = [name for name in ("torch", "ray", "transformers", "pandas") if name in sys.modules]
        assert not heavy, heavy
        assert {"sweep", "plan", "load_run"} <= set(dir(orchestrator))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_spec_may_be_a_path_a_dictionary_or_a_value(values: dict, tmp_path: Path):
    import json

    (tmp_path / "x.yaml").write_text(json.dumps(values))
    loaded = load_spec(tmp_path / "x.yaml")
    forms = (tmp_path / "x.yaml", str(tmp_path / "x.yaml"), values, JobSpec.model_validate(loaded.spec), loaded)
    plans = [orchestrator.plan(form) for form in forms]
    assert {plan.spec_sha256 for plan in plans} == {plans[0].spec_sha256}
    assert {plan.search.num_trials for plan in plans if plan.search} == {5}
    for form in forms:
        changed = orchestrator.plan(form, overrides={"search.trials": 3})
        assert changed.search is not None
        assert changed.search.num_trials == 3


def test_mistakes_are_the_commands_mistakes(values: dict):
    with pytest.raises(SpecError, match=r"overrides\['search.trails'\].*did you mean trials"):
        orchestrator.plan(values, overrides={"search.trails": 3})
    with pytest.raises(UsageError, match="the spec is a int"):
        orchestrator.plan(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no-such"):
        orchestrator.plan("no-such-spec.yaml")
    with pytest.raises(AttributeError, match="no attribute 'train_it'"):
        _ = orchestrator.train_it
