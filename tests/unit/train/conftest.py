"""Small honest bases, built from a config and saved as any model is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from orchestrator.anatomy import LayerSelection, read_anatomy, select
from orchestrator.spec.models import Tune
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.work.execution import BaseLoad

VOCAB = 97
NUM_CLASSES = 3


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(tied, hidden_size) -> the folder of a four-block Llama."""
    made: dict[tuple[bool, int], Path] = {}

    def build(*, tied: bool = True, hidden_size: int = 64) -> Path:
        key = (tied, hidden_size)
        if key not in made:
            config = LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=tied,
                initializer_range=0.1,
                pad_token_id=0,
            )
            made[key] = tmp_path_factory.mktemp("llama")
            torch.manual_seed(7)
            model = LlamaForCausalLM(config)
            model.bfloat16().save_pretrained(made[key])
        return made[key]

    return build


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Qwen2, whose query, key and value projections have biases, in several shards."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(9)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.bfloat16().save_pretrained(folder, max_shard_size="500KB")
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block BERT with dropout, saved with its language-model head and without a pooler."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(8)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base_of() -> Callable[..., LoadedBase]:
    """(folder, quantize=, task=, dtype=) -> the loaded base."""

    def load(folder: Path, *, quantize: str = "none", task: str = "completion", dtype: torch.dtype = torch.float32) -> LoadedBase:
        # Two tokens of every test's text, so that `+new_tokens` has rows to train.
        anatomy = read_anatomy(folder, need_weights=True).model_copy(update={"new_rows": (3, 11)})
        classes = {"num_classes": NUM_CLASSES, "class_names": ("low", "mid", "high")} if task == "classify" else {}
        values = {"folder": str(folder), "model_type": anatomy.model_type, "quantize": quantize, "task": task, **classes}
        return load_base(BaseLoad.model_validate(values), anatomy, dtype=dtype, device=torch.device("cpu"))

    return load


@pytest.fixture
def selection_on() -> Callable[..., LayerSelection]:
    """(base, policy, tune=) -> the selection."""

    def choose(base: LoadedBase, policy: str, tune: Tune = "lora", lora_rank: int = 4) -> LayerSelection:
        rank = lora_rank if tune == "lora" else None
        return select(base.anatomy, policy, tune, rank, task=base.load.task, num_classes=base.load.num_classes)

    return choose
