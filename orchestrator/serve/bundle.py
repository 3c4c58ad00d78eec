"""The bundle: a folder for serving that is either complete or absent.

    staged = stage_bundle(inputs, final)                     # merged weights, config, tokenizer, adapter or delta
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    ...                                                      # the test set, the verdict
    commit_bundle(staged, inputs, transfer)                  # card, spec, manifest, rename

Until the last step everything lies in `<bundle>.partial`, without a manifest; a bundle that fails its verification
stays there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES

from orchestrator.anatomy.encoded import KEYS as QUANTIZATION_KEYS
from orchestrator.anatomy.values import Pooling
from orchestrator.anatomy.weights import INDEX
from orchestrator.bases.own_code import is_native, use_own_code
from orchestrator.data import TokenizedSet, load_tokenizer, padding
from orchestrator.errors import VerificationError
from orchestrator.plan.merge import make_merge_plan
from orchestrator.plan.merge_operations import LinkShard, MergedInto, MergePlan
from orchestrator.serve.bundle_inputs import BundleInputs, base_label
from orchestrator.serve.card import NEEDS_SERVING, TRUST, model_card
from orchestrator.serve.classifier import LOADER, escapes_control_tokens, write_loader, write_tokenizer
from orchestrator.serve.loading import SEQ2SEQ
from orchestrator.serve.merging import MergeRecord, merge
from orchestrator.serve.shards import link_or_copy
from orchestrator.serve.side_files import GENERATION, LeftOut, copy_code, copy_side_files
from orchestrator.serve.verification import TrainedModel, require_passed
from orchestrator.spec.models import Task
from orchestrator.spec.tasks import TASKS
from orchestrator.store import commit_folder, read_json, sha256_file, versions, write_json
from orchestrator.transfer.records import TransferReport, VerificationFigures
from orchestrator.values import Value, content_hash
from orchestrator.work.artifact import ADAPTER, ADAPTER_CONFIG, DELTA
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec

CARD, SPEC = "README.md", "spec.json"


CLASS_POOLING = Pooling()


class BaseRecord(Value):
    """Base that the bundle was made from."""

    name: str
    path: str
    """Path relative to the bundle's folder."""
    revision: str | None
    config_sha256: str
    weights_sha256: str
    """Hash over the names and hashes of its weight files."""
    load: BaseLoad
    """Options that training loaded it with; `folder` is empty."""


class BundleRecord(Value):
    """The bundle's part of manifest.json: its origin and its verification."""

    format: Literal[1] = 1
    name: str
    created_at: float
    """Unix time."""
    base: BaseRecord
    trial: TrialSpec
    layers: str
    artifact: Literal["adapter", "delta"]
    merged_into: MergedInto
    held_dtype: Literal["bfloat16", "float32"]
    drift: float
    """KL(trained || bundle), nats per token: the effect of merging and rounding."""
    verification: VerificationFigures
    held_out: str
    """Documents used for verification, relative to the bundle's folder."""
    data_sha256: str
    verdict: str | None = None
    versions: dict[str, str] = {}
    left_out: tuple[LeftOut, ...] = ()
    """Files of the base's folder that are not in the bundle, with the reason."""


@dataclass(frozen=True)
class StagedBundle:
    """Bundle without card and manifest, not yet verified."""

    folder: Path
    """`<bundle>.partial`."""
    final: Path
    plan: MergePlan
    merged: MergeRecord
    left_out: tuple[LeftOut, ...]


def stage_bundle(inputs: BundleInputs, final: Path) -> StagedBundle:
    """Merge the promoted trial and add the files that serving needs.

    An earlier incomplete attempt in the same place is removed.

    Raises:
        SelectionError: the trained weights do not fit the base.
        BaseError: the base's files changed or are gone.

    """
    plan = make_merge_plan(
        inputs.anatomy,
        inputs.artifact,
        inputs.base,
        inputs.selection,
        merge_into=inputs.merge_into,
        held_dtype=inputs.held_dtype,
        extra_tensors=inputs.extra_tensors,
    )
    use_own_code(Path(inputs.base.folder), inputs.base.code_sha256)
    folder = final.with_name(f"{final.name}.partial")
    # Left by an attempt that was killed, or whose verification failed.
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    merged = merge(plan, folder)
    base = Path(inputs.base.folder)
    write_json(folder / "config.json", bundle_config(json.loads((base / "config.json").read_bytes()), plan))
    generates = inputs.base.traits.head.supervises == "tokens"
    replaced = {"config.json", INDEX, *(tensor.file for tensor in inputs.anatomy.tensors.values())}
    left_out = copy_side_files(base, folder, generates=generates, replaced=replaced)
    if inputs.base.code_sha256:
        left_out = copy_code(base, folder, left_out)
    if generates:
        _write_generation_config(base, folder, TokenizedSet.load(inputs.eval_set).stop_ids)
    if inputs.base.padding is not None:
        write_tokenizer(folder, inputs.base.padding, escape=escapes_control_tokens(inputs.spec))
    if not inputs.base.pooling.by_class:
        write_loader(folder, inputs.base.pooling)
    _add_artifact(Path(inputs.artifact), folder, inputs.base.hub_id or str(base.resolve()))
    return StagedBundle(folder, final, plan, merged, left_out)


def bundle_config(config: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
    """Return the base's config.json with the changes that the merged model needs."""
    # The weights are written in 16 bit, also if the base's were quantized.
    config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if not TASKS[plan.task].head.is_new:
        auto_model = SEQ2SEQ if config.get("is_encoder_decoder") else TASKS[plan.task].head.auto_model
        config["architectures"] = served_classes(config, auto_model)
    if is_native(config["model_type"]):
        # Training loaded transformers' own class: code that the base brings besides is not what was trained.
        config.pop("auto_map", None)
    if plan.unties_head:
        # The trained head differs from the embeddings, so transformers must not tie them again on loading.
        config["tie_word_embeddings"] = False
    if TASKS[plan.task].head.is_new:
        classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if plan.pooling.by_class else MODEL_MAPPING_NAMES
        config["architectures"] = [classes[config["model_type"]]]
        config["id2label"] = {str(number): name for number, name in enumerate(plan.class_names)}
        config["label2id"] = {name: number for number, name in enumerate(plan.class_names)}
        config["problem_type"] = "single_label_classification"
        config |= plan.pooling.config
        # Sequence classification finds a row's last token by the padding id, and fails for batches without one.
        _set_padding(config, plan)
    return config


def _set_padding(config: dict[str, Any], plan: MergePlan) -> None:
    if plan.padding is not None:
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section["pad_token_id"] = plan.padding.token_id
    elif config.get("pad_token_id") is None:  # as older versions chose it
        eos = config.get("eos_token_id")
        config["pad_token_id"] = eos if isinstance(eos, int) else 0


def served_classes(config: Mapping[str, Any], auto_model: str) -> list[str]:
    """Return the `architectures` of a bundle: the class that transformers' `auto_model` loads for this config.

    The base's config may name another head, or none, and servers choose the class by it. The class of a model of which the
    language model is only a part (`text_config`) stays, since the bundle has the whole model's weights.
    """
    named: list[str] = list(config.get("architectures") or ())
    if named and "text_config" in config:
        return named
    # From model types to names of classes; the public mapping would import the model's code.
    names: dict[str, str] = getattr(transformers, auto_model)._model_mapping._model_mapping
    loaded = names.get(config["model_type"])
    return named if loaded is None or loaded in named else [loaded]


def trained_model(inputs: BundleInputs, plan: MergePlan) -> TrainedModel:
    """Return the model that the staged bundle must reproduce."""
    return TrainedModel(
        base=inputs.base,
        anatomy=inputs.anatomy,
        artifact=inputs.artifact,
        held_dtype=inputs.held_dtype,
        merged_into=plan.merged_into,
        documents=inputs.eval_set,
    )


def commit_bundle(staged: StagedBundle, inputs: BundleInputs, transfer: TransferReport) -> Path:
    """Write card, spec and manifest, and rename the bundle to its final name.

    Args:
        transfer: With `verification`; verdict, scores and prompts go into the card.

    Raises:
        VerificationError: not verified, or failed; the folder stays `.partial`.
    """
    if transfer.verification is None:
        raise VerificationError("the bundle was not verified", where=str(staged.folder), remedy="verify it first")
    require_passed(transfer.verification, staged.folder)
    about = _record(staged, inputs, transfer)
    (staged.folder / CARD).write_text(model_card(inputs, transfer, about.versions), encoding="utf-8")
    write_json(staged.folder / SPEC, _without_folders(inputs.spec))
    # The weights were hashed while they were written; reading tens of gigabytes again would double the time.
    hashes = staged.merged.hashes
    with commit_folder(staged.final, known_sha256=hashes, about=about.model_dump(mode="json")) as folder:
        for path in list(staged.folder.iterdir()):
            path.rename(folder / path.name)
    staged.folder.rmdir()
    return staged.final


def serve_commands(
    bundle: Path | str, task: Task, pooling: Pooling = CLASS_POOLING, *, own_code: bool = False
) -> tuple[str, ...]:
    """Return the commands that serve the bundle; `transformers serve` generates text only, and no server knows a head file."""
    runner = TASKS[task].head.runner
    if runner and not pooling.by_class:
        return (f"python {bundle}/{LOADER} 'A text to classify.'",)
    if runner:
        return (f"vllm serve {bundle} --runner {runner}",)
    trust = TRUST if own_code else ""
    return f"transformers serve {bundle}{trust}    {NEEDS_SERVING}", f"vllm serve {bundle}{trust}"


def base_weights_sha256(anatomy_files: Iterable[str], folder: Path, known: dict[str, str]) -> str:
    """Return one hash over the base's weight files; those in `known` are not read again."""
    return content_hash({file: known.get(file) or sha256_file(folder / file) for file in sorted(anatomy_files)})


def _record(staged: StagedBundle, inputs: BundleInputs, transfer: TransferReport) -> BundleRecord:
    assert transfer.verification is not None
    base, plan = Path(inputs.base.folder), staged.plan
    # A linked shard is the base's own file, so its hash is known already.
    known = {s.base_file: staged.merged.hashes[s.file] for s in plan.shards if isinstance(s, LinkShard)}
    return BundleRecord(
        name=inputs.name,
        created_at=time.time(),
        base=BaseRecord(
            name=base_label(inputs.base_name),
            path=os.path.relpath(base, staged.final),
            revision=inputs.base.revision,
            config_sha256=inputs.anatomy.config_sha256,
            weights_sha256=base_weights_sha256(inputs.anatomy.weight_files, base, known),
            # The bundle may be published; `path` locates the base relative to it.
            load=inputs.base.model_copy(update={"folder": ""}),
        ),
        trial=inputs.trial,
        layers=inputs.selection.policy,
        artifact="adapter" if (staged.folder / ADAPTER).is_dir() else "delta",
        merged_into=plan.merged_into,
        held_dtype=inputs.held_dtype,
        drift=transfer.verification.kl_bundle,
        verification=transfer.verification,
        held_out=os.path.relpath(inputs.eval_set, staged.final),
        data_sha256=inputs.data_sha256,
        verdict=transfer.verdict,
        versions=versions(),
        left_out=staged.left_out,
    )


def _without_folders(value: Any) -> Any:
    """Replace absolute paths in the spec by their last part: the folders of this machine are not published."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~/")):
        return Path(value).name
    return value


def _write_generation_config(base: Path, folder: Path, stops: Sequence[int]) -> None:
    """Write generation_config.json with the tokens that end an answer, so that generation stops there.

    The base's file is kept if it already names them. `_from_model_config` is dropped, since transformers ignores a file that
    claims to be derived from config.json.
    """
    file = folder / GENERATION
    known = read_json(file) if file.exists() else None
    given = known.get("eos_token_id") if known else None
    if not stops or (given is not None and set(given if isinstance(given, list) else [given]) == set(stops)):
        return
    config = json.loads((base / "config.json").read_bytes())
    inherited = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    # The base's own generation settings take precedence over those inherited from its config.
    written = inherited | {key: value for key, value in (known or {}).items() if key != "_from_model_config"}
    if written.get("pad_token_id") is None:
        written["pad_token_id"] = padding(load_tokenizer(base), stops)
    write_json(file, written | {"eos_token_id": list(stops) if len(stops) > 1 else stops[0]})


def _add_artifact(artifact: Path, folder: Path, base: str) -> None:
    """Add the adapter or delta itself, linked where possible, so that the trained model can be rebuilt from it.

    An adapter names the base's id on the hub (and `revision`, its commit), or its folder as an absolute path: PEFT resolves a
    relative one against the current folder.
    """
    for name in (ADAPTER, DELTA):
        if not (artifact / name).is_dir():
            continue
        (folder / name).mkdir()
        for source in sorted((artifact / name).iterdir()):
            link_or_copy(source, folder / name / source.name)
    config_file = folder / ADAPTER / ADAPTER_CONFIG
    if config_file.exists():
        config = read_json(config_file) | {"base_model_name_or_path": base}
        write_json(config_file, config)
