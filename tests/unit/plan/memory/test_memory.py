"""The memory model's coefficients, one by one, and against what torch keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, select
from orchestrator.plan.ladder import OFFLOADS
from orchestrator.plan.memory.activations import activations
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.plan.memory.quantized import quantized_bytes
from orchestrator.plan.memory.resident import shards_of
from orchestrator.plan.memory.transient import phase_terms
from orchestrator.units import GIB, MIB

Base = Callable[[str], ModelAnatomy]
ONE_GPU = Candidate(device="cuda", ranks=1, executor="torch", zero_stage=0, offload="none", checkpointing=False, row_tokens=512)


def terms(
    anatomy: ModelAnatomy, candidate: Candidate, policy: str = "all", tune: str = "lora", quantize: str = "none"
) -> dict[str, int]:
    selection = select(anatomy, policy, tune, 16 if tune == "lora" else None, task="completion")  # type: ignore[arg-type]
    memory = estimate(make_footprint(anatomy, selection, quantize, 2), candidate).device  # type: ignore[arg-type]
    return {term.name: term.num_bytes for term in memory.terms}


def block_bytes(anatomy: ModelAnatomy, tune: str) -> int:
    """What a block from the cut up keeps per token."""
    selection = select(anatomy, "all", tune, 16 if tune == "lora" else None, task="completion")  # type: ignore[arg-type]
    return activations(anatomy, selection, 2)[-1].kept_bytes


def test_frozen_weights_of_an_8b(base: Base) -> None:
    """8.03B parameters: 6.98B in matrices, 1.05B in embedding and head, 0.27M in norms."""
    llama = base("8b")
    assert terms(llama, ONE_GPU)["frozen weights"] == 2 * llama.num_parameters()
    matrices = [llama.tensors[name] for block in llama.linears for name in block]
    packed = sum(quantized_bytes(matrix.shape, "nf4", 2).total for matrix in matrices)
    expected = packed + 2 * (llama.num_parameters() - sum(matrix.num_elements for matrix in matrices))
    assert terms(llama, ONE_GPU, quantize="nf4")["frozen weights"] == expected


@pytest.mark.parametrize(
    ("stage", "per_element"),
    [(0, (2, 2, 0, 4, 8)), (1, (2, 2, 4, 1, 2)), (2, (2, 0, 1, 1, 2)), (3, (0.5, 0, 1, 1, 2))],
)
def test_bytes_per_learning_element_on_four_ranks(base: Base, stage: int, per_element: tuple[float, ...]) -> None:
    """DeepSpeed's stage 1 in bfloat16 partitions neither gradients nor their float32 sums: see `plan.memory.shards`."""
    candidate = replace(ONE_GPU, ranks=4, executor="deepspeed", zero_stage=stage)  # type: ignore[arg-type]
    found = terms(base("8b"), candidate, tune="full")
    elements = select(base("8b"), "all", "full", None, task="completion").num_trainable_parameters
    names = ("trainable weights", "gradients", "gradient sums", "fp32 master weights", "Adam's moments")
    assert tuple(found.get(name, 0) / elements for name in names) == pytest.approx(per_element, rel=1e-6)


def test_without_deepspeed_every_rank_holds_all_that_learns(base: Base) -> None:
    alone = terms(base("8b"), ONE_GPU, tune="full")
    shared = terms(base("8b"), replace(ONE_GPU, ranks=4), tune="full")
    elements = select(base("8b"), "all", "full", None, task="completion").num_trainable_parameters
    names = ("trainable weights", "gradients", "gradient sums", "fp32 master weights", "Adam's moments")
    assert [shared.get(name, 0) / elements for name in names] == [2, 0, 4, 4, 8]
    assert shared.pop("collectives") > 0
    assert shared == alone


def test_stage_3_partitions_what_is_frozen_and_gathers_blocks(base: Base) -> None:
    candidate = replace(ONE_GPU, ranks=8, executor="deepspeed", zero_stage=3)
    found = terms(base("70b"), candidate)
    assert found["frozen weights"] == pytest.approx(2 * base("70b").num_parameters() / 8, rel=1e-6)
    assert 5 * GIB < found["gathered weights"] < 6 * GIB


def test_offloading_moves_state_to_the_host(base: Base) -> None:
    selection = select(base("8b"), "last:8", "full", None, task="completion")
    footprint = make_footprint(base("8b"), selection, "none", 2)
    candidate = replace(ONE_GPU, executor="deepspeed", zero_stage=3)
    plain, optimizer, everything = (estimate(footprint, replace(candidate, offload=offload)) for offload in OFFLOADS)
    offloaded = [
        sum(term.num_bytes for term in memory.host.terms if term.name == "offloaded") for memory in (plain, optimizer, everything)
    ]
    elements = selection.num_trainable_parameters
    assert offloaded == [0, 20 * elements, 22 * elements + footprint.frozen_bytes], "the sums are there twice"
    assert everything.device.total_bytes < optimizer.device.total_bytes < plain.device.total_bytes


def test_on_a_cpu_offloaded_state_stays_in_the_same_memory(base: Base) -> None:
    footprint = make_footprint(base("tiny"), select(base("tiny"), "all", "full", None, task="completion"), "none", 2)
    candidate = replace(ONE_GPU, device="cpu", executor="deepspeed", zero_stage=3, offload="parameters")
    memory = estimate(footprint, candidate)
    (offloaded,) = (term.num_bytes for term in memory.host.terms if term.name == "offloaded")
    assert {term.name: term.num_bytes for term in memory.device.terms}["host: offloaded"] == offloaded > 0


def test_activations_start_at_the_cut(base: Base) -> None:
    two, four = (terms(base("8b"), ONE_GPU, policy)["activations"] for policy in ("last:2", "last:4"))
    assert four == 2 * two == 4 * 512 * block_bytes(base("8b"), "lora")


def test_checkpointing_keeps_inputs_and_one_block(base: Base) -> None:
    llama = base("8b")
    found = terms(llama, replace(ONE_GPU, checkpointing=True, micro_batch_rows=8))
    assert found["activations"] == 8 * 512 * 32 * 4096 * 2
    assert found["one block recomputed"] == 8 * 512 * (block_bytes(llama, "lora") + 2 * 512)


def test_logits_come_in_pieces(base: Base) -> None:
    """4096 positions of a 128k vocabulary would be 2 GiB in float32 alone; a chunk of 256 MiB is half of that in 16 bits, and
    becomes its own gradient. A head with an adapter goes through torch's cross entropy, and a partitioned one too."""
    candidate = replace(ONE_GPU, micro_batch_rows=8)
    assert logit_bytes(base("8b"), candidate) <= (128 + 2 * 8) * MIB
    assert logit_bytes(base("8b"), candidate, "all+head") > 3 * 255 * MIB
    assert logit_bytes(base("8b"), replace(candidate, executor="deepspeed", zero_stage=3, ranks=2)) > 3 * 255 * MIB


def logit_bytes(anatomy: ModelAnatomy, candidate: Candidate, policy: str = "all") -> int:
    """Of the phase `loss`, which need not be the largest."""
    footprint = make_footprint(anatomy, select(anatomy, policy, "lora", 16, task="completion"), "none", 2)
    (found,) = (
        term
        for term in phase_terms(footprint, candidate, shards_of(footprint, candidate).device)["loss"]
        if term.name == "logits"
    )
    return found.num_bytes


def test_documents_that_are_apart_have_no_mask(base: Base) -> None:
    """On a CPU; a GPU computes whole rows under one."""
    assert "attention mask" in terms(base("tiny"), ONE_GPU)
    assert "attention mask" not in terms(base("tiny"), replace(ONE_GPU, device="cpu"))


def test_an_untied_copy_of_the_head_is_counted(base: Base) -> None:
    llama = base("tiny")
    head = 512 * 64
    assert terms(llama, ONE_GPU, "last:1+head")["frozen weights"] == 2 * (llama.num_parameters() + head)
    assert terms(llama, ONE_GPU, "head", tune="full")["fp32 master weights"] == 4 * head


def test_a_quantized_base_is_loaded_whole_before_stage_3(base: Base) -> None:
    candidate = replace(ONE_GPU, ranks=32, executor="deepspeed", zero_stage=3, checkpointing=True)
    found = terms(base("70b"), candidate, quantize="nf4")
    whole = terms(base("70b"), ONE_GPU, quantize="nf4")["frozen weights"]
    assert sum(found.values()) - sum(found[name] for name in ("allocator slack", "runtime", "collectives")) == whole


@pytest.mark.parametrize("attention", ["sdpa", "by_document"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_activations_agree_with_what_torch_keeps(base: Base, tune: str, attention: str) -> None:
    """Bytes that autograd holds after a forward pass on packed rows, of four blocks less that of two: within 1%."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    from orchestrator.train.model.attention import documents_apart

    llama, rows, width = base("tiny"), 2, 128

    def held_bytes(num_blocks: int) -> int:
        config = transformers.AutoConfig.from_pretrained(llama.folder, num_hidden_layers=num_blocks)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        if tune == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
        else:
            model.model.embed_tokens.requires_grad_(False)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        positions = torch.arange(width).remainder(width // 2)[None].expand(rows, width)
        apart = documents_apart(model.config, positions)
        with apart, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone = model.get_base_model().model if tune == "lora" else model.model
            output = backbone(
                input_ids=torch.zeros(rows, width, dtype=torch.long), position_ids=positions, use_cache=False
            ).last_hidden_state
        assert output.requires_grad
        return sum(num_bytes for num_bytes, _ in kept.values())

    held = {num_blocks: held_bytes(num_blocks) for num_blocks in (2, 4)}
    per_token = (held[4] - held[2]) / 2 / (rows * width)
    planned = block_bytes(llama, tune) + (2 * width if attention == "sdpa" else more_by_document(llama, tune))
    assert planned == pytest.approx(per_token, rel=0.01)


def more_by_document(anatomy: ModelAnatomy, tune: str) -> int:
    selection = select(anatomy, "all", tune, 16 if tune == "lora" else None, task="completion")  # type: ignore[arg-type]
    return activations(anatomy, selection, 2)[-1].by_document_bytes


def test_stage_3_loads_through_host_memory_only_what_cannot_be_mapped(base: Base) -> None:
    """A base stored as it is computed with is mapped from its files; another dtype is a copy in every rank."""
    candidate = replace(ONE_GPU, ranks=8, executor="deepspeed", zero_stage=3)
    llama = base("8b")
    other = {name: tensor.model_copy(update={"dtype": "F32"}) for name, tensor in llama.tensors.items()}
    selection = select(llama, "all", "lora", 16, task="completion")
    saved = 12 * selection.num_trainable_parameters / 8
    host = [
        estimate(make_footprint(anatomy, selection, "none", 2), candidate).host.total_bytes
        for anatomy in (llama, llama.model_copy(update={"tensors": other}))
    ]
    assert host == [pytest.approx(saved, rel=1e-6), 2 * llama.num_parameters()]


def measured(repository: Path, *arguments: str) -> dict[str, Any]:
    script = repository / "scripts" / "benchmarks" / "memory.py"
    done = subprocess.run([sys.executable, str(script), "--json", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["qwen2.5-7b", pytest.param("mixtral-8x7b", marks=pytest.mark.slow)])
def test_the_peak_is_what_a_step_allocates(repository: Path, name: str) -> None:
    """Every allocation of real steps, on four blocks of real width. The whole is `scripts/bench memory`."""
    policies = ["--policies", "lora all", "lora last:2", "full last:1", "full all"]
    found = measured(repository, "--bases", name, "--blocks", "4", "--tokens", "2048", *policies)
    assert len(found["cases"]) == 8
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.02), case
        narrow_experts = (name, case["policy"]) == (
            "mixtral-8x7b",
            "lora last:2",
        )  # 1.083: their working memory is an upper bound
        assert case["moving_ratio"] == pytest.approx(1, abs=0.085 if narrow_experts else 0.08), case


def test_the_peak_with_adapters_of_every_kind_is_what_a_step_allocates(repository: Path) -> None:
    policies = ["kind=rslora", "kind=dora", "dropout=0.1", "kind=dora dropout=0.1", "modules=attention", "modules=mlp"]
    asked = [f"lora all {policy}" for policy in policies]
    found = measured(repository, "--bases", "qwen2.5-7b", "--blocks", "4", "--tokens", "2048", "--policies", *asked)
    assert len(found["cases"]) == 2 * len(policies)
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.02), case


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "qwen3_next"))]
)
def test_the_peak_is_right_where_costs_are_counted_on_the_class(repository: Path, name: str) -> None:
    found = measured(repository, "--kinds", name, "--policies", "lora all", "full last:2", "--tokens", "512")
    assert len(found["cases"]) == 4
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.03), case


@pytest.mark.slow
def test_the_peak_is_right_for_every_other_layout(repository: Path) -> None:
    found = measured(repository, "--families", "--tokens", "2048")
    assert len({case["base"] for case in found["cases"]}) == 10
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.03), case
