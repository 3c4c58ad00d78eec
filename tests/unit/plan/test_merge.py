from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from orchestrator.anatomy import ModelAnatomy, read_anatomy, select
from orchestrator.anatomy.values import Encoding, StoredPart, TensorInfo
from orchestrator.anatomy.weights import read_header
from orchestrator.errors import BaseError, SelectionError
from orchestrator.plan.merge import LinkShard, MergePlan, WriteTensor, make_merge_plan
from orchestrator.work.execution import BaseLoad

HIDDEN, INNER, VOCAB, BLOCKS = 8, 16, 11, 2
ITEM = {"BF16": 2, "F32": 4}
Q, V, UP = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file of zeros, written by the format's description alone."""
    header, begin = {}, 0
    for name, shape in shapes.items():
        size = ITEM[dtype]
        for axis in shape:
            size *= axis
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(begin))


def block_shapes(number: int) -> dict[str, tuple[int, ...]]:
    names = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in names.items()}


def base_of(folder: Path, *, tied: bool = True, extra: dict[str, tuple[int, ...]] | None = None) -> ModelAnatomy:
    """A Llama of two blocks: embeddings and block 0 in the first shard, the rest in the second."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    head = {} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}
    shards = {
        "model-00001-of-00002.safetensors": {"model.embed_tokens.weight": (VOCAB, HIDDEN), **block_shapes(0)},
        "model-00002-of-00002.safetensors": {**block_shapes(1), "model.norm.weight": (HIDDEN,), **head, **(extra or {})},
    }
    for file, shapes in shards.items():
        write_tensors(folder / file, shapes)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return read_anatomy(folder, need_weights=True)


def load_of(anatomy: ModelAnatomy, quantize: str = "none", task: str = "completion", classes: tuple[str, ...] = ()) -> BaseLoad:
    values = {"folder": anatomy.folder, "model_type": "llama", "quantize": quantize, "task": task}
    return BaseLoad.model_validate(values | {"num_classes": len(classes), "class_names": classes})


def adapter_of(folder: Path, weights: dict[str, tuple[int, int]], *, rank: int = 2, whole=None, **config: object) -> Path:
    """An adapter of weights[out, in] by their names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        shapes |= {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}
    shapes |= {f"base_model.model.{name}": shape for name, shape in (whole or {}).items()}
    write_tensors(folder / "adapter" / "adapter_model.safetensors", shapes, "F32")
    values = {"r": rank, "lora_alpha": 3, "bias": "none"} | config
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    return folder


def delta_of(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    write_tensors(folder / "delta" / "delta.safetensors", shapes)
    return folder


def operations(plan: MergePlan) -> dict[str, str]:
    written: dict[str, str] = {}
    for shard in plan.shards:
        if isinstance(shard, LinkShard):
            written |= dict.fromkeys(shard.names, "link")
        else:
            written |= {tensor.name: tensor.operation.kind for tensor in shard.tensors}
    return written


def written(plan: MergePlan, name: str) -> WriteTensor:
    return next(t for shard in plan.shards if not isinstance(shard, LinkShard) for t in shard.tensors if t.name == name)


def test_an_adapter_changes_its_own_tensors_and_leaves_the_other_shard_linked(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    plan = make_merge_plan(anatomy, adapter_of(tmp_path / "rung", {Q: (8, 8), UP: (16, 8)}), load_of(anatomy))
    found = operations(plan)
    assert {name for name, kind in found.items() if kind == "apply_adapter"} == {Q, UP}
    assert {name for name, kind in found.items() if kind == "link"} == {"model.embed_tokens.weight", *anatomy.blocks[0]}
    assert found.keys() == anatomy.tensors.keys()
    assert plan.merged_into == "original"
    assert plan.total_bytes == sum(info.num_bytes for info in anatomy.tensors.values())
    assert written(plan, Q).operation.adapter.scale == 1.5
    assert MergePlan.model_validate_json(plan.model_dump_json()) == plan


def test_rank_stabilised_lora_divides_by_the_root(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    plan = make_merge_plan(anatomy, adapter_of(tmp_path / "rung", {Q: (8, 8)}, rank=4, use_rslora=True), load_of(anatomy))
    assert written(plan, Q).operation.adapter.scale == 1.5


def test_a_delta_on_nf4_dequantizes_what_stayed_quantized_and_nothing_else(tmp_path: Path):
    anatomy = base_of(tmp_path / "base", tied=False)
    trained = {name: anatomy.tensors[name].shape for name in anatomy.blocks[1]}
    plan = make_merge_plan(anatomy, delta_of(tmp_path / "rung", trained), load_of(anatomy, "nf4"))
    found = operations(plan)
    assert {name for name, kind in found.items() if kind == "replace"} == set(anatomy.blocks[1])
    assert {name for name, kind in found.items() if kind == "dequantize"} == set(anatomy.linears[0])
    assert found["lm_head.weight"] == found["model.norm.weight"] == found["model.embed_tokens.weight"] == "keep"
    assert plan.merged_into == "dequantized"


def test_an_adapter_on_nf4_is_added_to_dequantized_weights(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    artifact = adapter_of(tmp_path / "rung", {Q: (8, 8)})
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy, "nf4"))
    assert written(plan, Q).operation.kind == "dequantize"
    assert written(plan, Q).operation.adapter is not None
    assert written(plan, V).operation.adapter is None
    original = make_merge_plan(anatomy, artifact, load_of(anatomy, "nf4"), merge_into="original")
    assert original.merged_into == "original"
    assert operations(original)[Q] == "apply_adapter"
    assert "dequantize" not in operations(original).values()


def test_an_untied_head_and_a_classifier_add_a_shard(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    plan = make_merge_plan(anatomy, delta_of(tmp_path / "head", {"lm_head.weight": (VOCAB, HIDDEN)}), load_of(anatomy))
    assert plan.unties_head
    assert [shard.kind for shard in plan.shards] == ["link", "link", "write"]
    assert [shard.file for shard in plan.shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert plan.weight_map["lm_head.weight"] == "model-00003-of-00003.safetensors"

    untied = base_of(tmp_path / "untied", tied=False)
    load = load_of(untied, task="classify", classes=("a", "b", "c"))
    plan = make_merge_plan(untied, delta_of(tmp_path / "score", {"score.weight": (3, HIDDEN)}), load)
    assert "lm_head.weight" not in operations(plan), "the language-model head is dropped"
    assert [shard.kind for shard in plan.shards] == ["link", "write", "write"]
    assert written(plan, "score.weight").operation.kind == "new"
    assert written(plan, "score.weight").dtype == "BF16"


def test_a_shard_with_a_stale_tied_head_is_not_linked(tmp_path: Path):
    anatomy = base_of(tmp_path / "base", extra={"lm_head.weight": (VOCAB, HIDDEN)})
    plan = make_merge_plan(anatomy, delta_of(tmp_path / "rung", {"lm_head.weight": (VOCAB, HIDDEN)}), load_of(anatomy))
    assert [shard.kind for shard in plan.shards] == ["link", "write", "write"]


def test_a_copy_of_the_head_is_left_out_once_the_two_differ(tmp_path: Path):
    """With new rows the embedding changes; an untied head replaces the copy, whatever its stored name is."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    anatomy = base_of(tmp_path / "base", extra={head: (VOCAB, HIDDEN)}).model_copy(update={"new_rows": (9, 10)})
    assert [copy.stored_name for copy in anatomy.copies] == [head]
    rows = delta_of(tmp_path / "rows", {"model.embed_tokens.new_rows": (2, HIDDEN)})
    assert head not in make_merge_plan(anatomy, rows, load_of(anatomy)).weight_map
    block = delta_of(tmp_path / "block", {Q: (HIDDEN, HIDDEN)})
    assert head in make_merge_plan(anatomy, block, load_of(anatomy)).weight_map
    copy = anatomy.copies[0].model_copy(update={"stored_name": "head.weight"})
    renamed = anatomy.model_copy(update={"copies": (copy,)})
    untied = delta_of(tmp_path / "untied", {head: (VOCAB, HIDDEN)})
    adapted = adapter_of(tmp_path / "adapted", {head: (VOCAB, HIDDEN)})
    for artifact in (untied, adapted):
        found = make_merge_plan(renamed, artifact, load_of(anatomy)).weight_map
        assert {head, embedding} <= found.keys()
        assert "head.weight" not in found
    assert "head.weight" in make_merge_plan(renamed, block, load_of(anatomy)).weight_map


def test_a_shard_of_quantized_weights_is_decoded_even_if_its_scales_are_elsewhere(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    name, second = anatomy.blocks[0][1], anatomy.tensors[Q].file
    encoding = Encoding(kind="fp8", data=name, scales=f"{name}_scale_inv", scales_file=second)
    encoded = anatomy.tensors[name].model_copy(update={"encoding": encoding})
    anatomy = anatomy.model_copy(update={"tensors": {**anatomy.tensors, name: encoded}})
    plan = make_merge_plan(anatomy, delta_of(tmp_path / "rung", {Q: (HIDDEN, HIDDEN)}), load_of(anatomy))
    assert [shard.kind for shard in plan.shards] == ["write", "write"]


def test_buffers_that_are_stored_in_parts_are_kept_part_by_part(tmp_path: Path):
    shapes: dict[str, tuple[int, ...]] = {"bias.0": (4,), "bias.1": (4,)}
    anatomy = base_of(tmp_path / "base", extra=shapes)
    file = anatomy.tensors[Q].file
    parts = tuple(
        StoredPart(name=name, file=file, shape=shape, dtype="BF16", index=(number,))
        for number, (name, shape) in enumerate(shapes.items())
    )
    buffer = TensorInfo(name="model.bias", shape=(2, 4), dtype="BF16", file=file, parts=parts)
    anatomy = anatomy.model_copy(update={"buffers": (buffer,), "extra": ()})
    plan = make_merge_plan(anatomy, delta_of(tmp_path / "rung", {Q: (HIDDEN, HIDDEN)}), load_of(anatomy))
    assert {name: written(plan, name).shape for name in shapes} == shapes
    assert "model.bias" not in plan.weight_map


def test_modules_to_save_of_an_adapter_are_taken_whole(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    load = load_of(anatomy, task="classify", classes=("a", "b"))
    artifact = adapter_of(tmp_path / "rung", {Q: (8, 8)}, whole={"score.weight": (2, HIDDEN)})
    assert operations(make_merge_plan(anatomy, artifact, load))["score.weight"] == "new"


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        ({Q: (8, 9)}, {}, r"adapter of model\.layers\.1\.self_attn\.q_proj\.weight has lora_A \[2, 9\]"),
        ({"model.layers.1.self_attn.p_proj.weight": (8, 8)}, {}, "a name like model.layers.1.self_attn"),
        ({"model.layers.7.self_attn.q_proj.weight": (8, 8)}, {}, "the base has no such tensor"),
        ({"model.norm.weight": (8, 8)}, {}, r"a weight \[8\]"),
        ({Q: (8, 8)}, {"use_dora": True}, r"q_proj has no lora_magnitude_vector"),
        ({Q: (8, 8)}, {"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({Q: (0, 8)}, {}, r"lora_B\.weight is empty"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path, weights, config, message: str):
    anatomy = base_of(tmp_path / "base")
    with pytest.raises(SelectionError, match=message):
        make_merge_plan(anatomy, adapter_of(tmp_path / "rung", weights, **config), load_of(anatomy))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.norm.weight": (7,)}, r"model\.norm\.weight was trained with shape \[7\]"),
        ({"model.nrom.weight": (8,)}, r"a name like model\.norm\.weight"),
        ({"score.weight": (2, 9)}, r"score\.weight was trained with shape"),
        ({"score.weight": (3, 8)}, r"score\.weight was trained with shape"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_by_name(tmp_path: Path, shapes, message: str):
    anatomy = base_of(tmp_path / "base")
    load = load_of(anatomy, task="classify", classes=("a", "b"))
    with pytest.raises(SelectionError, match=message):
        make_merge_plan(anatomy, delta_of(tmp_path / "rung", shapes), load)


def test_a_classifier_has_no_place_in_a_language_model(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    with pytest.raises(SelectionError, match=r"score\.weight was trained, but the base has no such tensor"):
        make_merge_plan(anatomy, delta_of(tmp_path / "rung", {"score.weight": (2, 8)}), load_of(anatomy))


def test_the_names_of_the_base_are_written(tmp_path: Path):
    base_of(tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        shapes = {name.removeprefix("model."): info.shape for name, info in read_header(file).items()}
        write_tensors(file, shapes)
    index = tmp_path / "base" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name.removeprefix("model."): file for name, file in places.items()}}))
    anatomy = read_anatomy(tmp_path / "base", need_weights=True)
    plan = make_merge_plan(anatomy, adapter_of(tmp_path / "rung", {Q: (8, 8)}), load_of(anatomy))
    assert set(operations(plan)) == {name.removeprefix("model.") for name in anatomy.tensors}
    assert [shard.kind for shard in plan.shards] == ["link", "write"]
    assert written(plan, Q.removeprefix("model.")).operation.kind == "apply_adapter"


def test_half_a_pair_and_an_empty_folder_are_refused(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SelectionError, match="no trained weights"):
        make_merge_plan(anatomy, tmp_path / "empty", load_of(anatomy))
    folder = adapter_of(tmp_path / "half", {Q: (8, 8)})
    write_tensors(folder / "adapter" / "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": (2, 8)})
    with pytest.raises(SelectionError, match="has no lora_B"):
        make_merge_plan(anatomy, folder, load_of(anatomy))


def test_what_was_trained_must_be_what_was_selected(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    selection = select(anatomy, "last:1", "lora", 2, task="completion")
    shapes = {name: anatomy.tensors[name].shape for name in selection.adapted}
    whole = adapter_of(tmp_path / "whole", shapes)
    assert make_merge_plan(anatomy, whole, load_of(anatomy), selection)
    del shapes[Q]
    with pytest.raises(SelectionError, match=r"adapter of model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        make_merge_plan(anatomy, adapter_of(tmp_path / "part", shapes), load_of(anatomy), selection)


def test_a_base_without_weights_or_with_a_truncated_shard_is_refused(tmp_path: Path):
    anatomy = base_of(tmp_path / "base")
    artifact = adapter_of(tmp_path / "rung", {Q: (8, 8)})
    with pytest.raises(BaseError, match="no weights"):
        make_merge_plan(anatomy.model_copy(update={"has_weights": False}), artifact, load_of(anatomy))
    shard = tmp_path / "base" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BaseError, match="truncated"):
        make_merge_plan(anatomy, artifact, load_of(anatomy))
