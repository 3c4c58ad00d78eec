"""Keys of adapters beside remedies and full fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.checks import find_mistakes
from orchestrator.spec.models import JobSpec

PRODUCT = {"kind": "product", "strength": 1.0}
POINT = {"layers": "last:2", "learning_rate": 1e-3}
HELD, DORA = {**POINT, "anchor": PRODUCT}, {**POINT, "adapter": "dora"}


def mistakes(**sections: Any) -> list[str]:
    spec = {"name": "a", "base": {"model": "sample"}, "task": "completion", "data": {"train": "rows.jsonl"}, **sections}
    found = find_mistakes(JobSpec.model_validate(spec), Path())
    return [".".join(map(str, finding.path)) for finding in found]


@pytest.mark.parametrize(
    "sections",
    [
        {
            "search": {
                "algorithm": "fixed",
                "points": [HELD, {**DORA, "anchor": "none"}],
            }
        },
        {"train": {"anchor": PRODUCT}, "search": {"anchor": ["none"], "adapter": ["dora"]}},
        {"search": {"tune": ["lora", "full"], "adapter": ["dora"]}},
    ],
    ids=["another point", "the search has anchors of its own", "lora is searched too"],
)
def test_what_applies_to_other_trials_is_no_mistake(sections: dict[str, Any]) -> None:
    assert mistakes(**sections) == []


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"search": {"anchor": [PRODUCT], "adapter": ["dora"]}}, "search.anchor.0"),
        (
            {"search": {"algorithm": "fixed", "points": [{**DORA, "anchor": PRODUCT}]}},
            "search.points.0.anchor",
        ),
        ({"search": {"tune": ["full"], "adapter": ["dora"]}}, "search.adapter"),
        ({"finetune": {"tune": "full", "modules": "mlp"}}, "finetune.modules"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_a_mistake(sections: dict[str, Any], path: str) -> None:
    assert mistakes(**sections) == [path]
