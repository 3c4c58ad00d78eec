from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.serve import side_files
from orchestrator.serve.side_files import LeftOut, copy_side_files

COME_ALONG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.txt",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "params.json",
)
STAY = (
    "README.md",
    "manifest.json",
    "spec.json",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "model-Q4_K_M.GGUF",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "quantize_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "training_args.bin",
    "trainer_state.json",
    "rng_state_0.pth",
    "train_results.json",
    "train.jsonl",
    "diagram.png",
    "hf_token.txt",
    "modeling_own.py",
    ".gitattributes",
    ".cache/huggingface/x.json",
    "original/tokenizer.model",
    "original/consolidated.00.pth",
    "onnx/config.json",
    "onnx/model.onnx",
    "checkpoint-500/tokenizer.json",
    "runs/events.out.tfevents.1",
    "adapter/README.md",
    "1_Pooling/deeper/file.json",
)
REPLACED = ("config.json", "model.safetensors")
LEFT_OUT = {
    *(path for path in STAY if "/" not in path),
    *(".cache/", "original/", "onnx/", "checkpoint-500/", "runs/", "adapter/", "1_Pooling/deeper/"),
}
"""A folder that stays behind is one entry."""


@pytest.fixture
def base_of(tmp_path: Path) -> Callable[..., Path]:
    """(paths...) -> a base's folder with these files, each with its own path as text unless JSON is needed."""

    def build(*paths: str) -> Path:
        base = tmp_path / "base"
        for path in paths:
            (base / path).parent.mkdir(parents=True, exist_ok=True)
            (base / path).write_text("{}" if path.endswith(".json") else path)
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "config.json").write_text("{}")
        return base

    return build


def in_bundle(base: Path) -> set[str]:
    bundle = base.parent / "bundle"
    return {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()} - {"config.json"}


def copied(base: Path, *, generates: bool = True, replaced: tuple[str, ...] = ()) -> tuple[set[str], dict[str, str]]:
    """Return (files in the bundle, what was left out and why)."""
    left_out: tuple[LeftOut, ...] = copy_side_files(base, base.parent / "bundle", generates=generates, replaced=replaced)
    return in_bundle(base), {each.path: each.reason for each in left_out}


def test_every_small_file_comes_along_but_the_stale_ones(base_of: Callable[..., Path]):
    base = base_of(*COME_ALONG, *STAY, *REPLACED)
    files, left_out = copied(base, replaced=REPLACED)
    assert files == set(COME_ALONG)
    assert set(left_out) == LEFT_OUT, "and what stays behind is recorded, but for what the bundle has in another form"
    assert all(left_out.values())
    assert (base.parent / "bundle" / "NOTICE").read_text() == "NOTICE"


def test_a_classifier_has_no_generation_config(base_of: Callable[..., Path]):
    files, left_out = copied(base_of("generation_config.json", "tokenizer.json"), generates=False)
    assert files == {"tokenizer.json"}
    assert left_out == {"generation_config.json": side_files.NOT_GENERATING}


def test_a_large_file_is_left_out_unless_the_tokenizer_needs_it(base_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(side_files, "MAX_BYTES", 1024)
    base = base_of("tokenizer.json", "notes.txt", "small.txt")
    for name in ("tokenizer.json", "notes.txt"):
        (base / name).write_text("x" * 2048)
    files, left_out = copied(base)
    assert files == {"tokenizer.json", "small.txt"}
    assert left_out == {"notes.txt": "2.0 KiB, more than 1.0 KiB"}


def test_links_out_of_the_folder_are_followed_and_broken_ones_are_said(base_of: Callable[..., Path], tmp_path: Path):
    """A snapshot of the hub's cache consists of links to ../../blobs."""
    base = base_of("tokenizer.json")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text("terms")
    (base / "NOTICE").symlink_to("../blobs/0a1b")
    (base / "LICENSE").symlink_to("../blobs/gone")
    os.mkfifo(base / "pipe")
    files, left_out = copied(base)
    assert files == {"tokenizer.json", "NOTICE"}
    target = tmp_path / "bundle" / "NOTICE"
    assert target.read_text() == "terms"
    assert not target.is_symlink()
    assert left_out == {"LICENSE": "broken link", "pipe": "not a regular file"}


def test_a_file_that_cannot_be_read_is_left_out_and_said(base_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    base = base_of("NOTICE", "tokenizer.json")
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "NOTICE":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    files, left_out = copied(base)
    assert files == {"tokenizer.json"}
    assert left_out == {"NOTICE": "cannot be read: Permission denied"}


@pytest.mark.parametrize("named_by", ["tokenizer_config.json", "the bundle", "nothing"])
def test_code_comes_along_if_a_configuration_names_it(base_of: Callable[..., Path], named_by: str):
    base = base_of("config.json", "tokenizer_config.json", "tokenization_own.py")
    names = json.dumps({"auto_map": {"AutoTokenizer": "tokenization_own.OwnTokenizer"}})
    (base / "config.json").write_text(names)  # the bundle's config.json may have dropped it
    if named_by == "the bundle":
        (base.parent / "bundle" / "config.json").write_text(names)
    elif named_by != "nothing":
        (base / named_by).write_text(names)
    files, left_out = copied(base, replaced=REPLACED)
    assert ("tokenization_own.py" in files) == (named_by != "nothing")
    assert left_out.get("tokenization_own.py") == (side_files.NO_CODE if named_by == "nothing" else None)


def test_the_projection_of_a_sentence_encoder_comes_along_with_its_weights(base_of: Callable[..., Path]):
    """Training leaves it unchanged, and modules.json cannot be loaded without it."""
    module = ("2_Dense/config.json", "2_Dense/model.safetensors")
    base = base_of("modules.json", "1_Pooling/config.json", *module, "other/model.safetensors")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    files, left_out = copied(base)
    assert files == {"modules.json", "1_Pooling/config.json", *module}
    assert set(left_out) == {"other/"}
