"""How many trials may share a batch: what can pay, what fits, and what the search's choices allow."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan import make_plan
from orchestrator.plan.values import ClusterDescription, NodeDescription, SearchPlan
from orchestrator.units import GIB


@pytest.fixture
def search(base: Any, job: Any, data: Any) -> Any:
    """The search of a plan on two cores, by the tokens of a step and what is searched."""

    def build(
        tokens: int,
        *layers: str,
        tune: str = "lora",
        asked: Any = "auto",
        memory: float = 32,
        ranks: int = 1,
        anatomy: ModelAnatomy | None = None,
    ) -> SearchPlan:
        loaded = job(
            search={"trials": 12, "layers": list(layers), "tune": [tune], "lora_rank": [4, 8]},
            data={"max_tokens": 64},
            train={"tokens_per_step": tokens},
            resources={"max_fused": asked, "gangs": 1, "ranks_per_gang": ranks},
        )
        cluster = ClusterDescription(nodes=(NodeDescription(num_cpus=ranks, memory_bytes=round(memory * GIB)),))
        sized = data(longest_document_tokens=64)
        plan = make_plan(loaded, anatomy or base("tiny"), sized, cluster, job="sweep", spec_sha256="0" * 64)
        return plan.search

    return build


@pytest.mark.parametrize(
    ("tokens", "layers", "more", "width"),
    [
        (64, ["last:2"], {}, 8),
        (256, ["last:2"], {}, 4),
        (512, ["last:2"], {}, 2),
        (1024, ["last:2"], {}, 1),
        (256, ["last:1", "last:2"], {}, 2),
        (256, ["last:1", "last:2", "all"], {}, 1),
        (64, ["last:2"], {"tune": "full"}, 1),
        (1024, ["last:2"], {"asked": 4}, 4),
        (64, ["last:2"], {"asked": 1}, 1),
    ],
)
def test_as_many_as_can_pay_shared_by_the_kinds_of_choices(
    search: Any, tokens: int, layers: list[str], more: dict[str, Any], width: int
) -> None:
    found = search(tokens, *layers, **more)
    assert found.max_fused == width
    assert found.concurrent_trials == min(12, width + 1)


def test_ranks_that_share_the_documents_share_batches_too(search: Any) -> None:
    """Of 512 tokens each of two ranks has 256 in flight."""
    assert search(512, "last:2", ranks=2).max_fused == search(256, "last:2").max_fused == 4


def test_what_drops_out_shares_no_batch(search: Any, base: Any) -> None:
    assert search(64, "last:2", anatomy=base("tiny").model_copy(update={"dropout": "attention_dropout 0.1"})).max_fused == 1


def test_no_wider_than_the_memory(search: Any) -> None:
    wide = search(4096, "last:2", asked=64)
    small = search(4096, "last:2", asked=64, memory=1.5)
    assert small.max_fused < wide.max_fused == 64
