"""Routed experts: adapters in PEFT's form, merged back into the stored parts; routers; the load-balancing loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.anatomy import LayerSelection, select
from orchestrator.errors import SelectionError
from orchestrator.plan.memory.activations import kept_by_adapter
from orchestrator.plan.merge import make_merge_plan
from orchestrator.serve.merging import merge
from orchestrator.spec.adapters import AdapterOptions, Modules
from orchestrator.spec.models import Tune
from orchestrator.train.adapters.artifacts import attach_artifact, save_artifact
from orchestrator.train.adapters.branch import Branch, open_branch, open_group
from orchestrator.train.adapters.naming import AdapterSpec
from orchestrator.train.integrity import changed, fingerprint, tensors_of
from orchestrator.train.model.balance import without_router_logits
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import objective_of

IDS = torch.arange(3, 23)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
KINDS: dict[str, dict[str, Any]] = {
    # Shared experts, a dense block, a loss for balance.
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0], "output_router_logits": True},
    # Linear layers that PEFT takes for experts by their names, and a stored buffer that corrects the router.
    "deepseek_v3": {**LATENT, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    # [experts, in, out], with biases, stored as they are; no sdpa.
    "gpt_oss": {"num_local_experts": 6, "intermediate_size": 8},
    # A class that computes its experts itself.
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 8, "intermediate_size_mlp": 12},
}
MODULES: Modules = ("all", "experts")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(5)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | KINDS[kind]))
            for name, tensor in model.state_dict().items():
                if tensor.dim() > 1 or name.endswith("bias"):
                    torch.nn.init.normal_(tensor, std=0.3)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return make


def plain(folder: Path, base: LoadedBase) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager" if base.anatomy.attention == "eager" else None
    )


def selected(base: LoadedBase, policy: str = "last:2", modules: Modules = MODULES, **options: Any) -> LayerSelection:
    adapter = AdapterOptions.model_validate({"modules": modules, **options})
    return select(base.anatomy, policy, "lora", 4, adapter=adapter, task="completion")


def moved(branch: Branch) -> dict[str, torch.Tensor]:
    """Give everything that learns new values, as training would."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in branch.learning_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach().clone() for name, parameter in branch.learning_parameters()}


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, output_router_logits=False).logits.float().sin().sum()


def merged(base: LoadedBase, rung: Path, selection: LayerSelection, out: Path) -> Path:
    out.mkdir()
    merge(make_merge_plan(base.anatomy, rung, base.load, selection, held_dtype="float32"), out)
    (out / "config.json").write_bytes((Path(base.load.folder) / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it_and_a_merge_serves_it(kind: str, folder_of: Any, base_of: Any, tmp_path: Path) -> None:
    """Equal logits and gradients in PEFT, and equal logits of the merged weights, whose names are the base's."""
    base: LoadedBase = base_of(folder_of(kind))
    before = fingerprint(tensors_of(base.model))
    assert torch.equal(loss_of(base.model), loss_of(plain(folder_of(kind), base))), "the experts compute what transformers does"
    selection = selected(base)
    with open_branch(base, selection, lora_alpha=12, seed=1) as branch:
        saved = save_artifact(branch, tmp_path, moved(branch))
        ours = loss_of(branch.model)
        ours.backward()
        norms = sorted(float(p.grad.norm()) for _, p in branch.learning_parameters() if p.grad is not None)
        assert len(norms) == len(branch.learning_parameters())
    assert not changed(before, fingerprint(tensors_of(base.model)))
    config = json.loads((saved / "adapter_config.json").read_text())
    assert set(base.anatomy.stacked[-1]) <= set(config["target_parameters"])
    theirs = PeftModel.from_pretrained(plain(folder_of(kind), base), saved, is_trainable=True).train()
    loss = loss_of(theirs)
    loss.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-4)
    found = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.grad is not None)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(found), rtol=1e-3, atol=1e-4)
    with attach_artifact(base, tmp_path):
        assert torch.equal(loss_of(base.model), ours)
    out = merged(base, tmp_path, selection, tmp_path / "merged")
    torch.testing.assert_close(loss_of(plain(out, base)), ours, rtol=1e-5, atol=1e-3)
    stored, wanted = load_file(out / "model.safetensors"), load_file(folder_of(kind) / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: tensor.shape for name, tensor in wanted.items()}


def test_routers_learn_only_if_asked(folder_of: Any, base_of: Any, tmp_path: Path) -> None:
    base: LoadedBase = base_of(folder_of("qwen2_moe"))
    router = "model.layers.2.mlp.gate.weight"
    ways: tuple[tuple[Tune, int | None], ...] = (("full", None), ("lora", 4))
    for tune, rank in ways:
        assert router not in select(base.anatomy, "last:1", tune, rank, task="completion").trainable
        selection = select(base.anatomy, "last:1+router", tune, rank, task="completion")
        assert router in selection.trainable
        with open_branch(base, selection, lora_alpha=8, seed=0) as branch:
            (tmp_path / tune).mkdir()
            save_artifact(branch, tmp_path / tune, moved(branch))
            ours = loss_of(base.model)
        out = merged(base, tmp_path / tune, selection, tmp_path / tune / "out")
        torch.testing.assert_close(loss_of(plain(out, base)), ours, rtol=1e-5, atol=1e-3)


def test_what_peft_cannot_do_on_experts_is_refused(folder_of: Any, base_of: Any) -> None:
    base: LoadedBase = base_of(folder_of("qwen2_moe"))
    refused: tuple[tuple[dict[str, Any], str], ...] = (({"kind": "dora"}, "DoRA"), ({"dropout": 0.1}, "lora_dropout 0.1"))
    for options, named in refused:
        with pytest.raises(SelectionError, match=f"{named} on routed experts"):
            selected(base, **options)
        assert selected(base, modules="all", **options).adapted
    with pytest.raises(SelectionError, match="cannot share a batch"):
        open_group(base, [AdapterSpec(selected(base), 8, 0)])


def micro_batch(lengths: list[int], width: int) -> dict[str, torch.Tensor]:
    """Rows of one document each, padded at the end; every position but the last is supervised."""
    ids = (torch.arange(width)[None] * 7 + torch.arange(len(lengths))[:, None] * 5) % 61 + 3
    inside = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    labels = torch.where(inside.roll(-1, 1) & inside, ids.roll(-1, 1), -100)
    labels[:, -1] = -100
    return {
        "input_ids": torch.where(inside, ids, 0),
        "position_ids": torch.arange(width).repeat(len(lengths), 1),
        "labels": labels,
        "document_ids": torch.where(inside, torch.arange(len(lengths))[:, None], -1),
        "class_labels": torch.full((len(lengths),), -1),
        "lengths": torch.tensor(lengths),
    }


def test_the_balance_is_the_class_s_own(folder_of: Any, base_of: Any) -> None:
    """As `forward(labels=...)` of transformers adds it to the mean; padding does not count, and nor does an empty micro-batch."""
    base: LoadedBase = base_of(folder_of("qwen2_moe"))
    assert base.anatomy.experts
    assert base.anatomy.experts.balance == base.model.config.router_aux_loss_coef > 0
    batch = micro_batch([12, 7], 12)
    objective = objective_of(base, base.model.get_submodule("lm_head"))
    ours = objective(**batch)
    mask = batch["document_ids"] >= 0
    theirs = base.model(input_ids=batch["input_ids"], attention_mask=mask.long(), position_ids=batch["position_ids"])
    supervised = batch["labels"] != -100
    tokens = functional.cross_entropy(theirs.logits[supervised], batch["labels"][supervised])
    expected = tokens + base.model.config.router_aux_loss_coef * theirs.aux_loss
    torch.testing.assert_close(ours / supervised.sum(), expected, rtol=1e-5, atol=1e-6)
    assert (expected - tokens).item() > 1e-3
    nothing = objective(**micro_batch([0, 0], 12))
    assert nothing.item() == 0.0
    losses = objective(**batch, each=True).losses
    torch.testing.assert_close(losses.mean(), tokens, rtol=1e-5, atol=1e-6)


def kept_bytes(model: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, weights and adapters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    del loss
    return sum(kept.values())


def test_adapters_keep_what_is_planned(folder_of: Any, base_of: Any) -> None:
    """The rows that experts get and what they are reduced to: no copy of a weight."""
    base: LoadedBase = base_of(folder_of("qwen2_moe"))
    found: dict[Modules, tuple[int, int]] = {}
    for modules in (("all",), ("all", "experts")):
        selection = selected(base, "last:1", modules)
        with open_branch(base, selection, lora_alpha=8, seed=0):
            kept = kept_bytes(base.model)
        planned = sum(kept_by_adapter(base.anatomy, selection, name) for name in selection.adapted)
        found[modules] = kept, planned * IDS.numel() * 4
    (without, planned_without), (with_experts, planned_with) = found.values()
    assert with_experts - without == planned_with - planned_without > 0


def test_text_is_generated_from_a_base_with_a_load_balancing_loss(folder_of: Any, base_of: Any) -> None:
    """Without the context, the loss of transformers fails in cached decoding."""
    base: LoadedBase = base_of(folder_of("qwen2_moe"))
    model: Any = base.model.eval()
    ids = IDS.repeat(2, 1)
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[3], [0]])).long()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "use_cache": True}
    with pytest.raises(RuntimeError, match="must match the size"):
        model.generate(**options)
    with without_router_logits(base.model):
        assert model.generate(**options).shape[1] == ids.shape[1] + 3
    assert base.model.config.output_router_logits
