"""Prompts made from columns: `data.template`, and the two templates of Stanford Alpaca."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.data.reading.cells import to_text

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""`PROMPT_DICT` of github.com/tatsu-lab/stanford_alpaca, train.py; the answer follows directly."""


@dataclass(frozen=True)
class Template:
    """Text with `{column}` in place of a column's text; `{{` and `}}` are braces."""

    text: str

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(match[1] for match in FIELD.finditer(self.text) if match[1]))

    def fill(self, values: Mapping[str, Any]) -> str:
        """Fill in the values; null is an error.

        Raises:
            RowError: a value is no text.
        """

        def field(match: re.Match[str]) -> str:
            if not match[1]:
                return match[0][0]
            value = values.get(match[1])
            return "" if value is None else to_text(value, match[1])

        return FIELD.sub(field, self.text)
