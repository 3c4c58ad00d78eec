"""Default `search` or `finetune` section, derived from the base, for a spec that has neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.spec import LoadedSpec, require_section
from orchestrator.spec.models import FinetuneSpec, RateRanges, SearchSpec

DEFAULT_TRIALS = 12
"""Four learning rates for each of three choices of layers: what a small machine can do in one session."""
USUAL_BLOCKS = 4
"""Number of blocks that the default `search.layers` (last:2, last:4, all) needs."""
RATE_SPAN = (1 / 6, 3.0)
"""Ends of the default range, relative to the usual rate: high rates diverge sooner than low ones stop making progress."""


def with_section(loaded: LoadedSpec, job: Literal["sweep", "finetune"], read_base: Callable[[], ModelAnatomy]) -> LoadedSpec:
    """Return the spec with the section that its job needs: unchanged, or with the default section and a note that says so.

    Args:
        read_base: Returns the anatomy of the base; called only where the default is derived from it.

    Raises:
        SpecError: the spec has only the other job's section.
        BaseError: the base's config, from which the default is derived, cannot be read.
    """
    if loaded.spec.search is not None or loaded.spec.finetune is not None:
        require_section(loaded, job)
        return _with_fitting_layers(loaded, read_base) if job == "sweep" else loaded
    anatomy = read_base()
    if job == "sweep":
        search = default_search(anatomy)
        low, high = search.learning_rate.lora
        what = (
            f"the default search: {', '.join(search.layers)} x lora r{search.lora_rank[0]} at {low:g} to {high:g}, "
            f"{search.trials} trials"
        )
        spec = loaded.spec.model_copy(update={"search": search})
    else:
        finetune = default_finetune(anatomy)
        what = f"the default: {finetune.layers}, lora r{finetune.lora_rank}, learning rate {finetune.learning_rate:g}"
        spec = loaded.spec.model_copy(update={"finetune": finetune})
    name = "search" if job == "sweep" else "finetune"
    return replace(loaded, spec=spec, defaulted=f"the spec has no `{name}` section; {what}")


def _with_fitting_layers(loaded: LoadedSpec, read_base: Callable[[], ModelAnatomy]) -> LoadedSpec:
    """Replace the default layers by fitting ones if the search names none and the base has too few blocks for them."""
    search = loaded.spec.search
    if search is None or search.algorithm == "fixed" or "layers" in search.model_fields_set:
        return loaded
    anatomy = read_base()
    if anatomy.num_blocks >= USUAL_BLOCKS:
        return loaded
    layers = default_search(anatomy).layers
    spec = loaded.spec.model_copy(update={"search": search.model_copy(update={"layers": layers})})
    sentence = f"`search` names no layers; the base has {anatomy.num_blocks} of them: {', '.join(layers)}"
    return replace(loaded, spec=spec, defaulted=sentence)


def default_search(anatomy: ModelAnatomy) -> SearchSpec:
    """Return a search over LoRA on the upper quarter, the upper half and all blocks, at rates around the usual one."""
    counts = sorted({-(-anatomy.num_blocks // 4), anatomy.num_blocks // 2} - {0, anatomy.num_blocks})
    rate = usual_lora_rate(anatomy)
    low, high = (_one_digit(rate * factor) for factor in RATE_SPAN)
    return SearchSpec(
        layers=(*(f"last:{count}" for count in counts), "all"),
        learning_rate=RateRanges(lora=(low, high)),
        trials=DEFAULT_TRIALS,
    )


def default_finetune(anatomy: ModelAnatomy) -> FinetuneSpec:
    """Return LoRA on every block, at the usual rate for the base's width."""
    return FinetuneSpec(learning_rate=_one_digit(usual_lora_rate(anatomy)))


def usual_lora_rate(anatomy: ModelAnatomy) -> float:
    """Return the usual LoRA learning rate for a hidden size: 5e-4 x (2000 / hidden size)^0.781.

    The formula was fitted to sweeps of LoRA on Llama models and is ten times the rate of full fine-tuning (Schulman and Thinking
    Machines Lab 2025, "LoRA Without Regret"; `get_lr` of their tinker-cookbook). It gives 2.9e-4 at 4096 and 3.1e-3 at 192.
    """
    return 5e-4 * (2000 / anatomy.hidden_size) ** 0.781


def _one_digit(rate: float) -> float:
    # The rule that gives the rate is not more precise than one digit.
    return float(f"{rate:.0e}")
