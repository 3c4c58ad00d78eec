"""What cannot be asked of an encoder-decoder yet, rejected with its place."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import SelectionError
from orchestrator.spec import LoadedSpec
from orchestrator.spec.policy import Policy, parse_policy

BLOCKS_ALONE = "train blocks alone, for example last:2"


def check_encoder_decoder(loaded: LoadedSpec, anatomy: ModelAnatomy, job: str) -> None:
    """Check that a spec asks of an encoder-decoder only what is done with one; any other base passes.

    Raises:
        SelectionError: a sweep; retention text; a policy that trains the embeddings or a tied output projection, or chooses
            blocks by their scores.
    """
    if anatomy.kind != "encoder_decoder":
        return
    found = next(_refusals(loaded, anatomy, job), None)
    if found is not None:
        key, why, remedy = found
        raise SelectionError(f"{anatomy.model_type!r} is an encoder-decoder: {why}", where=loaded.where(key), remedy=remedy)


def _refusals(loaded: LoadedSpec, anatomy: ModelAnatomy, job: str) -> Iterator[tuple[str, str, str]]:
    """Yield (key, why not, remedy)."""
    spec = loaded.spec
    if job == "sweep":
        # The control `head` trains the output projection alone.
        yield "search", "it can be fine-tuned, and not searched over yet", "write a finetune section, and use jobs.finetune"
    if spec.data.retain is not None:
        yield "data.retain", "retention text has no prompt for the encoder, so it is not scored yet", "remove data.retain"
    if spec.finetune is not None:
        why = _why_not(parse_policy(spec.finetune.layers), anatomy)
        if why:
            yield "finetune.layers", why, BLOCKS_ALONE


def _why_not(parsed: Policy, anatomy: ModelAnatomy) -> str:
    """Return why a policy cannot be trained; empty if it can."""
    if parsed.kind == "top":
        return "its blocks are not scored yet"
    if {"embeddings", "new_tokens"}.intersection(parsed.extras):
        return "its embeddings are not trained yet, since the encoder, which stays frozen, reads them too"
    if anatomy.tied and (parsed.kind == "head" or parsed.with_head):
        return "its output projection is tied to the embeddings of encoder and decoder, and is not trained yet"
    return ""
