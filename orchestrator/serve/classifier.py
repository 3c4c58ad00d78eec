"""The files of a classifier's bundle besides its weights: its tokenizer, and a loader where transformers has no class for it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from orchestrator.anatomy.values import Pooling
from orchestrator.bases.own_code import use_own_code
from orchestrator.data import load_tokenizer
from orchestrator.errors import VerificationError
from orchestrator.plan.merge_operations import HEAD_FILE
from orchestrator.serve.loading import serving_class
from orchestrator.store import read_json, read_manifest
from orchestrator.work.execution import BaseLoad, Padding

LOADER = "classify.py"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
POOLED: Mapping[str, str] = {
    "mean": "(states.float() * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)",
    "cls": "states[range(len(states)), attention_mask.argmax(1)]",
    "last": "states[range(len(states)), (attention_mask * torch.arange(states.shape[1], device=states.device)).argmax(1)]",
}
"""The pooling of states [B, L, H] under a mask [B, L], by kind, for padding on either side."""
READ = {
    "mean": "the mean of the last hidden states",
    "cls": "the last hidden state of the first token",
    "last": "the last hidden state of the last token",
}
TEXT = '''"""Classify texts: transformers has no class for this head, which reads {read}.

    from classify import load
    classify = load(".")
    print(classify(["A text to classify."]))      # [{{"name of a class": 0.9, ...}}]

Needs torch and transformers only.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput


class Classifier(torch.nn.Module):
    def __init__(self, folder, **options):
        super().__init__()
        self.backbone = AutoModel.from_pretrained(folder, **options)
        self.config, self.device = self.backbone.config, self.backbone.device
        head = load_file(Path(folder) / "{head_file}")
        self.head = torch.nn.Linear(*head["weight"].shape[::-1], bias="bias" in head)
        self.head.load_state_dict(head)
        self.head.to(self.device, self.backbone.dtype)

    def forward(self, input_ids, attention_mask, **_):
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = {pooled}
        return SequenceClassifierOutput(logits=self.head(pooled.to(self.head.weight.dtype)))


def load(folder):
    """Return a function from a list of texts to the probabilities of each one's classes."""
    model, tokenizer = Classifier(folder).eval(), AutoTokenizer.from_pretrained(folder)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.no_grad()
    def classify(texts):
        rows = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        shares = model(rows["input_ids"], rows["attention_mask"]).logits.float().softmax(-1)
        return [{{model.config.id2label[place]: share for place, share in enumerate(row)}} for row in shares.tolist()]

    return classify


if __name__ == "__main__":
    for shares in load(Path(__file__).parent)(sys.argv[1:]):
        print(max(shares, key=shares.get), shares)
'''


def write_loader(folder: Path, pooling: Pooling) -> None:
    """Write `classify.py`, which loads the encoder by `AutoModel` and the head from its file."""
    text = TEXT.format(read=READ[pooling.kind], head_file=HEAD_FILE, pooled=POOLED[pooling.kind])
    (folder / LOADER).write_text(text, encoding="utf-8")


def has_head_file(folder: Path) -> bool:
    """Return whether a finished bundle's head is in a file of its own, as its manifest says."""
    listed = {record.path for record in read_manifest(folder).files}
    return {HEAD_FILE, LOADER} <= listed


def load_classifier(folder: Path, **options: Any) -> Any:
    """Load a bundle by its own `classify.py`.

    Args:
        options: Those of `from_pretrained`.
    """
    # Not imported: that would write a cache into the bundle.
    return runpy.run_path(str(folder / LOADER))["Classifier"](folder, **options)


def load_served(folder: Path, base: BaseLoad, **options: Any) -> Any:
    """Load a bundle as a user does: by the task's transformers class, or by its own `classify.py`.

    Args:
        options: Those of `from_pretrained`.
    """
    if not base.pooling.by_class:
        return load_classifier(folder, local_files_only=True, **options)
    use_own_code(folder, base.code_sha256)
    kind = getattr(transformers, serving_class(folder, base.traits.head.auto_model))
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def write_tokenizer(folder: Path, padding: Padding, *, escape: bool) -> None:
    """Let the bundle's tokenizer pad with the token that training padded with, and read control tokens in texts as it did.

    Args:
        escape: Whether control tokens in a text were ordinary text.

    Raises:
        VerificationError: the tokenizer, loaded again, pads with another token.
    """
    changes: dict[str, object] = {"pad_token": padding.token}
    if escape:
        changes["split_special_tokens"] = True
    file = folder / TOKENIZER_CONFIG
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    _write(file, config | changes)
    if (folder / SPECIAL_TOKENS).is_file():
        _write(folder / SPECIAL_TOKENS, read_json(folder / SPECIAL_TOKENS) | {"pad_token": padding.token})
    found = load_tokenizer(folder)
    if found.pad_token_id != padding.token_id:
        raise VerificationError(
            f"the bundle's tokenizer pads with {found.pad_token!r} ({found.pad_token_id})",
            where=str(folder),
            expected=f"{padding.token!r} ({padding.token_id}), as in training",
            remedy="name the padding token in the base's tokenizer_config.json",
        )


def escapes_control_tokens(spec: Mapping[str, Any]) -> bool:
    """Return whether a resolved spec reads control tokens in texts as ordinary text."""
    return spec.get("data", {}).get("special_tokens_in_text", "escape") == "escape"


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
