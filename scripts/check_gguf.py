"""Compare a GGUF file with the bundle that it was converted from: every tensor, and the logits of one prompt.

    python scripts/check_gguf.py BUNDLE MODEL.gguf        # needs the package gguf, which transformers reads the file with

The exit code is 1 if a tensor is missing or differs by more than rounding to the file's type (docs/bundle.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

RELATIVE = 2**-8
"""Largest difference relative to a tensor's largest value: the rounding of bfloat16. Quantized files differ by more."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("gguf", type=Path)
    options = parser.parse_args()
    bundle = AutoModelForCausalLM.from_pretrained(options.bundle, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(options.gguf.parent, gguf_file=options.gguf.name, dtype=torch.float32)
    wanted, found = bundle.state_dict(), read.state_dict()
    differences = {
        name: float((found[name] - weight).abs().max() / weight.abs().max()) if name in found else float("inf")
        for name, weight in wanted.items()
    }
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = float((bundle(ids).logits - read(ids).logits).abs().max())
    worst = max(differences, key=lambda name: differences[name])
    print(f"{len(differences)} tensors, largest relative difference {differences[worst]:.3g} ({worst}); logits {logits:.3g}")
    return int(not differences[worst] <= RELATIVE)


if __name__ == "__main__":
    sys.exit(main())
