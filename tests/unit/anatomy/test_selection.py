"""Policies on small bases: which parameters learn, what is counted, where the cut lies."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.anatomy import LayerSelection, ModelAnatomy, check_modules, known_layouts, read_anatomy, resolve_base, select
from orchestrator.anatomy.selection import names_attention
from orchestrator.errors import SelectionError
from orchestrator.spec import load_spec
from orchestrator.spec.adapters import AdapterOptions, Modules
from orchestrator.spec.models import Task, Tune

from .bases import BERT, config_of, implied_tensors, row_of, write_base

NUM_BLOCKS = 3
POLICIES = st.one_of(
    st.sampled_from(["none", "head", "all", "all+head"]),
    st.builds("{}:{}{}".format, st.sampled_from(["last", "first"]), st.integers(1, NUM_BLOCKS), st.sampled_from(["", "+head"])),
    st.sets(st.integers(0, NUM_BLOCKS - 1), min_size=1).map(lambda blocks: "blocks:" + ",".join(map(str, blocks))),
)


@cache
def anatomy_of(model_type: str, tied: bool = True) -> ModelAnatomy:
    with TemporaryDirectory() as folder:
        return row_of(write_base(Path(folder), config_of(model_type, tie_word_embeddings=tied)))


def pick(
    policy: str, tune: Tune = "full", *, anatomy: ModelAnatomy | None = None, task: Task = "completion", rank: int = 4
) -> LayerSelection:
    num_classes = 5 if task == "classify" else 0
    return select(
        anatomy or anatomy_of("llama"), policy, tune, rank if tune == "lora" else None, task=task, num_classes=num_classes
    )


@given(
    st.sampled_from(known_layouts()),
    st.booleans(),
    POLICIES,
    st.sampled_from(["lora", "full"]),
    st.sampled_from(["completion", "chat", "text", "classify"]),
)
def test_the_three_sets_are_disjoint_and_cover_every_parameter(
    model_type: str, tied: bool, policy: str, tune: Tune, task: Task
) -> None:
    anatomy = anatomy_of(model_type, tied)
    if anatomy.kind == "encoder":
        task = "classify"
    selection = pick(policy, tune, anatomy=anatomy, task=task)
    names = [*selection.trainable, *selection.adapted, *selection.frozen]
    assert len(names) == len(set(names))
    model = set(anatomy.tensors)
    if task == "classify":
        model -= {anatomy.head_weight, anatomy.head_bias}
        new = {tensor.name for tensor in anatomy.new_tensors} | {anatomy.classifier_weight, anatomy.classifier_bias}
        model |= new - {""} if policy != "none" else set()
    elif selection.unties_head:
        model |= {anatomy.head_weight}
    assert set(names) == model
    learning = {*selection.trainable, *selection.adapted}
    first = [number for number, block in enumerate(anatomy.blocks) if learning & set(block)]
    assert selection.cut == min(first, default=NUM_BLOCKS)
    assert not learning & {*anatomy.embeddings, *anatomy.final_norm}
    assert bool(learning) == bool(selection.num_trainable_parameters) == (policy != "none")


@given(POLICIES, st.booleans())
def test_full_trains_exactly_the_elements_it_names(policy: str, tied: bool) -> None:
    anatomy = anatomy_of("qwen2", tied)
    selection = pick(policy, anatomy=anatomy)
    sizes = {name: tensor.num_elements for name, tensor in anatomy.tensors.items()} | {anatomy.head_weight: 40 * 16}
    assert selection.num_trainable_parameters == sum(sizes[name] for name in selection.trainable)
    assert selection.adapted == ()


def test_full_takes_norms_and_biases_of_its_blocks_and_nothing_else() -> None:
    anatomy = anatomy_of("qwen2")
    selection = pick("last:1", anatomy=anatomy)
    assert set(selection.trainable) == {name for name in anatomy.tensors if name.startswith("model.layers.2.")}
    assert "model.layers.2.input_layernorm.weight" in selection.trainable
    assert "model.layers.2.self_attn.q_proj.bias" in selection.trainable
    assert selection.cut == 2


def test_lora_adapts_the_matrix_products_of_its_blocks() -> None:
    selection = pick("blocks:0,2", "lora")
    assert [name.removeprefix("model.layers.") for name in selection.adapted[:7]] == [
        "0.self_attn.q_proj.weight",
        "0.self_attn.k_proj.weight",
        "0.self_attn.v_proj.weight",
        "0.self_attn.o_proj.weight",
        "0.mlp.gate_proj.weight",
        "0.mlp.up_proj.weight",
        "0.mlp.down_proj.weight",
    ]
    assert len(selection.adapted) == 14
    assert selection.trainable == ()
    assert selection.cut == 0
    # q, o: 16+16; k, v: 16+8; gate, up, down: 16+24; rank 4; two blocks
    assert selection.num_trainable_parameters == 4 * 2 * (2 * 32 + 2 * 24 + 3 * 40)


def test_loras_count_is_that_of_peft() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of("llama")
    values = {key: value for key, value in config.items() if key != "model_type"}
    selection = pick("last:2", "lora")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
        targets = [name.removesuffix(".weight") for name in selection.adapted]
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    assert (
        sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
        == selection.num_trainable_parameters
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_untied_only_where_it_is_tied(tied: bool) -> None:
    anatomy = anatomy_of("llama", tied)
    full, lora, both = pick("head", anatomy=anatomy), pick("head", "lora", anatomy=anatomy), pick("last:1+head", anatomy=anatomy)
    assert full.trainable == lora.adapted == ("lm_head.weight",)
    assert [selection.unties_head for selection in (full, lora, both)] == [tied] * 3
    assert full.num_trainable_parameters == 40 * 16
    assert lora.num_trainable_parameters == 4 * (40 + 16)
    assert full.cut == lora.cut == NUM_BLOCKS
    assert both.cut == 2
    assert "lm_head.weight" in both.trainable
    assert not pick("all", anatomy=anatomy).unties_head


def test_the_heads_bias_learns_with_full_and_goes_with_the_head() -> None:
    anatomy = anatomy_of("phi", tied=False)
    assert pick("head", anatomy=anatomy).trainable == ("lm_head.weight", "lm_head.bias")
    assert pick("head", anatomy=anatomy).num_trainable_parameters == 40 * 17
    lora = pick("head", "lora", anatomy=anatomy)
    assert (lora.adapted, lora.trainable) == (("lm_head.weight",), ())
    assert "lm_head.bias" in lora.frozen
    classify = pick("all", anatomy=anatomy, task="classify")
    assert "lm_head.bias" not in {*classify.trainable, *classify.frozen}


def test_experts_and_routers_learn_if_asked() -> None:
    anatomy = anatomy_of("qwen2_moe")
    experts = {"model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"}
    router, shared = "model.layers.2.mlp.gate.weight", "model.layers.2.mlp.shared_expert.up_proj.weight"
    assert set(anatomy.stacked[2]) == experts
    ways: tuple[Tune, ...] = ("lora", "full")
    for tune in ways:
        assert router in pick("last:1", tune, anatomy=anatomy).frozen
        assert router in pick("last:1 + router", tune, anatomy=anatomy).trainable
    full, lora = pick("last:1", anatomy=anatomy), pick("last:1", "lora", anatomy=anatomy)
    assert experts <= set(full.trainable)
    assert experts <= set(lora.frozen)
    assert shared in lora.adapted

    def adapted(modules: Modules) -> set[str]:
        options = AdapterOptions(modules=modules)
        check_modules(anatomy, modules)
        return set(select(anatomy, "last:1", "lora", 4, adapter=options, task="completion").adapted)

    assert adapted("experts") == experts
    assert adapted(("experts", "attention")) == experts | adapted("attention")
    assert adapted(("all", "down_proj")) == {*lora.adapted, *(name for name in experts if "down" in name)}
    with pytest.raises(SelectionError, match="has none") as caught:
        pick("last:1+router")
    assert "write last:1" in str(caught.value)
    with pytest.raises(SelectionError, match="no routed experts"):
        check_modules(anatomy_of("llama"), "experts")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("self_attn.q_proj", True),
        ("attention.output.dense", True),
        ("self_attention.query_key_value", True),
        ("layer.0.SelfAttention.q", True),
        ("layer.1.EncDecAttention.o", True),
        ("att.key", True),
        ("mlp.up_proj", False),
        ("output.dense", False),
        ("layer.1.DenseReluDense.wi", False),
        ("pattern.dense", False),
    ],
)
def test_attention_is_known_by_its_name(name: str, expected: bool) -> None:
    assert names_attention(name) == expected


def test_nothing_learns_under_none() -> None:
    for tune in ("lora", "full"):
        selection = pick("none", tune)
        assert (selection.trainable, selection.adapted, selection.cut) == ((), (), NUM_BLOCKS)
        assert selection.num_trainable_parameters == 0
        assert len(selection.frozen) == len(anatomy_of("llama").tensors)
    assert not pick("none", task="classify").new_classifier


def test_classify_trains_its_own_head_under_every_policy() -> None:
    for tune in ("lora", "full"):
        head = pick("head", tune, task="classify")
        assert (head.tune, head.lora_rank, head.trainable) == ("full", None, ("score.weight",))
        assert (head.new_classifier, head.unties_head, head.cut) == (True, False, NUM_BLOCKS)
        assert head.num_trainable_parameters == 5 * 16
    lora = pick("last:1+head", "lora", task="classify")
    assert (lora.policy, lora.trainable, len(lora.adapted)) == ("last:1", ("score.weight",), 7)
    assert lora.num_trainable_parameters == pick("last:1", "lora").num_trainable_parameters + 5 * 16
    untied = pick("all", anatomy=anatomy_of("llama", tied=False), task="classify")
    assert "lm_head.weight" not in {*untied.trainable, *untied.adapted, *untied.frozen}


def test_an_encoder_classifies_with_its_pooler_frozen_or_with_a_new_one(tmp_path: Path) -> None:
    stored = anatomy_of("bert")
    head = pick("head", anatomy=stored, task="classify")
    assert head.trainable == ("classifier.weight", "classifier.bias")
    assert head.num_trainable_parameters == 5 * 17
    assert "bert.pooler.dense.weight" in head.frozen
    tensors = {name: shape for name, shape in implied_tensors(BERT, tmp_path / "a").items() if "pooler" not in name}
    without = read_anatomy(write_base(tmp_path / "b", BERT, ("model.safetensors", tensors), dtype="F32"), need_weights=True)
    new = pick("head", anatomy=without, task="classify")
    assert new.trainable == ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    assert new.num_trainable_parameters == 5 * 17 + 16 * 17


def test_an_encoder_writes_no_text() -> None:
    with pytest.raises(SelectionError, match="an encoder, which cannot generate text"):
        pick("all", anatomy=anatomy_of("bert"))


@pytest.mark.parametrize(
    ("policy", "what", "remedy"),
    [
        ("last:4", "asks for 4 blocks; the base has 3 blocks", "write last:3 or all"),
        ("first:99+head", "asks for 99 blocks", "write first:3 or all"),
        ("blocks:1-3", "asks for block 3; the base has 3 blocks", "did you mean blocks:1-2?"),
        ("blocks:7", "asks for block 7", "did you mean blocks:2?"),
        ("lst:2", "not a layer policy", "did you mean last:2?"),
    ],
)
def test_policies_that_do_not_fit_the_base(policy: str, what: str, remedy: str) -> None:
    with pytest.raises(SelectionError) as caught:
        pick(policy)
    assert what in caught.value.what
    assert remedy in caught.value.remedy
    if "asks for" in what:
        assert caught.value.expected == "blocks 0 to 2"


@pytest.mark.parametrize("name", ["quickstart", "llama-8b-qlora", "llama-70b-zero3", "classify"])
def test_every_policy_of_a_shipped_spec_fits_its_base(repository: Path, name: str) -> None:
    loaded = load_spec(repository / "jobs" / "specs" / f"{name}.yaml")
    spec = loaded.spec
    anatomy = read_anatomy(resolve_base(spec.base.model, loaded.folder), need_weights=spec.base.model == "sample")
    assert spec.search is not None
    for policy in spec.search.layers:
        for tune in spec.search.tune:
            assert pick(policy, tune, anatomy=anatomy, task=spec.task).num_trainable_parameters > 0


@pytest.mark.parametrize("rank", [None, 0, -1])
def test_lora_needs_a_rank(rank: int | None) -> None:
    with pytest.raises(SelectionError, match="rank"):
        select(anatomy_of("llama"), "last:1", "lora", rank, task="text")


def test_classify_needs_two_classes() -> None:
    with pytest.raises(SelectionError, match="1 classes"):
        select(anatomy_of("llama"), "last:1", "full", None, task="classify", num_classes=1)
