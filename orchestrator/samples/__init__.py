"""Sample base model and sample task that ship with the package; both work without a network.

`SAMPLE_BASE` is a folder in Hugging Face's layout (what `base.model: sample` means). `SAMPLE_DATA` holds `train.jsonl`,
`eval.jsonl` and `test.jsonl` with columns `prompt` and `completion`, and `retain.jsonl` with a column `text`. Each
folder has a README that says where its content comes from and under which licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SAMPLE_BASE: Final[Path] = Path(__file__).resolve().parent / "base"
SAMPLE_DATA: Final[Path] = Path(__file__).resolve().parent / "data"

__all__ = ["SAMPLE_BASE", "SAMPLE_DATA"]
