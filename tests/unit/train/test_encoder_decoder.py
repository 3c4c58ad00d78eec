"""How a micro-batch becomes an encoder's and a decoder's input."""

from __future__ import annotations

import torch

from orchestrator.train.model.encoder_decoder import split_rows

START = 9


def test_rows_are_split_before_their_first_supervised_token() -> None:
    ids = torch.tensor([[11, 12, 13, 14, 15, 0], [21, 22, 23, 24, 25, 26]])
    # The tokens 14, 15 of the first document are supervised, and 26 of the second; an empty row follows in the next call.
    labels = torch.tensor([[-100, -100, 14, 15, -100, -100], [-100, -100, -100, -100, 26, -100]])
    sides = split_rows(ids, labels, torch.tensor([5, 6]), START)
    assert sides.prompts.shape == (2, 5)
    assert sides.prompt_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert sides.prompts[0, :3].tolist() == [11, 12, 13]
    assert sides.decoder_ids.tolist()[0] == [START, 14]
    assert sides.decoder_ids.tolist()[1][0] == START


def test_an_empty_micro_batch_has_a_token_on_either_side() -> None:
    sides = split_rows(torch.zeros(1, 8, dtype=torch.long), torch.full((1, 8), -100), torch.tensor([0]), START)
    assert sides.prompt_mask.tolist() == [[1]]
    assert sides.decoder_ids.tolist() == [[START]]
