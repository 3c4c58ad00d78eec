"""Compiled blocks give the losses of the others, and a trial the same bits wherever and whenever it is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, build_set
from orchestrator.errors import TrainingError
from orchestrator.store import read_jsonl
from orchestrator.train import TrainHost
from orchestrator.train.batches import RowPlan, StepPlan, step_inputs
from orchestrator.train.model import compiled
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.compiled import compiled_blocks, missing_compiler
from orchestrator.work.assignment import TimeCompiling, TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.measurements import CompilePlan
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

VOCAB, STEPS = 97, 20
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA3 = {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, num_hidden_layers=2),
    "qwen2": lambda: Qwen2Config(**SIZES, num_hidden_layers=2, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **GEMMA3, num_hidden_layers=2, num_key_value_heads=2),
    "phi": lambda: PhiConfig(**SIZES, num_hidden_layers=2),
}


class Gang:
    """A host of a small base, and trials on it."""

    def __init__(self, folder: Path, config: PreTrainedConfig, dtype: str = "float32") -> None:
        self.folder = folder
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / "base")
        generator = np.random.default_rng(0)
        for name, count in (("train", 24), ("eval", 6)):
            lengths = generator.integers(8, 24, size=count)
            build_set([(generator.integers(3, 90, size=n), np.arange(n) >= n // 2) for n in lengths]).save(folder / f"{name}.npz")
        self.anatomy = read_anatomy(folder / "base", need_weights=True)
        values = {"device": "cpu", "ranks": 1, "threads_per_rank": 1, "executor": "torch", "dtype": dtype}
        self.execution = ExecutionPlan.model_validate({**values, "row_tokens": 32, "micro_batch_rows": 2})
        load = BaseLoad(
            folder=str(folder / "base"), model_type=self.anatomy.model_type, quantize="none", task="completion", num_classes=0
        )
        self.host = TrainHost.create(load, self.anatomy, self.execution, 0, 1, None)

    def assignment(
        self,
        place: str,
        *,
        compiled: bool,
        policy: str = "all",
        tune: Any = "lora",
        lora_rank: int = 4,
        stop: int = STEPS,
        **way: Any,
    ) -> TrainRung:
        rank = lora_rank if tune == "lora" else None
        trial = TrialSpec(
            trial_id=place,
            number=0,
            layers=policy,
            tune=tune,
            learning_rate=1e-2 if tune == "lora" else 1e-3,
            lora_rank=rank,
            total_steps=STEPS,
            total_tokens=64 * STEPS,
            seed=1,
        )
        train, scored = str(self.folder / "train.npz"), str(self.folder / "eval.npz")
        return TrainRung(
            context=WorkContext(
                settings=TrainSettings(warmup=0.1, schedule="cosine", weight_decay=0.1, grad_clip=0.5, tokens_per_step=64),
                data=DataPaths(train=train, eval=scored),
                metric="loss",
            ),
            trial=trial,
            selection=select(self.anatomy, policy, tune, rank, task="completion"),
            execution=self.execution.model_copy(update={"compiled": compiled, **way}),
            folder=str(self.folder / place),
            rung=0,
            stop_step=stop,
        )

    def run(self, place: str, **how: Any) -> RungResult:
        result = self.host.run_trial(self.assignment(place, **how))
        assert result.state == "done", result.reason
        return result

    def run_together(self, *places: str) -> list[RungResult]:
        """Compiled trials that might share a batch, on a gang that finds that this pays."""
        group = [self.assignment(place, compiled=True) for place in places]
        self.host.batch_sizes.limit(group[0], len(group))
        return self.host.run_group(group)

    def num_full(self) -> int:
        """Micro-batches of a trial that have all the rows they may have."""
        data = TokenizedSet.load(self.folder / "train.npz")
        steps = step_inputs(StepPlan(data, 64, seed=1), RowPlan(32, 2, pack=True), 0, STEPS)
        return sum(len(batch["input_ids"]) == 2 for step in steps for batch in step.micro_batches)

    def losses(self, place: str) -> list[str]:
        """The loss of every step, exactly."""
        return [line["loss_hex"] for line in read_jsonl(self.folder / place / "steps.jsonl")]

    def apart(self, one: str, other: str) -> float:
        """The largest relative difference of their losses."""
        pairs = zip(self.losses(one), self.losses(other), strict=True)
        return max(abs(float.fromhex(a) / float.fromhex(b) - 1) for a, b in pairs)


@pytest.fixture
def gang_of(tmp_path: Path) -> Iterator[Callable[..., Gang]]:
    """(config, dtype) -> a gang of that base."""
    made: list[Gang] = []

    def make(config: PreTrainedConfig, dtype: str = "float32") -> Gang:
        made.append(Gang(tmp_path, config, dtype))
        return made[-1]

    yield make
    for gang in made:
        gang.host.close()


needs_compiler = pytest.mark.skipif(bool(missing_compiler(CPU)), reason="no C++ compiler")


def test_a_gang_traces_each_kind_of_block_once_and_puts_every_block_back(
    gang_of: Callable[..., Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile itself, but for the code that it would make: that takes a C++ compiler half a minute."""

    shapes: list[tuple[int, ...]] = []

    @cache
    def traced(forward: Callable[..., Any]) -> Callable[..., Any]:
        code = torch.compile(forward, dynamic=False, backend="aot_eager")

        def told(block: nn.Module, states: torch.Tensor, **options: Any) -> Any:
            shapes.append(tuple(states.shape[:2]))
            return code(block, states, **options)

        return told

    monkeypatch.setattr(compiled, "_code", traced)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    gang = gang_of(LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2))
    gang.run("eager", compiled=False)
    records = [gang.run(place, compiled=True).engine for place in ("first", "second")]
    gang.run("eager again", compiled=False)
    company = gang.run_together("in company", "beside it")

    assert gang.apart("first", "eager") <= 1e-6
    assert shapes == [(2, 32)] * 4 * gang.num_full(), "every full micro-batch of four trials, and nothing else"
    assert gang.losses("first") == gang.losses("second") == gang.losses("in company") == gang.losses("beside it")
    assert gang.losses("eager again") == gang.losses("eager"), "the base was not put back"
    assert graphs["unique_graphs"] - before == 4, "before and after the attention, and what surrounds it: for all steps"
    assert all(result.engine is not None and result.engine.fused_trials == 1 for result in company), "each is code of its own"
    spent = [record.compile_seconds for record in (*records, *(result.engine for result in company)) if record is not None]
    assert spent[0] > 0
    assert spent[1:] == [0, 0, 0], "a warm gang compiles once"


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_losses_and_a_trial_the_same_bits_at_any_place_in_its_gang(gang_of: Callable[..., Gang]) -> None:
    gang = gang_of(LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2))
    gang.run("eager", compiled=False)
    first = gang.run("first", compiled=True)
    second = gang.run("second", compiled=True)
    gang.run("eager again", compiled=False)
    results = gang.run_together("in company", "beside it")

    assert gang.apart("first", "eager") <= 1e-6
    assert gang.losses("first") != gang.losses("eager"), "nothing was compiled"
    assert gang.losses("second") == gang.losses("first")
    assert gang.losses("in company") == gang.losses("beside it") == gang.losses("first")
    assert gang.losses("eager again") == gang.losses("eager"), "the base was not put back"
    assert {result.eval_loss for result in results} == {first.eval_loss, second.eval_loss}
    assert first.engine is not None
    assert second.engine is not None
    assert (first.engine.compiled, second.engine.compiled) == (True, True)
    assert first.engine.compile_seconds > 0
    assert second.engine.compile_seconds == 0, "a warm gang compiles once"


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("policy", "how"),
    [("all", {}), ("last:1", {"tune": "full"}), ("all", {"checkpointing": True})],
    ids=["lora", "full", "again"],
)
def test_every_family(gang_of: Callable[..., Gang], family: str, policy: str, how: dict[str, Any]) -> None:
    gang = gang_of(FAMILIES[family]())
    gang.run("eager", compiled=False, policy=policy, **how)
    gang.run("compiled", compiled=True, policy=policy, **how)
    again = gang.run("again", compiled=True, policy=policy, **how)
    assert 0 < gang.apart("compiled", "eager") <= 1e-6
    assert gang.losses("again") == gang.losses("compiled")
    assert again.engine is not None
    assert again.engine.compile_seconds == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_gang_compiled_before_changes_no_bit(gang_of: Callable[..., Gang], dtype: str) -> None:
    """Other ranks, other rows, a trial's second half: none of it is what code is chosen by."""
    gang = gang_of(FAMILIES["llama"](), dtype)
    gang.run("first", compiled=True)
    gang.run("other rank", compiled=True, lora_rank=2)
    gang.run("other rows", compiled=True, micro_batch_rows=1)
    gang.run("other weights", compiled=True, tune="full")
    gang.run("fifth", compiled=True)
    gang.run("halves", compiled=True, stop=STEPS // 2)
    rest = gang.assignment("halves", compiled=True)
    gang.host.run(rest.model_copy(update={"rung": 1, "start": str(gang.folder / "halves" / "rung-0")}))
    assert gang.losses("fifth") == gang.losses("halves") == gang.losses("first")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_process_makes_the_same_bits_from_an_empty_cache_and_from_a_full_one(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_compiled as t\n"
        "folder = Path(sys.argv[2]); folder.mkdir(); gang = t.Gang(folder, t.FAMILIES['llama']())\n"
        "gang.run('trial', compiled=True); print(*gang.losses('trial'))"
    )
    said = []
    for number, kept in enumerate(("one", "other", "one")):
        environment = {**os.environ, "ORCHESTRATOR_CACHE": str(tmp_path / kept)}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / str(number))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1])
    assert (tmp_path / "one" / "inductor").is_dir()
    assert said[0] == said[1] == said[2]


def test_without_a_compiler_nothing_is_measured_and_what_must_be_compiled_fails(
    gang_of: Callable[..., Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = gang_of(LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    rung = gang.assignment("measured", compiled=False)
    shared = {"context": rung.context, "execution": rung.execution, "trial": rung.trial, "selection": rung.selection}
    measured = gang.host.measure(TimeCompiling(**shared, seed=1, plan=CompilePlan(option=0, reason="")))
    assert measured.found.failed == "there is no C++ compiler (no-such-compiler)"
    failed = gang.host.run_trial(gang.assignment("failed", compiled=True))
    assert failed.state == "failed"
    assert "no C++ compiler" in failed.reason
    gang.run("eager", compiled=False)


def test_every_block_is_put_back(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(llama_folder())
    blocks = list(base.model.get_submodule(base.anatomy.blocks_module).children())
    values = {"device": "cpu", "ranks": 1, "threads_per_rank": 1, "executor": "torch", "compiled": True}
    execution = ExecutionPlan.model_validate({**values, "row_tokens": 32, "micro_batch_rows": 2})
    with compiled_blocks(base, 2, execution):
        assert ["forward" in vars(block) for block in blocks] == [False, False, True, True]
    with pytest.raises(TrainingError, match="stop here"), compiled_blocks(base, 2, execution):
        raise TrainingError("stop here")
    assert not any("forward" in vars(block) for block in blocks)
