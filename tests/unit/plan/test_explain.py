"""The plan in words, and data guessed from file sizes."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.plan import estimate_data_size, make_plan, plan_lines
from orchestrator.plan.explain import batch_line


def test_the_lines_say_what_was_decided(base: Any, job: Any, gpus: Any, data: Any) -> None:
    loaded = job(search={"tune": ["lora"], "budget": 0.5}, train={"tokens_per_step": 131072})
    plan = make_plan(loaded, base("70b"), data(), gpus(4), job="sweep", spec_sha256="abc" * 21 + "d")
    text = "\n".join(plan_lines(plan))
    assert "plan test (abcabcabcabc)" in text
    assert "deepspeed ZeRO-3" in text
    assert "rejected    1 rank" in text
    assert "GPU-hours" in text
    assert "the winner is trained again to 90 steps" in text
    assert "\x1b" not in text
    term_lines = [line for line in plan_lines(plan) if line.startswith("    ") and "iB" in line and " · " not in line]
    assert len(term_lines) >= 8


def test_the_derivation_multiplies_to_the_tokens_of_a_step(base: Any, job: Any, cores: Any, data: Any) -> None:
    plan = make_plan(job(train={"tokens_per_step": 8192}), base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64)
    assert batch_line(plan.execution, 8192) == "8 rows x 512 tokens x 1 rank x 2 accumulation steps = 8192 tokens per step"
    assert plan.reasons[0] == batch_line(plan.execution, 8192)
    assert plan.reasons[1] == "2 epochs x 45 steps = 90 steps, 800k tokens"
    assert batch_line(plan.execution, 8000).endswith("= 8192 positions for 8000 tokens per step")


def test_a_step_says_what_is_replayed_beside_it(base: Any, job: Any, cores: Any, data: Any) -> None:
    loaded = job(search={"replay": [0.0, 0.3, 0.1]}, train={"tokens_per_step": 8192})
    plan = make_plan(loaded, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64)
    assert plan.reasons[0].endswith("= 8192 tokens per step of training data, up to about 11703 with replayed ones")
    short = job(search={"replay": [0.5], "budget": 0.5}, train={"tokens_per_step": 8000})
    plan = make_plan(short, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64)
    (again,) = [reason for reason in plan.reasons if "is trained again to" in reason]
    assert again.endswith("positions for 8000 tokens per step of training data, up to about 16000 with replayed ones")


@pytest.mark.parametrize(("evaluation", "test", "share"), [(0.1, 0.1, 0.8), (0.2, "t.jsonl", 0.8), ("e.jsonl", "t.jsonl", 1.0)])
def test_data_from_file_sizes(job: Any, evaluation: float | str, test: float | str, share: float) -> None:
    spec = job(data={"eval": evaluation, "test": test, "max_tokens": 256}, train={"tokens_per_step": 1000}).spec
    size = estimate_data_size(400_000, 2000, spec, eval_bytes=8000, retain_bytes=10**9)
    assert not size.exact
    assert size.train_tokens == pytest.approx(share * 100_000)
    assert size.train_documents == pytest.approx(share * 2000)
    assert size.steps_per_epoch == pytest.approx(share * 100)
    assert size.eval_tokens == {0.1: 10_000, 0.2: 20_000, "e.jsonl": 2000}[evaluation]
    assert size.retain_tokens == spec.data.retain_tokens
    assert size.longest_document_tokens == 256


def test_a_guess_is_called_one(base: Any, job: Any, cores: Any) -> None:
    loaded = job()
    plan = make_plan(
        loaded, base("tiny"), estimate_data_size(10_000, 10, loaded.spec), cores(), job="sweep", spec_sha256="0" * 64
    )
    assert "token counts are estimated from file sizes, at 4 bytes per token" in plan.notes
    assert any("(estimated)" in line for line in plan_lines(plan))
