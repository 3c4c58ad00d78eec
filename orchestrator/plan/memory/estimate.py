"""Memory of one rank, term by term. Every coefficient stands in a docstring with its source.

Bytes throughout. T is the tokens of a micro-batch (rows x row width), W the ranks of a gang, P the elements
that learn, V the vocabulary, h the hidden size, and e the size of a number in the compute dtype (2 for bfloat16,
4 for float32).

Some of it is held all the time (`held.py`); the rest comes and goes (`moving.py`). What a rank needs is the most that
any phase of a step holds.
"""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.plan.estimates import MemoryEstimate, MemoryPhase, MemoryTerm
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.resident import host_terms, shards_of, state_terms, weight_terms
from orchestrator.plan.memory.transient import phase_terms
from orchestrator.units import GIB, MIB

RUNTIME_BYTES = {"cuda": GIB, "cpu": GIB // 2}
"""CUDA context with its libraries (0.5 to 1 GiB by GPU and version); on a CPU the interpreter with torch,
transformers, peft and deepspeed imported (0.41 GiB measured)."""
COLLECTIVES_BYTES = {"nccl": GIB // 2, "gloo": 32 * MIB}
"""Buffers of a process group."""
RESIDENT_SHARE = 0.7
"""A whole model that needs more of a device's free memory than this is not put there: to verify and to score a bundle
takes one forward pass at a time beside it. `serve.check_process`, which imports nothing of ours, has the same figure."""
SLACK_SHARE = 0.05
"""What an allocator loses to rounding and fragmentation; assumed."""


class RankMemory(NamedTuple):
    """What one rank needs."""

    device: MemoryEstimate
    """Of its GPU; without one, of its part of the host's memory."""
    host: MemoryEstimate
    """Of the host, beside a GPU."""
    first_rank_bytes: int
    """Of the host, on the gang's first rank alone: what learns, gathered there to be saved."""


def estimate(footprint: Footprint, candidate: Candidate) -> RankMemory:
    """The memory of one rank, on its device and on its host."""
    shards = shards_of(footprint, candidate)
    host = host_terms(footprint, candidate, shards)
    steady = [*weight_terms(footprint, candidate), *state_terms(footprint, candidate, shards.device)]
    phases = phase_terms(footprint, candidate, shards.device)
    if candidate.device == "cpu":
        *there, passing = (term.model_copy(update={"name": f"host: {term.name}"}) for term in host)
        steady += there
        phases["saving"] = [passing]
    held = sum(term.num_bytes for term in steady)
    if footprint.quantized and candidate.zero_stage == 3:
        phases["loading"] = [_loading_term(footprint, held)]
    sizes = {name: sum(term.num_bytes for term in terms) for name, terms in phases.items()}
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    used = held + sizes[ordered[0]]
    slack = MemoryTerm(
        name="allocator slack", num_bytes=round(SLACK_SHARE * used), reason=f"{SLACK_SHARE:.0%} of the above", outside=True
    )
    moving = [term.model_copy(update={"moving": True}) for term in phases[ordered[0]]]
    terms = (*steady, *moving, slack, *_runtime_terms(candidate))
    return RankMemory(
        device=MemoryEstimate(
            terms=tuple(term for term in terms if term.num_bytes),
            phases=tuple(MemoryPhase(name=name, num_bytes=held + sizes[name]) for name in ordered),
        ),
        host=MemoryEstimate(terms=tuple(term for term in host if term.num_bytes)),
        first_rank_bytes=sum(footprint.learning_counts) * footprint.element_bytes,
    )


def _runtime_terms(candidate: Candidate) -> list[MemoryTerm]:
    what = "CUDA context and libraries" if candidate.device == "cuda" else "interpreter and libraries"
    terms = [MemoryTerm(name="runtime", num_bytes=RUNTIME_BYTES[candidate.device], reason=what, outside=True)]
    if candidate.ranks > 1:
        backend = "nccl" if candidate.device == "cuda" else "gloo"
        reason = f"{backend} buffers"
        terms.append(MemoryTerm(name="collectives", num_bytes=COLLECTIVES_BYTES[backend], reason=reason, outside=True))
    return terms


def _loading_term(footprint: Footprint, steady_bytes: int) -> MemoryTerm:
    """Each rank loads a quantized model whole before it is partitioned (huggingface/peft#1844)."""
    whole = footprint.frozen_bytes + footprint.restore_bytes
    return MemoryTerm(
        name="loading",
        num_bytes=max(0, whole - steady_bytes),
        reason="the whole quantized base, before it is partitioned (sharded)",
    )
