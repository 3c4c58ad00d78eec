from __future__ import annotations

import pytest
import torch

from orchestrator.train import integrity as module
from orchestrator.train.integrity import changed, fingerprint, tensor_hash


def test_a_hash_follows_every_bit_the_shape_and_the_type():
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    same = tensor_hash(tensor)
    assert tensor_hash(tensor.clone()) == same
    assert tensor_hash(tensor.T.contiguous().T) == same, "values count, not strides"
    others = [tensor.reshape(4, 3), tensor.float(), tensor.view(torch.int16), -0.0 * tensor, 0.0 * tensor]
    bumped = tensor.clone()
    bumped.view(torch.int16)[2, 3] ^= 1
    assert len({same, *map(tensor_hash, [*others, bumped])}) == 7


def test_a_tensor_larger_than_a_chunk_is_hashed_whole(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.arange(100, dtype=torch.float32)
    whole = tensor_hash(tensor)
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    assert tensor_hash(tensor) == whole
    tensor[99] = 0
    assert tensor_hash(tensor) != whole


def test_empty_and_scalar_tensors_have_hashes():
    assert len({tensor_hash(torch.empty(0)), tensor_hash(torch.empty(0, 3)), tensor_hash(torch.tensor(1.0))}) == 3


def test_what_changed_is_named_on_both_sides():
    before = fingerprint([("a", torch.ones(2)), ("b", torch.ones(2)), ("gone", torch.ones(1))])
    after = fingerprint([("a", torch.ones(2)), ("b", torch.zeros(2)), ("new", torch.ones(1))])
    assert changed(before, after) == ["b", "gone", "new"]
    assert changed(before, before) == []
