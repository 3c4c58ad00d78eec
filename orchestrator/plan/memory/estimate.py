"""Estimate the memory of one rank, term by term. Every coefficient is derived in a docstring with its source.

All figures are bytes. T is the number of tokens of a micro-batch (rows x row width), W the number of ranks of a gang, P the
number of trainable elements, V the vocabulary size, h the hidden size, and e the bytes of a number in the compute dtype (2 for
bfloat16, 4 for float32).

Some memory is resident (`resident.py`); the rest is transient (`transient.py`). A rank needs the most that any phase of a step
needs.
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
"""CUDA context with its libraries (0.5 to 1 GiB, depending on GPU and version); on a CPU the interpreter with torch,
transformers, peft and deepspeed imported (0.41 GiB measured)."""
COLLECTIVES_BYTES = {"nccl": GIB // 2, "gloo": 32 * MIB}
"""Communication buffers of a process group."""
RESIDENT_SHARE = 0.7
"""A whole model that needs more than this share of a device's free memory is not loaded there: verifying and scoring a bundle
takes one forward pass at a time besides it. `serve.verification_process`, which imports nothing of ours, repeats the figure."""
SLACK_SHARE = 0.05
"""Assumed share that the allocator loses to rounding and fragmentation."""


class RankMemory(NamedTuple):
    """Memory of one rank."""

    device: MemoryEstimate
    """Memory on its GPU; without a GPU, its share of the host's memory."""
    host: MemoryEstimate
    """Host memory of a rank with a GPU."""
    first_rank_bytes: int
    """Host memory of the gang's first rank only: the trainable weights, gathered there to be saved."""


def estimate(footprint: Footprint, candidate: Candidate) -> RankMemory:
    """Estimate the memory of one rank, on its device and on its host."""
    shards = shards_of(footprint, candidate)
    host = host_terms(footprint, candidate, shards)
    steady = [*weight_terms(footprint, candidate), *state_terms(footprint, candidate, shards.device)]
    phases = phase_terms(footprint, candidate, shards.device)
    # Without a GPU device and host memory are the same, so the host's terms count too, with saving as one more phase.
    if candidate.device == "cpu":
        *resident, while_saving = (term.model_copy(update={"name": f"host: {term.name}"}) for term in host)
        steady += resident
        phases["saving"] = [while_saving]
    resident_bytes = sum(term.num_bytes for term in steady)
    if footprint.quantized and candidate.zero_stage == 3:
        phases["loading"] = [_loading_term(footprint, resident_bytes)]
    sizes = {name: sum(term.num_bytes for term in terms) for name, terms in phases.items()}
    # Transient memory of different phases never exists at the same time, so only the largest phase counts.
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    used = resident_bytes + sizes[ordered[0]]
    slack = MemoryTerm(
        name="allocator slack", num_bytes=round(SLACK_SHARE * used), reason=f"{SLACK_SHARE:.0%} of the above", outside=True
    )
    transient = [term.model_copy(update={"moving": True}) for term in phases[ordered[0]]]
    terms = (*steady, *transient, slack, *_runtime_terms(candidate))
    return RankMemory(
        device=MemoryEstimate(
            terms=tuple(term for term in terms if term.num_bytes),
            phases=tuple(MemoryPhase(name=name, num_bytes=resident_bytes + sizes[name]) for name in ordered),
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
    """Return the extra memory while loading: each rank loads a quantized model whole before it is partitioned
    (huggingface/peft#1844)."""
    whole = footprint.frozen_bytes + footprint.restore_bytes
    return MemoryTerm(
        name="loading",
        num_bytes=max(0, whole - steady_bytes),
        reason="the whole quantized base, before it is partitioned (sharded)",
    )
