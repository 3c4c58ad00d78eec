"""An encoder-decoder is planned, and refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from orchestrator.anatomy import read_anatomy
from orchestrator.errors import BaseError


def test_an_encoder_decoder_is_not_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="can be planned for, not trained: an encoder-decoder") as error:
        read_anatomy(tmp_path, need_weights=True)
    assert error.value.exit_code == 2
    assert read_anatomy(tmp_path, need_weights=False).plan_only
