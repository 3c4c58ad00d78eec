"""What a class allows is found by trying it, and a base that does not do what its plan assumes is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.anatomy import ModelAnatomy, Ways
from orchestrator.errors import BaseError
from orchestrator.train.context import HostContext
from orchestrator.train.model import self_test
from orchestrator.train.model.linear_test import not_linear
from orchestrator.train.model.self_test import SelfTest, failed_ways, measured_logit_map, tolerance_of, try_ways
from orchestrator.train.ranks import Ranks
from orchestrator.train.ways import check_ways
from orchestrator.work.execution import ExecutionPlan

from .small_bases import CONFIGS, small_anatomy, small_base, small_folder

CPU = torch.device("cpu")
ALL = ("packs", "pads", "projects", "injects")
EXPECTED: dict[str, tuple[str, ...]] = dict.fromkeys(CONFIGS, ALL) | dict.fromkeys(
    ("opt", "bloom"), ("pads", "projects", "injects")
)
ATTENTION = {"gemma2": "eager", "bloom": "eager", "opt": "sdpa"}
LOGITS = {"gemma2": (1.0, 5.0), "cohere": (0.25, 0.0), "granite": (0.25, 0.0)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: small_folder(tmp_path_factory.mktemp(name), name) for name in CONFIGS}


@pytest.fixture(scope="module")
def anatomies(folders: dict[str, Path]) -> dict[str, ModelAnatomy]:
    return {name: small_anatomy(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_ways_of_a_class(folders: dict[str, Path], anatomies: dict[str, ModelAnatomy], name: str) -> None:
    anatomy = anatomies[name]
    assert (anatomy.logit_scale, anatomy.logit_cap) == LOGITS.get(name, (1.0, 0.0))
    base = small_base(folders[name], anatomy)
    before = base.model.config._attn_implementation
    found = try_ways(base.model, anatomy, "text")
    assert tuple(way for way in ALL if getattr(found, way)) == EXPECTED[name], found.reasons
    assert found.attention == ATTENTION.get(name, "by_document")
    assert base.model.config._attn_implementation == before
    assert set(found.reasons) == {*(set(ALL) - set(EXPECTED[name])), *({"attention"} if name in ATTENTION else set())}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_does_what_its_anatomy_says(folders: dict[str, Path], anatomies: dict[str, ModelAnatomy], name: str) -> None:
    base = small_base(folders[name], anatomies[name])
    seen = failed_ways(base.model, anatomies[name], "text", CPU)
    assert set(seen) == set(EXPECTED[name])
    limit = tolerance_of(base.model, anatomies[name], "text", CPU)
    assert {way: difference.wrong(limit) for way, difference in seen.items()} == dict.fromkeys(seen, "")


@pytest.mark.parametrize(
    ("name", "changes", "way"),
    [
        ("gemma2", {"logit_cap": 0.0}, "projects"),
        ("cohere", {"logit_scale": 1.0}, "projects"),
        ("llama", {"logit_cap": 5.0}, "projects"),
        ("opt", {"ways": Ways(attention="sdpa")}, "packs"),
        ("bloom", {"ways": Ways(attention="eager")}, "packs"),
    ],
)
def test_a_base_that_does_otherwise_is_refused(
    folders: dict[str, Path], anatomies: dict[str, ModelAnatomy], name: str, changes: dict[str, Any], way: str
) -> None:
    anatomy = anatomies[name].model_copy(update=changes)
    base = small_base(folders[name], anatomy)
    execution = ExecutionPlan(
        device="cpu", ranks=1, threads_per_rank=1, executor="torch", dtype="float32", row_tokens=32, micro_batch_rows=1
    )
    context = HostContext.create(base, {}, execution, Ranks())
    with pytest.raises(BaseError, match="self-test of the base failed") as error:
        check_ways(context)
    assert self_test.WAY_NAMES[way] in error.value.what
    assert error.value.exit_code == 2
    context.saver.close()


def test_a_class_whose_stored_states_cannot_enter(folders: dict[str, Path], anatomies: dict[str, ModelAnatomy]) -> None:
    base = small_base(folders["llama"], anatomies["llama"])
    blocks = base.model.get_submodule("model.layers")
    # As in Gemma 3n: a block that needs what was computed from the tokens, beside the states.
    seen: dict[str, torch.Tensor] = {}
    embed = base.model.get_submodule("model.embed_tokens")
    embed.register_forward_hook(lambda module, args, output: seen.update(tokens=output))
    blocks[2].register_forward_pre_hook(lambda module, args: (args[0] + seen.pop("tokens"), *args[1:]))  # type: ignore[index]
    found = try_ways(base.model, anatomies["llama"], "text")
    assert not found.injects
    assert found.projects
    assert "KeyError" in found.reasons["injects"]


def test_an_instance_that_shows_nothing_proves_nothing(folders: dict[str, Path], anatomies: dict[str, ModelAnatomy]) -> None:
    base = small_base(folders["llama"], anatomies["llama"])
    for name, parameter in base.model.named_parameters():
        if "o_proj" in name:
            parameter.data.zero_()
    found = try_ways(base.model, anatomies["llama"], "text")
    assert not found.packs
    assert "does not show" in found.reasons["packs"]


def test_a_class_with_other_logits_has_no_map(folders: dict[str, Path], anatomies: dict[str, ModelAnatomy]) -> None:
    base = small_base(folders["llama"], anatomies["llama"])
    base.model.get_submodule("lm_head").register_forward_hook(lambda module, args, output: output.cumsum(-1))
    whole = base.model.forward
    object.__setattr__(base.model, "forward", lambda **inputs: _shifted(whole(**inputs)))
    assert measured_logit_map(base.model, anatomies["llama"]).is_identity
    assert not try_ways(base.model, anatomies["llama"], "text").projects


def _shifted(output: Any) -> Any:
    output.logits = output.logits.flip(-1)
    return output


def test_every_way_of_a_class_that_allows_all_gives_the_same_losses(
    folders: dict[str, Path], anatomies: dict[str, ModelAnatomy]
) -> None:
    base = small_base(folders["gemma2"], anatomies["gemma2"])
    test = SelfTest(base.model, anatomies["gemma2"], "text", CPU)
    with self_test.computing(base.model):
        own = test.own_losses()
        every = {
            "packed": test.losses(test.objective(Ways()), test.rows_packed),
            "padded": test.losses(test.objective(Ways(packs=False)), test.rows_padded),
            "exact": test.losses(test.objective(Ways(packs=False, pads=False)), test.rows_alone),
            "own logits": test.losses(test.objective(Ways(projects=False)), test.rows_packed),
            "own logits, padded": test.losses(test.objective(Ways(packs=False, projects=False)), test.rows_padded),
        }
        for way in (Ways(), Ways(packs=False, pads=False), Ways(packs=False, pads=False, projects=False)):
            assert test.trained_loss(test.objective(way)) == pytest.approx(float(own.sum()), rel=1e-5)
    for losses in every.values():
        np.testing.assert_allclose(losses, own, rtol=1e-4, atol=1e-4)


def test_a_weight_that_its_class_reads_itself_takes_no_adapter(
    folders: dict[str, Path], anatomies: dict[str, ModelAnatomy]
) -> None:
    for name in ("llama", "gpt2"):
        base = small_base(folders[name], anatomies[name])
        assert not_linear(base.model, anatomies[name], "text") == {}
    base = small_base(folders["llama"], anatomies["llama"])
    for number in range(3):
        mlp: Any = base.model.get_submodule(f"model.layers.{number}.mlp")
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (x @ mlp.up_proj.weight.T))
    gate = base.model.get_submodule("model.layers.1.mlp.gate_proj")
    object.__setattr__(gate, "forward", lambda x: (x @ gate.weight.T).flip(-1))  # type: ignore[operator]
    found = not_linear(base.model, anatomies["llama"], "text")
    assert {name.partition("mlp.")[2] for name, why in found.items() if "never called" in why} == {"up_proj.weight"}
    assert [name for name, why in found.items() if "product" in why] == ["model.layers.1.mlp.gate_proj.weight"]
