"""A small base whose type transformers does not have, with the code that has it: a Llama under another name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIGURATION = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """import os
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

if "OWN_CODE_MARKER" in os.environ:
    Path(os.environ["OWN_CODE_MARKER"]).touch()


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.mlp.act_fn = torch.nn.Tanh()
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
MARKER = "OWN_CODE_MARKER"
"""Environment variable: a file that the code makes when it is imported."""
WORDS = 60


def write_own_base(folder: Path) -> Path:
    """Write config, weights, tokenizer and code.

    The code differs by the folder's place: a process that ran the code of another test has not approved this one.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "configuration_own.py").write_text(f"# {folder}\n{CONFIGURATION}")
    (folder / "modeling_own.py").write_text(MODELING)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number + 3 for number in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
