"""Training on stored hidden states gives the losses of plain training, for every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, build_set
from orchestrator.train.adapters.branch import head_name, open_branch
from orchestrator.train.batches import RowPlan, StepPlan, step_inputs
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.evaluation import evaluate
from orchestrator.train.loop import EngineRounds, LoopTrial, train_steps
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.train.model.objective import objective_of
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.chunks import MemoryChunks
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.work.execution import BaseLoad, TrainSettings
from orchestrator.work.trial import TrialSpec

STEPS, VOCAB = 50, 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2 with biases": Qwen2Config(**SIZES, num_key_value_heads=2),
    "mistral with a window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6),
    "gemma with scaled embeddings": GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=16),
    "gemma3 with windows in some layers": Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "phi": PhiConfig(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}


def make_base(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, task: Any = "completion") -> LoadedBase:
    torch.manual_seed(3)
    if task == "classify":
        config.num_labels = 3
    kind = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    model = kind.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    anatomy = read_anatomy(folder, need_weights=True)
    load = BaseLoad(
        folder=str(folder), model_type=anatomy.model_type, quantize="none", task=task, num_classes=3 if task == "classify" else 0
    )
    return load_base(load, anatomy, dtype=dtype, device=torch.device("cpu"))


def make_set(*, classes: bool = False) -> TokenizedSet:
    generator = np.random.default_rng(0)
    lengths = generator.integers(6, 26, size=24)
    pairs = [(generator.integers(3, VOCAB, size=n), np.arange(n) >= n // 3) for n in lengths]
    return build_set(pairs, labels=generator.integers(3, size=24).tolist() if classes else None)


def stored(base: LoadedBase, data: TokenizedSet, cut: int, rows: RowPlan) -> TrunkStates:
    head = base.model.get_submodule(head_name(base).rpartition(".")[0])
    builder = TrunkBuilder(base, objective_of(base, head), rows, Ranks(), partitioned=False)
    return builder.build(data, {cut: MemoryChunks()})[cut]


def losses(
    base: LoadedBase, data: TokenizedSet, policy: str, tune: Any, rows: RowPlan, trunk: TrunkStates | None
) -> tuple[list[float], float]:
    """(loss of every step, loss of the set afterwards)"""
    task = base.load.task
    rank = 4 if tune == "lora" else None
    selection = select(base.anatomy, policy, tune, rank, task=task, num_classes=base.load.num_classes)
    trial = TrialSpec(
        trial_id="t",
        number=0,
        layers=policy,
        tune=tune,
        learning_rate=3e-3,
        lora_rank=rank,
        total_steps=STEPS,
        total_tokens=96 * STEPS,
        seed=1,
    )
    settings = TrainSettings(warmup=0.1, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=96)
    made: list[float] = []
    with open_branch(base, selection, lora_alpha=8, seed=1) as branch:
        objective = objective_of(base, branch.head(), selection.cut)
        torch.manual_seed(1)
        objective.train()
        engine = TorchEngine(objective, branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0)
        steps = step_inputs(StepPlan(data, 96, 1), rows, 0, STEPS, trunk)
        in_loop = LoopTrial(engine, trial, settings, lambda report, _: made.append(report.loss))
        train_steps([in_loop], EngineRounds(engine, torch.device("cpu")), steps, Ranks())
        assert not in_loop.failure
        after = evaluate(objective, data, rows, Ranks(), trunk).loss
        engine.close()
    return made, after


EVERY_DAY = ("gemma3 with windows in some layers",)
"""It scales its embeddings too."""
MORE = [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in DECODERS]


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MORE)
def test_fifty_steps_in_float32(tmp_path: Path, name: str, tune: str) -> None:
    base, data, rows = make_base(tmp_path, DECODERS[name], torch.float32), make_set(), RowPlan(48, 2, pack=True)
    plain, plain_after = losses(base, data, "last:2", tune, rows, None)
    cached, cached_after = losses(base, data, "last:2", tune, rows, stored(base, data, 2, rows))
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(cached, plain, rtol=1e-6)
    assert cached_after == pytest.approx(plain_after, rel=1e-6)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_documents_with_rows_of_their_own_give_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    base, data, rows = make_base(tmp_path, DECODERS["llama"], dtype), make_set(), RowPlan(48, 1, pack=False)
    plain = losses(base, data, "last:2", "lora", rows, None)
    assert losses(base, data, "last:2", "lora", rows, stored(base, data, 2, rows)) == plain


@pytest.mark.slow
def test_bfloat16_stays_within_what_other_packings_do(tmp_path: Path) -> None:
    base, data, rows = make_base(tmp_path, DECODERS["llama"], torch.bfloat16), make_set(), RowPlan(48, 2, pack=True)
    packings = [rows, RowPlan(48, 1, pack=False), RowPlan(64, 1, pack=True), RowPlan(30, 4, pack=True)]
    plain = [np.array(losses(base, data, "last:2", "lora", packing, None)[0]) for packing in packings]
    spread = max(np.abs(one - other).max() for one in plain for other in plain)
    cached = np.array(losses(base, data, "last:2", "lora", rows, stored(base, data, 2, rows))[0])
    assert 0 < spread < 1e-2
    assert np.abs(cached - plain[0]).max() <= spread


def test_gpt2_with_position_embeddings(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model.save_pretrained(tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    anatomy = read_anatomy(tmp_path, need_weights=False)
    load = BaseLoad(folder=str(tmp_path), model_type="gpt2", quantize="none", task="completion")
    base = LoadedBase(model=model, anatomy=anatomy, load=load, dtype=torch.float32, device=torch.device("cpu"))
    data, rows = make_set(), RowPlan(48, 2, pack=True)
    plain, _ = losses(base, data, "last:2", "full", rows, None)
    cached, _ = losses(base, data, "last:2", "full", rows, stored(base, data, 2, rows))
    np.testing.assert_allclose(cached, plain, rtol=1e-6)


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_an_encoder_that_classifies(tmp_path: Path, tune: str) -> None:
    """Its dropout applies above the cut only, so that stored states are those of every step."""
    base, data = make_base(tmp_path, BertConfig(**SIZES), torch.float32, "classify"), make_set(classes=True)
    assert base.anatomy.dropout
    rows = RowPlan(48, 4, pack=False)
    plain, plain_after = losses(base, data, "last:2", tune, rows, None)
    cached, cached_after = losses(base, data, "last:2", tune, rows, stored(base, data, 2, rows))
    np.testing.assert_allclose(cached, plain, rtol=1e-6)
    assert cached_after == pytest.approx(plain_after, rel=1e-6)


def test_a_head_alone_begins_above_the_last_block(tmp_path: Path) -> None:
    base, data, rows = make_base(tmp_path, DECODERS["llama"], torch.float32), make_set(), RowPlan(48, 2, pack=True)
    plain, _ = losses(base, data, "head", "full", rows, None)
    cached, _ = losses(base, data, "head", "full", rows, stored(base, data, 4, rows))
    np.testing.assert_allclose(cached, plain, rtol=1e-6)
