from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import BaseError
from orchestrator.plan.merge import LinkShard, make_merge_plan
from orchestrator.serve import shards
from orchestrator.serve.dequantize import hold_quantized
from orchestrator.serve.merging import merge
from orchestrator.store.files import usual_mode
from orchestrator.train.model.base import dequantized, load_base
from orchestrator.work.execution import BaseLoad

DOWN = "model.layers.{}.mlp.down_proj.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lora_is_added_in_float32_and_rounded_once(make_base: Callable, load_of: Callable, tools, tmp_path: Path, dtype):
    anatomy = make_base(dtype=dtype)
    pairs = tools.random_pairs(anatomy, (QUERY.format(1), DOWN.format(2)))
    plan = make_merge_plan(anatomy, tools.write_adapter(tmp_path / "rung", pairs), load_of(anatomy))
    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out")
    before, after = tools.weights_of(anatomy.folder), tools.weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        wanted = weight
        if name in pairs:
            a, b = pairs[name]
            wanted = torch.addmm(weight.float(), b, a, alpha=tools.scale).to(dtype)
            assert not torch.equal(wanted, weight)
        assert torch.equal(after[name], wanted), name


def test_pieces_of_a_tensor_meet_without_a_seam(make_base: Callable, load_of: Callable, tools, tmp_path: Path, monkeypatch):
    anatomy = make_base()
    pairs = tools.random_pairs(anatomy, (DOWN.format(0),))
    plan = make_merge_plan(anatomy, tools.write_adapter(tmp_path / "rung", pairs), load_of(anatomy, quantize="nf4"))
    for name, piece_bytes in (("whole", 16 << 20), ("pieces", 3000)):
        monkeypatch.setattr("orchestrator.serve.merging.PIECE_BYTES", piece_bytes)
        (tmp_path / name).mkdir()
        merge(plan, tmp_path / name)
    whole, pieces = tools.weights_of(tmp_path / "whole"), tools.weights_of(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_the_hashes_are_those_of_the_files_and_transformers_loads_the_shards(
    make_base: Callable, load_of: Callable, tools, tmp_path: Path
):
    anatomy = make_base()
    artifact = tools.write_adapter(tmp_path / "rung", tools.random_pairs(anatomy, (QUERY.format(2),)))
    out = tmp_path / "out"
    out.mkdir()
    record = merge(make_merge_plan(anatomy, artifact, load_of(anatomy)), out)
    assert {file.file for file in record.files} == {path.name for path in out.glob("*.safetensors")}
    for file in record.files:
        data = (out / file.file).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.num_bytes)
    (out / "config.json").write_bytes((Path(anatomy.folder) / "config.json").read_bytes())
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.equal(model.state_dict()[QUERY.format(2)], tools.weights_of(out)[QUERY.format(2)])


def test_an_untouched_shard_is_linked_and_a_touched_one_is_not(make_base: Callable, load_of: Callable, tools, tmp_path: Path):
    anatomy: ModelAnatomy = make_base()
    name = DOWN.format(2)
    plan = make_merge_plan(anatomy, tools.write_delta(tmp_path / "rung", {name: torch.ones(128, 192)}), load_of(anatomy))
    (tmp_path / "out").mkdir()
    record = merge(plan, tmp_path / "out")
    assert [file.linked for file in record.files] == [isinstance(shard, LinkShard) for shard in plan.shards]
    for shard in plan.shards:
        if isinstance(shard, LinkShard):
            assert (tmp_path / "out" / shard.file).samefile(Path(anatomy.folder) / shard.base_file)
        else:
            assert name in shard.names
    assert torch.equal(tools.weights_of(tmp_path / "out")[name], torch.ones(128, 192, dtype=torch.bfloat16))


def test_a_shard_that_others_may_not_read_is_copied_and_its_own_mode_stays(
    make_base: Callable, load_of: Callable, tools, tmp_path: Path
):
    """A server runs as another user; and the base's files are not ours to change."""
    anatomy = make_base()
    shards = sorted(Path(anatomy.folder).glob("*.safetensors"))
    for shard in shards:
        shard.chmod(0o600)
    artifact = tools.write_delta(tmp_path / "rung", {DOWN.format(2): torch.ones(128, 192)})
    out = tmp_path / "out"
    out.mkdir()
    record = merge(make_merge_plan(anatomy, artifact, load_of(anatomy)), out)
    assert not any(file.linked for file in record.files)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {usual_mode(out)}
    assert {shard.stat().st_mode & 0o777 for shard in shards} == {0o600}


def test_where_links_are_not_possible_the_shard_is_copied(make_base: Callable, load_of: Callable, tools, tmp_path, monkeypatch):
    anatomy: ModelAnatomy = make_base()
    plan = make_merge_plan(
        anatomy, tools.write_delta(tmp_path / "rung", {DOWN.format(2): torch.ones(128, 192)}), load_of(anatomy)
    )

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "out").mkdir()
    record = merge(plan, tmp_path / "out")
    assert not any(file.linked for file in record.files)
    before, after = tools.weights_of(anatomy.folder), tools.weights_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before if name != DOWN.format(2))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_dequantized_weights_are_bit_equal_to_what_training_loads(
    make_base: Callable, load_of: Callable, tools, tmp_path, held, quantize
):
    anatomy = make_base(dtype=torch.float32 if held == "float32" else torch.bfloat16)
    load: BaseLoad = load_of(anatomy, quantize=quantize)
    learns = QUERY.format(2)
    plan = make_merge_plan(anatomy, tools.write_delta(tmp_path / "rung", {learns: torch.ones(128, 128)}), load, held_dtype=held)
    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out")
    after, before = tools.weights_of(tmp_path / "out"), tools.weights_of(anatomy.folder)
    loaded = load_base(load, anatomy, dtype=getattr(torch, held), device=torch.device("cpu"))
    linears = {name for names in anatomy.linears for name in names}
    for name, parameter in loaded.model.named_parameters():
        if name == learns:
            assert torch.equal(after[name], torch.ones_like(after[name]))
        elif name in linears:
            assert torch.equal(after[name], dequantized(parameter)), name
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name]), name


def test_original_merges_an_nf4_trial_into_the_stored_weights(make_base: Callable, load_of: Callable, tools, tmp_path: Path):
    anatomy = make_base()
    pairs = tools.random_pairs(anatomy, (QUERY.format(1),))
    artifact = tools.write_adapter(tmp_path / "rung", pairs)
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy, quantize="nf4"), merge_into="original")
    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out")
    before, after = tools.weights_of(anatomy.folder), tools.weights_of(tmp_path / "out")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [QUERY.format(1)]


@pytest.mark.parametrize("shape", [(96, 64), (40, 192), (33, 96), (7, 33), (64, 32)])
def test_quantizing_in_pieces_is_quantizing_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True))
    monkeypatch.setattr("orchestrator.serve.dequantize.PIECE_ELEMENTS", 1000)
    held = hold_quantized(weight, torch.bfloat16)
    rows = (
        held if isinstance(held, torch.Tensor) else torch.cat([held.rows(i, min(i + 5, shape[0])) for i in range(0, shape[0], 5)])
    )
    assert torch.equal(rows, whole)


def test_an_untied_head_gets_its_own_shard(make_base: Callable, load_of: Callable, tools, tmp_path: Path):
    anatomy = make_base(sharded=False)
    head = torch.randn(97, 128)
    artifact = tools.write_delta(tmp_path / "rung", {"lm_head.weight": head})
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy))
    assert plan.unties_head
    (tmp_path / "out").mkdir()
    record = merge(plan, tmp_path / "out")
    assert [(file.file, file.linked) for file in record.files] == [
        ("model-00001-of-00002.safetensors", True),
        ("model-00002-of-00002.safetensors", False),
    ]
    assert torch.equal(tools.weights_of(tmp_path / "out")["lm_head.weight"], head.bfloat16())


def test_a_base_that_changed_after_the_plan_is_refused(make_base: Callable, load_of: Callable, tools, tmp_path: Path):
    anatomy = make_base(sharded=False)
    artifact = tools.write_adapter(tmp_path / "rung", tools.random_pairs(anatomy, (QUERY.format(1),)))
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy))
    (Path(anatomy.folder) / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(BaseError, match="cannot be read"):
        merge(plan, tmp_path / "out")


def test_a_writing_thread_that_fails_is_heard(make_base: Callable, load_of: Callable, tools, tmp_path: Path, monkeypatch):
    anatomy = make_base()
    artifact = tools.write_adapter(tmp_path / "rung", tools.random_pairs(anatomy, (QUERY.format(1),)))
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy))

    def full_disk(self: shards.ShardWriter, data: memoryview) -> None:
        if self._size:
            raise OSError(28, "No space left on device")
        put(self, data)

    put = shards.ShardWriter._put
    monkeypatch.setattr(shards.ShardWriter, "_put", full_disk)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        merge(plan, tmp_path / "out")
