"""What a classifier reads: the pooled vectors, and the position that transformers' classes read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from orchestrator.anatomy import ModelAnatomy, Pooling, read_anatomy, with_pooling
from orchestrator.errors import BaseError
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.train.model.objective import objective_of
from orchestrator.train.model.pooled_position import check_pooled_position
from orchestrator.train.model.pooling import pooled
from orchestrator.work.execution import BaseLoad, Padding

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=4),
    "gemma": GemmaConfig(**SIZES, head_dim=4),
    "phi": PhiConfig(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(**SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=2),
    "bloom": BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=4),
    "falcon": FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4),
}


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_padding_is_not_read(kind: Any) -> None:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 2, 0])
    found = pooled(states, lengths, kind)
    for row, length in enumerate((5, 2)):
        own = states[row, :length]
        expected = {"mean": own.mean(0), "cls": own[0], "last": own[-1]}[kind]
        torch.testing.assert_close(found[row], expected)
    assert found[2].isfinite().all()


def anatomy_of(folder: Path, name: str) -> ModelAnatomy:
    """An anatomy with what the check reads of it, also of types that are not in the table."""
    config = CONFIGS[name]
    config.save_pretrained(folder)
    values = dict.fromkeys(("block_prefix", "blocks_module", "backbone", "head_weight", "config_sha256"), "")
    values |= {
        "model_type": name,
        "kind": "decoder",
        "folder": str(folder),
        "has_weights": False,
        "classifier_weight": "score.weight",
    }
    values |= dict.fromkeys(("num_blocks", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "max_positions"), 1)
    values |= dict.fromkeys(("embeddings", "final_norm", "blocks", "linears"), ())
    return ModelAnatomy.model_validate(values | {"hidden_size": 16, "vocab_size": 50, "tied": False, "tensors": {}})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_class_reads_the_last_token_unless_it_is_the_padding(tmp_path: Path, name: str) -> None:
    anatomy, padding = anatomy_of(tmp_path, name), Padding(token_id=7, token="<pad>")
    documents = [[4], [7, 4, 5], [3, 4, 5, 6, 8, 9], [5, 5]]
    check_pooled_position(anatomy, padding, documents)
    with pytest.raises(
        BaseError, match=r"ForSequenceClassification reads the class of a text off token 1 of 6, not off its last"
    ):
        check_pooled_position(anatomy, padding, [*documents, [4, 5, 7]])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def classifier(folder: Path, kind: Any) -> LoadedBase:
    anatomy = with_pooling(read_anatomy(folder, need_weights=True), Pooling(kind=kind))
    load = BaseLoad(
        folder=str(folder),
        model_type=anatomy.model_type,
        quantize="none",
        task="classify",
        num_classes=3,
        pooling=anatomy.pooling,
        padding=Padding(token_id=9, token="w9"),
    )
    return load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["class", "mean", "cls", "last"])
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_training_reads_what_was_decided(llama: Path, bert_folder: Path, base: str, kind: str) -> None:
    loaded = classifier({"llama": llama, "bert": bert_folder}[base], kind)
    model, anatomy = loaded.model.eval(), loaded.anatomy
    assert model.config.pad_token_id == 9
    head = model.get_submodule(anatomy.classifier_weight.rpartition(".")[0])
    ids, lengths = torch.tensor([[4, 5, 6, 0], [8, 3, 0, 0]]), torch.tensor([3, 2])
    with torch.no_grad():
        found = objective_of(loaded, head).class_logits(ids, lengths)
        for row, length in enumerate(lengths.tolist()):
            own = ids[row : row + 1, :length]
            states = model.get_submodule(anatomy.backbone)(input_ids=own).last_hidden_state[0]
            of_kind = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}
            expected = model(input_ids=own).logits[0] if kind == "class" else head(of_kind[kind])
            torch.testing.assert_close(found[row], expected)


def test_a_head_of_ours_leaves_no_random_weights_that_nobody_trains(bert_folder: Path) -> None:
    names = {name for name, _ in classifier(bert_folder, "mean").model.named_parameters()}
    assert not any("pooler" in name for name in names)
    assert any("pooler" in name for name, _ in classifier(bert_folder, "class").model.named_parameters())


def test_nothing_below_the_cut_is_in_train_mode(bert_folder: Path) -> None:
    loaded = classifier(bert_folder, "class")
    blocks = list(loaded.model.get_submodule(loaded.anatomy.blocks_module).children())
    for cut, training in ((0, [True, True]), (1, [False, True]), (2, [False, False])):
        objective = objective_of(loaded, loaded.model.classifier, cut)
        objective.train()
        assert [block.attention.self.dropout.training for block in blocks] == training
        assert loaded.model.bert.embeddings.dropout.training == (cut == 0)
        assert loaded.model.dropout.training, "the class's own, above the blocks"
        objective.eval()
        assert not any(module.training for module in objective.modules())
