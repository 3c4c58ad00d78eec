"""Merge verification (docs/design.md, law 5): the bundle, loaded by plain transformers in a fresh process, reproduces the
trained model.

The trained model is assembled in this process (base, then adapter or delta) and its distributions on held-out documents are
saved; `verification_process.py` compares the bundle's with them, in an interpreter that does not import this package. Both
compute in float32 if that fits, so that the comparison measures the merge and not the rounding of two forward passes.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.bases.own_code import require_code
from orchestrator.data import load_tokenizer
from orchestrator.data.encoding.padding import odd_documents
from orchestrator.data.sets import load_known
from orchestrator.errors import DataError, VerificationError
from orchestrator.plan.memory.estimate import RESIDENT_SHARE
from orchestrator.plan.merge_operations import MergedInto
from orchestrator.serve import verification_process
from orchestrator.serve.classifier import LOADER
from orchestrator.serve.loading import serving_class
from orchestrator.train.adapters.artifacts import attach_artifact
from orchestrator.train.adapters.branch import head_name
from orchestrator.train.model.base import LoadedBase, dequantized, load_base
from orchestrator.train.model.encoder_decoder import decoder_start
from orchestrator.train.model.objective import objective_of
from orchestrator.transfer.records import ClassifiedDocuments, VerificationFigures
from orchestrator.units import MIB
from orchestrator.values import Value
from orchestrator.work.execution import BaseLoad

PROBE_TOKENS = 2048
PROBE_BYTES = 512 * MIB
"""Largest size of the file with the trained model's distributions."""
SHARE_OF_BASE = 0.02
SMALLEST_LIMIT = 1e-4
"""Lower bound of the limit, nats per token."""
SMALLEST_DOCUMENT_LIMIT = 10 * SMALLEST_LIMIT
"""Lower bound of the limit of a classifier's single document: rounding gave single documents up to ten times the mean."""
ANSWER_GAP = math.sqrt(2 * SMALLEST_LIMIT)
"""Largest difference of two classes' probabilities for which the bundle may answer with the other one: by Pinsker's inequality a
KL of SMALLEST_LIMIT cannot reverse two that lie further apart."""
CHECK_TIMEOUT_S = 6 * 3600.0


class TrainedModel(Value):
    """Parts of the trained model, from which the reference is assembled."""

    base: BaseLoad
    anatomy: ModelAnatomy
    artifact: str
    """Folder that holds `adapter/` or `delta/`."""
    held_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of training."""
    merged_into: MergedInto = "original"
    documents: str
    """A TokenizedSet of held-out documents. To those of a classifier, texts are added whose last token is easily mistaken."""


def verify(
    bundle: Path, trained: TrainedModel, *, device: str | None = None, max_tokens: int = PROBE_TOKENS
) -> VerificationFigures:
    """Compare the merged model in `bundle` with the trained one.

    Args:
        bundle: A folder that transformers can load; need not be finished.
        trained: The model it must reproduce.
        device: `cpu`, `cuda`, ...; by default a GPU where there is one that holds the merged model.
        max_tokens: Of held-out documents, taken from the set's beginning.

    Returns:
        KL(trained || bundle) and KL(trained || base model), means in nats per token (of a classifier: per document),
        and whether the first is within its limit: 2% of the second, or 1e-4 where that is larger. See `require_passed`.

    Raises:
        VerificationError: the fresh process could not load the bundle.
        DataError: no documents.
    """
    started = time.monotonic()
    device = device or fitting_device(trained.anatomy, trained.held_dtype)
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        probe = Path(name) / "probe.safetensors"
        dtype = _compute_dtype(trained, device)
        # In a function of its own, so that the trained model is freed before the fresh process loads the bundle.
        kl_base, positions, num_prompts = _write_probe(probe, bundle, trained, torch.device(device), dtype, max_tokens)
        gc.collect()
        answer = _check_in_fresh_process(probe, bundle, device, dtype)
    assert answer["positions"] == positions
    # Odd texts count document by document, not in the means.
    kl_bundle = math.fsum(answer["kls"][:num_prompts]) / (num_prompts if answer["gaps"] else positions)
    # Relative to what training changed; the lower bound covers rounding where training changed almost nothing.
    limit = max(SHARE_OF_BASE * kl_base, SMALLEST_LIMIT)
    # Missing keys are initialised at random and could pass by chance; a process that knows this package proves nothing.
    complete = not answer["missing"] and not answer["mismatched"] and not answer["knows_package"]
    classified = _documents_compared(answer["kls"], answer["gaps"], limit) if answer["gaps"] else None
    documents_pass = classified is None or classified.passed
    return VerificationFigures(
        passed=complete and math.isfinite(kl_bundle) and kl_bundle <= limit and documents_pass,
        kl_bundle=kl_bundle,
        kl_base=kl_base,
        limit=limit,
        classified=classified,
        num_prompts=num_prompts,
        num_tokens=positions,
        seconds=time.monotonic() - started,
        merged_into=trained.merged_into,
    )


def _documents_compared(kls: list[float], gaps: list[float], limit: float) -> ClassifiedDocuments:
    """Compare a classifier document by document: its mean hides a few documents that are read at another position."""
    differing = sum(gap > ANSWER_GAP for gap in gaps)
    document_limit = max(limit, SMALLEST_DOCUMENT_LIMIT)
    finite = all(math.isfinite(kl) for kl in kls)
    return ClassifiedDocuments(
        passed=finite and max(kls) <= document_limit and not differing,
        largest_kl=max(kls) if finite else math.nan,
        limit=document_limit,
        num_other_answers=differing,
        largest_gap=max(gaps),
    )


def require_passed(figures: VerificationFigures, folder: Path) -> None:
    """Raise unless the bundle reproduces the trained model.

    Raises:
        VerificationError: it does not.

    """
    found = figures.classified
    if found is not None and not found.passed and figures.kl_bundle <= figures.limit:
        raise VerificationError(
            f"{found.num_other_answers} documents get another class from the bundle, and the largest KL(trained || bundle) of a "
            f"document is {found.largest_kl:.3g} nats",
            where=str(folder),
            expected=f"the same class (or two within {ANSWER_GAP:.3f} of probability), and a KL of at most {found.limit:.3g}",
            remedy="do not serve it; report the figures, with the base's name",
        )
    if not figures.passed:
        raise VerificationError(
            f"KL(trained || bundle) is {figures.kl_bundle:.3g} nats",
            where=str(folder),
            expected=f"at most {figures.limit:.3g}: 2% of KL(trained || base) = {figures.kl_base:.3g}, or {SMALLEST_LIMIT}",
            remedy="do not serve it; merge again, and if it fails again report both figures",
        )


def _write_probe(
    probe: Path, bundle: Path, trained: TrainedModel, device: torch.device, dtype: str, max_tokens: int
) -> tuple[float, int, int]:
    """Write the trained model's distributions; return (mean KL to the base over held-out documents, positions, held-out
    documents). A classifier's documents are the held-out ones and then the odd texts."""
    require_code(bundle, trained.base.code_sha256)
    base = load_base(trained.base, trained.anatomy, dtype=getattr(torch, trained.held_dtype), device=device)
    head = trained.base.traits.head
    by_document = head.supervises == "documents"
    width = trained.base.num_classes if by_document else trained.anatomy.vocab_size
    budget = max_tokens if by_document else min(max_tokens, PROBE_BYTES // (4 * width))
    ids, offsets = _held_out(trained, budget)
    prompts = _prompts(trained, offsets) if trained.anatomy.kind == "encoder_decoder" else None
    num_held_out = len(offsets) - 1
    if by_document and trained.base.padding is not None:
        ids, offsets = _with_odd_documents(ids, offsets, trained)
    documents = verification_process.documents_of(ids, offsets)
    with torch.no_grad():
        untouched = _distributions(base, documents, by_document, dtype, prompts)
        with attach_artifact(base, Path(trained.artifact)):
            found = _distributions(base, documents, by_document, dtype, prompts)
    pairs = list(zip(found, untouched, strict=True))[:num_held_out]
    kl_base = math.fsum(verification_process.divergence(new, old) for new, old in pairs) / sum(len(new) for new, _ in pairs)
    log_probs = torch.cat(found)
    about = {
        "auto_model": serving_class(bundle, head.auto_model),
        "supervises": head.supervises,
        "pads": str(int(trained.anatomy.ways.pads)),
        "own_code": "1" if trained.base.code_sha256 else "",
        "loader": "" if trained.base.pooling.by_class else LOADER,
    }
    tensors = {"ids": ids, "offsets": offsets, "log_probs": log_probs}
    if prompts is not None:
        tensors["prompts"], about["decoder_start"] = torch.tensor(prompts), str(decoder_start(base.model))
    save_file(tensors, probe, about)
    return kl_base, len(log_probs), num_held_out


def _with_odd_documents(ids: torch.Tensor, offsets: torch.Tensor, trained: TrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, offsets) with the texts whose last token is easily mistaken after the held-out documents."""
    odd = odd_documents(load_tokenizer(Path(trained.base.folder)))
    rows = [torch.tensor(each) for each in odd if len(each) <= trained.anatomy.max_positions]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) + offsets[-1]
    return torch.cat([ids, *rows]), torch.cat([offsets, ends])


def _prompts(trained: TrainedModel, offsets: torch.Tensor) -> list[int]:
    """Return how many tokens of each document are its prompt; of one that was cut within its prompt, all but one."""
    supervised = load_known(trained.documents).supervised
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return [min(int(np.argmax(np.append(supervised[begin:end], True))), end - begin - 1) for begin, end in bounds]


def _distributions(
    base: LoadedBase, documents: list[torch.Tensor], by_document: bool, dtype: str, prompts: list[int] | None
) -> list[torch.Tensor]:
    """Return the trained model's distributions; a class's as training computes them, by the objective."""
    model: Any = base.model
    if dtype == "float32":
        compute_in_float32(model)
    model.eval()
    try:
        if prompts is not None:
            start = decoder_start(model)
            return list(verification_process.completion_distributions(model, documents, prompts, start))
        if not by_document:
            pads = base.anatomy.ways.pads
            return list(verification_process.distributions(model, documents, by_document=False, pads=pads))
        objective = objective_of(base, model.get_submodule(head_name(base).rpartition(".")[0]))
        device = next(model.parameters()).device
        rows = [(ids[None].to(device), torch.tensor([len(ids)], device=device)) for ids in documents]
        return [torch.log_softmax(objective.class_logits(*row).float(), dim=-1).cpu() for row in rows]
    finally:
        model.train()


def compute_in_float32(model: nn.Module) -> None:
    """Let a loaded model compute in float32 with unchanged weights; quantized ones dequantize as in training."""
    for module in model.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            setattr(module, "forward", partial(_dequantized_linear, module))  # noqa: B010 (an instance's own forward)
    for parameter in model.parameters():
        if not hasattr(parameter, "quant_state") and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _dequantized_linear(layer: Linear4bit | Linear8bitLt, inputs: torch.Tensor) -> torch.Tensor:
    return functional.linear(inputs, dequantized(layer.weight).float(), layer.bias)


def _held_out(trained: TrainedModel, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, offsets) of the first documents within the budget; the first one is cut to it."""
    data = load_known(trained.documents)
    if not len(data):
        raise DataError("no held-out document to verify with", where=trained.documents)
    last = max(1, int(np.searchsorted(data.offsets, max_tokens, side="right")) - 1)
    offsets = np.minimum(data.offsets[: last + 1], max_tokens)
    ids = np.asarray(data.ids[: offsets[-1]], dtype=np.int64)
    return torch.from_numpy(ids), torch.from_numpy(offsets.astype(np.int64))


def fitting_device(anatomy: ModelAnatomy, held_dtype: str) -> str:
    """Return a GPU if one holds the whole merged model; else the CPU, where weights are memory-mapped."""
    if not torch.cuda.is_available():
        return "cpu"
    whole = (2 if held_dtype == "bfloat16" else 4) * anatomy.num_parameters()
    return "cuda" if whole <= RESIDENT_SHARE * free_bytes("cuda") else "cpu"


def _compute_dtype(trained: TrainedModel, device: str) -> str:
    """Return float32 if the whole model fits in it; else the compute type of training."""
    float32_bytes = 4 * trained.anatomy.num_parameters()
    return "float32" if float32_bytes <= RESIDENT_SHARE * free_bytes(device) else trained.held_dtype


def free_bytes(device: str) -> int:
    """Return the memory that a model may use now: the device's, or the host's."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _check_in_fresh_process(probe: Path, bundle: Path, device: str, dtype: str) -> dict[str, Any]:
    answer = probe.with_name("answer.json")
    # -I ignores PYTHONPATH and the current folder: the process sees installed packages only, as any user's does.
    command = [sys.executable, "-I", verification_process.__file__, str(probe), str(bundle.resolve()), str(answer)]
    command += ["--device", device, "--dtype", dtype, "--free-bytes", str(free_bytes(device))]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(probe.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, cwd=probe.parent, env=environment, capture_output=True, text=True, check=False, timeout=CHECK_TIMEOUT_S
    )
    if done.returncode != 0 or not answer.is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(
            f"plain transformers cannot load or run the bundle: {last}",
            where=str(bundle),
            expected="a model that `from_pretrained` loads",
            remedy="check the files in the folder; it is kept as an unfinished bundle",
        )
    return json.loads(answer.read_text())
