from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.anatomy import LayerSelection
from orchestrator.errors import SelectionError, TrainingError
from orchestrator.train.adapters.branch import Branch, open_branch, parameter_named
from orchestrator.train.adapters.layers import AdaptedLinear
from orchestrator.train.integrity import changed, fingerprint, tensor_hash, tensors_of
from orchestrator.train.model.base import LoadedBase

IDS = torch.arange(1, 17)[None]
Selector = Callable[..., LayerSelection]


def train(branch: Branch, steps: int = 2) -> list[float]:
    """A few steps of plain SGD on a fixed row; the losses."""
    losses = []
    for _ in range(steps):
        output = branch.model(input_ids=IDS)
        logits = output.logits.float()
        if logits.dim() == 3:
            loss = nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
        else:
            loss = nn.functional.cross_entropy(logits, torch.tensor([1]))
        loss.backward()
        with torch.no_grad():
            for _, parameter in branch.learning_parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


def state_of(base: LoadedBase) -> tuple[dict[str, str], dict[str, int], int, bool]:
    """Hashes, identities of parameters, number of hooks, and whether anything learns."""
    model = base.model
    hooks = sum(len(value) for module in model.modules() for name, value in vars(module).items() if "hooks" in name and value)
    identities = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return fingerprint(tensors_of(model)), identities, hooks, any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(
    ("policy", "tune"),
    [
        ("last:2", "lora"),
        ("last:2", "full"),
        ("blocks:1,3", "full"),
        ("head", "full"),
        ("last:1+head", "lora"),
        ("all+head", "full"),
        ("last:1+embeddings+norms", "lora"),
        ("last:2+embeddings+norms", "full"),
        ("last:1+head+embeddings", "full"),
        ("last:1+new_tokens", "lora"),
        ("head+new_tokens", "full"),
        ("last:1+new_tokens+norms", "full"),
        ("none", "full"),
    ],
)
def test_exactly_the_planned_parameters_learn_and_closing_leaves_no_trace(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tied: bool, quantize: str, policy: str, tune: str
):
    base = base_of(llama_folder(tied=tied, hidden_size=256), quantize=quantize)
    selection = selection_on(base, policy, tune)
    before = state_of(base)
    config = base.model.config.to_dict()
    with open_branch(base, selection, lora_alpha=8, seed=3) as branch:
        names = [name for name, _ in branch.learning_parameters()]
        modules = {name.removesuffix(".weight") for name in selection.adapted}
        lora = {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
        assert set(names) == {*selection.trainable, *lora}
        assert len(set(names)) == len(names)
        assert sum(parameter.numel() for _, parameter in branch.learning_parameters()) == selection.num_trainable_parameters
        assert {parameter.dtype for _, parameter in branch.learning_parameters()} <= {base.dtype}
        if policy != "none":
            frozen = fingerprint(tensors_of(branch.model, except_for=names_inside(branch)))
            losses = train(branch, steps=4)
            assert losses[-1] < losses[0]
            assert changed(frozen, fingerprint(tensors_of(branch.model, except_for=names_inside(branch)))) == []
    assert state_of(base) == before
    assert base.model.config.to_dict() == config
    assert not any(isinstance(module, AdaptedLinear) for module in base.model.modules())
    assert all(parameter.grad is None for parameter in base.model.parameters())
    assert (base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight) == tied


def names_inside(branch: Branch) -> set[str]:
    """Names that `tensors_of` gives to what learns."""
    learning = {id(parameter) for _, parameter in branch.learning_parameters()}
    named = branch.model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", ".") for name, parameter in named if id(parameter) in learning}


def test_an_untouched_branch_computes_what_the_base_does(llama_folder: Callable, base_of: Callable, selection_on: Selector):
    base = base_of(llama_folder())
    with torch.no_grad():
        expected = base.model(input_ids=IDS).logits
        for policy, tune in (("all", "lora"), ("all+head", "full"), ("head", "lora")):
            with open_branch(base, selection_on(base, policy, tune), lora_alpha=8, seed=0) as branch:
                assert torch.equal(branch.model(input_ids=IDS).logits, expected)
                hidden = branch.backbone()(input_ids=IDS, use_cache=False).last_hidden_state
                assert torch.equal(branch.head()(hidden), expected)


def test_blocks_that_learn_on_an_nf4_base_have_the_original_16_bit_weights(
    llama_folder: Callable, base_of: Callable, selection_on: Selector
):
    folder = llama_folder(hidden_size=256)
    plain, base = base_of(folder, dtype=torch.bfloat16), base_of(folder, quantize="nf4", dtype=torch.bfloat16)
    with open_branch(base, selection_on(base, "last:2", "full"), lora_alpha=0, seed=0) as branch:
        for name, parameter in branch.learning_parameters():
            assert torch.equal(parameter, plain.model.get_parameter(name)), name
        assert hasattr(base.model.get_parameter("model.layers.1.mlp.up_proj.weight"), "quant_state")
        assert not hasattr(base.model.get_parameter("model.layers.2.mlp.up_proj.weight"), "quant_state")
    with open_branch(base, selection_on(base, "all", "full"), lora_alpha=0, seed=0) as branch, torch.no_grad():
        assert torch.equal(branch.model(input_ids=IDS).logits, plain.model(input_ids=IDS).logits)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_biases_learn_with_full_and_stay_with_lora(
    qwen_folder: Path, base_of: Callable, selection_on: Selector, quantize: str, tune: str
):
    base = base_of(qwen_folder, quantize=quantize)
    before, bias = state_of(base), "model.layers.1.self_attn.q_proj.bias"
    with open_branch(base, selection_on(base, "last:1", tune), lora_alpha=8, seed=0) as branch:
        start = tensor_hash(parameter_named(branch.model, bias))
        train(branch)
        assert (tensor_hash(parameter_named(branch.model, bias)) != start) == (tune == "full")
    assert state_of(base) == before


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_twenty_mixed_branches_leave_the_base_bit_identical_and_nothing_behind(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, quantize: str
):
    base = base_of(llama_folder(hidden_size=256), quantize=quantize, dtype=torch.bfloat16)
    before, kinds = (
        state_of(base),
        [("last:2", "lora"), ("last:2", "full"), ("head", "full"), ("all", "lora"), ("all+head", "full")],
    )
    losses: dict[tuple[str, str], list[list[float]]] = {}
    for number in range(20):
        kind = kinds[number % len(kinds)]
        torch.manual_seed(number)
        with open_branch(base, selection_on(base, *kind), lora_alpha=8, seed=5) as branch:
            branch.model.register_forward_hook(lambda *_: None)
            branch.backbone().register_full_backward_hook(lambda *_: None)
            losses.setdefault(kind, []).append(train(branch))
    gc.collect()
    assert state_of(base) == before
    assert not [thing for thing in gc.get_objects() if isinstance(thing, AdaptedLinear)]
    assert all(run == runs[0] for runs in losses.values() for run in runs), "law 10: first or fifth in the gang"


def test_hooks_and_attributes_that_an_engine_left_are_taken_off_and_older_ones_stay(
    llama_folder: Callable, base_of: Callable, selection_on: Selector
):
    base = base_of(llama_folder())
    calls: list[str] = []
    handle = base.model.register_forward_pre_hook(lambda *_: calls.append("older"))
    with open_branch(base, selection_on(base, "last:1", "full"), lora_alpha=0, seed=0) as branch:
        branch.model.register_forward_pre_hook(lambda *_: calls.append("engine"))
        branch.backbone().pre_bwd_fn = torch.zeros(3)
        parameter = branch.learning_parameters()[0][1]
        setattr(parameter, "_hp_mapping", torch.zeros(3))  # noqa: B010
        parameter.data = torch.zeros(parameter.numel() + 5)[5:].view_as(parameter)
        branch.model.eval()
    base.model(input_ids=IDS)
    assert calls == ["older"]
    assert base.model.training
    assert not hasattr(branch.backbone(), "pre_bwd_fn")
    assert not hasattr(parameter, "_hp_mapping")
    assert parameter.untyped_storage().nbytes() == parameter.nbytes, "no view of an engine's flat buffer"
    handle.remove()


def test_tensors_of_its_own_are_put_back_in_their_place(llama_folder: Callable, base_of: Callable, selection_on: Selector):
    """Memory may have run out: nothing is allocated for what no engine has moved."""
    base = base_of(llama_folder())
    before = state_of(base)
    with open_branch(base, selection_on(base, "last:1", "full"), lora_alpha=0, seed=0) as branch:
        learning = [parameter for _, parameter in branch.learning_parameters()]
        places = [parameter.data_ptr() for parameter in learning]
        train(branch)
    assert [parameter.data_ptr() for parameter in learning] == places
    assert state_of(base) == before


def test_the_same_seed_gives_the_same_new_parameters_and_leaves_the_global_generator_alone(
    llama_folder: Callable, base_of: Callable, selection_on: Selector
):
    base = base_of(llama_folder(), task="classify")

    def values(seed: int, policy: str = "all") -> dict[str, torch.Tensor]:
        torch.randn(seed + 3)
        state = torch.get_rng_state()
        with open_branch(base, selection_on(base, policy), lora_alpha=8, seed=seed) as branch:
            assert torch.equal(torch.get_rng_state(), state)
            return {name: parameter.detach().clone() for name, parameter in branch.learning_parameters()}

    first, again, other, fewer = values(1), values(1), values(2), values(1, "last:1")
    a = "model.layers.3.mlp.up_proj.lora_A.weight"
    for name in first:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first[a], other[a])
    assert torch.equal(first[a], fewer[a]), "a block's adapter does not depend on its neighbours"
    assert not torch.equal(first[a], first["model.layers.2.mlp.up_proj.lora_A.weight"])
    assert first[a].abs().max() <= 64**-0.5 * 1.001
    assert not first["model.layers.3.mlp.up_proj.lora_B.weight"].any()
    assert not torch.equal(first["score.weight"], other["score.weight"])


@pytest.mark.parametrize(("policy", "tune"), [("head", "full"), ("last:1", "lora"), ("last:1", "full")])
def test_every_branch_of_a_classifier_starts_from_its_own_seed(
    llama_folder: Callable, bert_folder: Path, base_of: Callable, selection_on: Selector, policy: str, tune: str
):
    for folder in (llama_folder(), bert_folder):
        base = base_of(folder, task="classify")
        base.model.eval()
        before = state_of(base)
        runs = []
        for seed in (0, 1, 0):
            with open_branch(base, selection_on(base, policy, tune), lora_alpha=8, seed=seed) as branch:
                runs.append(train(branch))
                assert branch.head() is base.model.get_submodule(base.anatomy.classifier_weight.removesuffix(".weight"))
        assert runs[0] == runs[2] != runs[1]
        assert state_of(base) == before


def test_a_name_that_the_base_does_not_have_is_an_error_with_near_names(
    llama_folder: Callable, base_of: Callable, selection_on: Selector
):
    base = base_of(llama_folder())
    before = state_of(base)
    right = selection_on(base, "last:1", "full")
    wrong = right.model_copy(update={"trainable": ("model.layers.3.mlp.up_prj.weight",)})
    with pytest.raises(SelectionError, match=r"up_prj[\s\S]*model.layers.3.mlp.up_proj.weight"):
        open_branch(base, wrong, lora_alpha=0, seed=0)
    lora = selection_on(base, "last:1")
    norm = lora.model_copy(update={"adapted": (*lora.adapted, "model.layers.3.input_layernorm.weight")})
    with pytest.raises(SelectionError, match="not a matrix product"):
        open_branch(base, norm, lora_alpha=8, seed=0)
    silent = right.model_copy(update={"frozen": right.frozen[1:]})
    with pytest.raises(SelectionError, match=f"does not cover {right.frozen[0]}"):
        open_branch(base, silent, lora_alpha=0, seed=0)
    assert state_of(base) == before


def test_a_branch_that_fails_to_open_leaves_no_trace(llama_folder: Callable, base_of: Callable, selection_on: Selector):
    base = base_of(llama_folder(hidden_size=256), quantize="nf4")
    before = state_of(base)
    for policy, tune in (("last:2", "lora"), ("last:2+head", "full")):
        planned = selection_on(base, policy, tune).model_copy(update={"num_trainable_parameters": 17})
        with pytest.raises(TrainingError, match="the plan says 17"):
            open_branch(base, planned, lora_alpha=8, seed=0)
        assert state_of(base) == before


def test_a_tied_head_learns_as_a_copy_or_not_at_all(llama_folder: Callable, base_of: Callable, selection_on: Selector):
    base = base_of(llama_folder())
    selection = selection_on(base, "head", "full")
    with open_branch(base, selection, lora_alpha=0, seed=0) as branch:
        assert base.model.config.tie_word_embeddings is False
        assert branch.head().weight is not base.model.get_input_embeddings().weight
    assert base.model.config.tie_word_embeddings is True
    with pytest.raises(TrainingError, match=r"was planned but is not trainable|was not planned"):
        open_branch(base, selection.model_copy(update={"unties_head": False}), lora_alpha=0, seed=0)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_gradients_of_a_trial_that_broke_off_do_not_reach_the_next(
    llama_folder: Callable, base_of: Callable, selection_on: Selector
):
    base = base_of(llama_folder())
    branch = open_branch(base, selection_on(base, "last:1", "full"), lora_alpha=0, seed=0)
    branch.model(input_ids=IDS).logits.sum().backward()
    branch.close()
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_one_branch_at_a_time_and_closing_twice_is_harmless(llama_folder: Callable, base_of: Callable, selection_on: Selector):
    base = base_of(llama_folder())
    for policy, tune in (("last:1", "full"), ("last:1", "lora")):
        branch = open_branch(base, selection_on(base, policy, tune), lora_alpha=8, seed=0)
        with pytest.raises(TrainingError, match="already has an open branch"):
            open_branch(base, selection_on(base, "head", "full"), lora_alpha=8, seed=0)
        branch.close()
        branch.close()


def test_a_keeper_is_asked_to_save_before_and_restore_after(llama_folder: Callable, base_of: Callable, selection_on: Selector):
    events: list[str] = []

    class Recorder:
        def save(self, parameters):
            events.append(f"save {len(parameters)} learning={any(p.requires_grad for _, p in parameters)}")

        def restore(self):
            events.append("restore")

    base = base_of(llama_folder())
    selection = selection_on(base, "last:2", "full")
    with open_branch(base, selection, lora_alpha=0, seed=0, keeper=Recorder()):
        events.append("open")
    assert events == [f"save {len(selection.trainable)} learning=False", "open", "restore"]
