"""Loading the base: once per process, frozen, the same numbers whatever ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.quantization_config import Mxfp4Config

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.bases.own_code import use_own_code
from orchestrator.errors import BaseError
from orchestrator.plan.memory.activations import attention_of
from orchestrator.train.model.experts import ADAPTED
from orchestrator.train.model.heads import head_of
from orchestrator.train.model.int8 import RowScales, use_weights_only
from orchestrator.train.model.pooling import remove_unread
from orchestrator.train.model.stored import read_parameters
from orchestrator.work.execution import BaseLoad, ExecutionPlan

_num_loads = 0
PACKING = "support_avx512bf16_for_cpu"
"""bitsandbytes' switch on a `Linear4bit`: repack the weight in place at the first eval-mode forward."""

DECODING: dict[str, Callable[[], object]] = {
    "fp8": partial(FineGrainedFP8Config, dequantize=True),
    "mxfp4": partial(Mxfp4Config, dequantize=True),
}
"""Kind of `Encoding` -> the option with which transformers decodes such a base when loading it."""


def num_loads() -> int:
    """Return the number of times this process has loaded a base (law 11)."""
    return _num_loads


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """The base in memory: every parameter frozen, in train mode, without a key-value cache.

    Train mode keeps bitsandbytes from repacking 4-bit weights; engines switch to eval mode to evaluate.
    """

    model: PreTrainedModel
    anatomy: ModelAnatomy
    load: BaseLoad
    dtype: torch.dtype
    """The dtype of the forward and backward pass; also the storage dtype of 4-bit weights, as ZeRO-3 requires."""
    device: torch.device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.load.folder, local_files_only=True, trust_remote_code=False)

    @property
    def num_loads(self) -> int:
        return num_loads()

    def read_original(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return these tensors as the checkpoint has them, in `dtype` on `device`: 16-bit also if the base is quantized.

        Raises:
            BaseError: A name that the checkpoint does not have, or a file that cannot be read.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self.anatomy.tensors:
                raise BaseError(f"the checkpoint has no tensor {name}", where=self.load.folder)
        return read_parameters(
            self.load.folder,
            (self.anatomy.tensors[name] for name in wanted),
            lambda tensor: tensor.to(device=self.device, dtype=self.dtype),
        )


def load_base(
    load: BaseLoad, anatomy: ModelAnatomy, *, dtype: torch.dtype, device: torch.device, load_on: torch.device | None = None
) -> LoadedBase:
    """Load the base from its local folder, for its task, as `load.quantize` says.

    On a CPU, weights whose files hold `dtype` stay mapped into memory: processes of one machine share them, and what
    is not touched takes none.

    Args:
        load: Folder, task and quantization. A classifier gets a new head of `num_classes`.
        anatomy: Anatomy of the same folder; the loaded model is checked against it.
        dtype: bfloat16 or float32.
        device: Where the model computes.
        load_on: Where the weights are put for now, by default `device`; see `loading_device`.

    Raises:
        BaseError: No weights, pickle-only or damaged weights, own code that is not the pinned one, or a model that is not what
            its headers say.
    """
    global _num_loads
    use_own_code(Path(load.folder), load.code_sha256)
    if not anatomy.has_weights:
        raise BaseError("the folder has no weights", where=load.folder, remedy="put the model's *.safetensors beside config.json")
    attention = attention_of(anatomy, device.type, one_document_per_row=load.traits.head.one_document_per_row)
    model = _from_folder(load, anatomy, dtype, load_on or device, attention=attention)
    # `from_pretrained` returns eval mode, in which bitsandbytes repacks 4-bit weights at the first forward pass on a CPU.
    model.train()
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    keep_packing(model)
    base = LoadedBase(model=model, anatomy=anatomy, load=load, dtype=dtype, device=device)
    _check_is_what_headers_say(base)
    _num_loads += 1
    return base


def loading_device(load: BaseLoad, execution: ExecutionPlan, device: torch.device) -> torch.device:
    """Return the device on which a rank loads the base: under ZeRO-3 the CPU, since the base may be larger than the device that
    gets a part of it.

    A quantized base is made completely on the device itself; the plan's memory has a term for that.
    """
    partitioned = execution.executor == "deepspeed" and execution.zero_stage == 3
    return torch.device("cpu") if partitioned and load.quantize == "none" else device


def _from_folder(
    load: BaseLoad, anatomy: ModelAnatomy, dtype: torch.dtype, device: torch.device, *, attention: str
) -> PreTrainedModel:
    options: dict[str, object] = {
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
        "attn_implementation": attention,
        "dtype": dtype,
        "device_map": {"": str(device)},
    }
    if anatomy.experts is not None:
        options["experts_implementation"] = ADAPTED
    if anatomy.encoding:
        options["quantization_config"] = DECODING[anatomy.encoding]()
    if load.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # ZeRO-3 partitions tensors of one dtype: the packed 4-bit weights are stored in that of the others.
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=_not_quantized(anatomy),
        )
    elif load.quantize == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_not_quantized(anatomy))
    try:
        with torch.random.fork_rng(devices=rng_devices(device)), _no_progress_bars():
            # transformers draws missing parameters at random; seeding inside the fork changes no other random numbers.
            torch.manual_seed(0)
            model = head_of(load.task).load_model(load, options, anatomy.architecture)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        # A RuntimeError too, but not the fault of the folder.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BaseError(f"the base cannot be loaded: {error}", where=load.folder) from error
    use_weights_only(model, dtype)
    _settle_decoded(model, anatomy, dtype)
    if load.traits.head.is_new:
        new = new_parameter_names(model, anatomy)
        if not load.pooling.by_class:
            remove_unread(model, [name for name in new if name not in (anatomy.classifier_weight, anatomy.classifier_bias)])
            new = new_parameter_names(model, anatomy)
        reset_new_parameters(model, new, seed=0)
    return model


def _settle_decoded(model: PreTrainedModel, anatomy: ModelAnatomy, dtype: torch.dtype) -> None:
    """Give the parameters of a decoded base the dtype that was asked for: transformers keeps the stored one for those that
    were not quantized. The others are rounded as the bundle stores them, so that both compute the same."""
    if not anatomy.encoding:
        return
    kept: set[str] = set(model._keep_in_fp32_modules_strict or ())  # pyright: ignore[reportPrivateUsage]
    for name, parameter in model.named_parameters():
        parts = anatomy.tensors[name].stored_parts if name in anatomy.tensors else ()
        if any(part.encoding is not None for part in parts):
            parameter.data = parameter.data.to(torch.bfloat16)
        if parameter.is_floating_point() and not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Turn progress bars off in the block, so that logs stay free of control codes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _not_quantized(anatomy: ModelAnatomy) -> list[str]:
    """Return the modules that keep 16 bits: everything outside the blocks with a weight, routers, and layers whose class reads
    the weight itself."""
    linears = {name for block in anatomy.linears for name in block}
    modules = tuple(name.rpartition(".")[0] for name in linears)
    outside = [name for block in anatomy.routers for name in block]
    outside += [
        name
        for name in {name for block in anatomy.blocks for name in block} - linears
        # transformers leaves out a named module with all that is in it, which must not be a linear layer of the blocks.
        if len(anatomy.tensors[name].shape) == 2 and not any(each.startswith(name.rpartition(".")[0]) for each in modules)
    ]
    outside += [tensor.name for tensor in anatomy.new_tensors] + [
        name for name in anatomy.tensors if not name.startswith(f"{anatomy.blocks_module}.")
    ]
    names = (anatomy.head_weight, anatomy.classifier_weight, *outside)
    # An encoder learned from its class has no output projection, and an empty name would leave out every module.
    return sorted({name.rpartition(".")[0] for name in names if name})


def keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with avx512-bf16: frozen weights must stay as they are."""
    for module in model.modules():
        if hasattr(module, PACKING):
            setattr(module, PACKING, False)


def new_parameter_names(model: nn.Module, anatomy: ModelAnatomy) -> tuple[str, ...]:
    """Return the parameters that the checkpoint does not have: a classifier, an encoder's missing pooler."""
    classifier = anatomy.classifier_weight.rpartition(".")[0] + "."
    return tuple(name for name, _ in model.named_parameters() if name not in anatomy.tensors or name.startswith(classifier))


def reset_new_parameters(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Initialise these parameters in place, each from its own generator: the same seed gives the same values."""
    std = getattr(model.config, "initializer_range", 0.02)
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data.copy_(initial_value(name, parameter.shape, seed, std))


def initial_value(name: str, shape: Iterable[int], seed: int, std: float) -> torch.Tensor:
    """Return float32 on the CPU: normal(0, std) for a matrix, zeros for a bias; a pure function of (seed, name, shape)."""
    shape = tuple(shape)
    if len(shape) < 2:
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, std, generator=generator_for(seed, name))


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix as it multiplies."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    if isinstance(state, RowScales):
        return state.dequantize(weight.detach())
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), state)


def rng_devices(device: torch.device) -> list[torch.device]:
    """Return the devices whose generators `fork_rng` must keep, besides the CPU's."""
    return [device] if device.type == "cuda" else []


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for this parameter only, so that its numbers do not depend on other parameters or trials."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # 63 bits: a seed is a signed integer.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _check_is_what_headers_say(base: LoadedBase) -> None:
    """Check that every stored tensor of the blocks is a parameter, that the anatomy knows every parameter, and that exactly the
    blocks' matrices are quantized."""
    parameters = dict(base.model.named_parameters())
    missing = [name for block in base.anatomy.blocks for name in block if name not in parameters]
    if missing:
        raise BaseError(
            f"the loaded model has no parameter {missing[0]}",
            where=base.load.folder,
            expected=f"names like {next(iter(parameters))}",
        )
    if not base.load.traits.head.is_new:
        _check_no_other(base, parameters)
    if base.load.quantize != "none":
        planned = {name for linears in base.anatomy.linears for name in linears}
        quantized = {name for name, parameter in parameters.items() if hasattr(parameter, "quant_state")}
        if planned != quantized:
            name = sorted(planned ^ quantized)[0]
            state = "is quantized" if name in quantized else "is not quantized"
            raise BaseError(f"{name} {state}, contrary to the plan", where=base.load.folder)


def _check_no_other(base: LoadedBase, parameters: Iterable[str]) -> None:
    """Check that the anatomy knows every parameter of the model: what it does not know is neither planned nor saved."""
    anatomy = base.anatomy
    shared = {name for group in anatomy.tied_names for name in group}
    known = {*anatomy.tensors, *anatomy.others, *shared, anatomy.head_weight, anatomy.head_bias}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise BaseError(
            f"the loaded model has {len(unknown)} parameters that its anatomy does not name: {', '.join(unknown[:3])}",
            where=base.load.folder,
            expected=f"names like {next(iter(anatomy.tensors))}",
        )
