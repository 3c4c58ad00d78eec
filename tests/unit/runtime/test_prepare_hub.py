"""A run whose base lies on the hub: which commit it uses, and what is known before the weights are fetched."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from orchestrator.errors import BaseError, DataError, RunConflictError
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.report.terminal import LogView
from orchestrator.runtime.prepare import Prepared, open_run, prepare, rehearse, reopen
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import LoadedSpec, load_spec
from orchestrator.store import read_json, read_jsonl
from orchestrator.units import GIB
from tests.hub_server import HubServer
from tests.unit.hub.fixtures import hub

__all__ = ["hub"]
MODEL = {"model": "org/tiny"}
CLUSTER = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=8 * GIB),))
WEIGHTS = "/cdn/model/org/tiny/"
HEADER_BYTES = 20_000


@pytest.fixture
def commit(hub: HubServer) -> str:
    return hub.add_folder("org/tiny", Path(SAMPLE_BASE))


def weight_bytes(hub: HubServer) -> int:
    return sum(request.num_bytes for request in hub.asked(WEIGHTS) if ".safetensors" in request.path)


def spec_of(tmp_path: Path) -> LoadedSpec:
    return load_spec(tmp_path / "spec.yaml")


def test_it_is_the_same_base_as_a_folder_and_its_commit_is_recorded(
    submit: Callable[..., Prepared], hub: HubServer, commit: str
) -> None:
    prepared = submit(base=MODEL)
    plan, folder = prepared.plan, Path(prepared.anatomy.folder)
    assert (plan.base.hub_id, plan.base.revision, plan.base.folder) == ("org/tiny", commit, str(folder))
    assert folder.parent.parent.name == "models--org--tiny"
    assert read_json(prepared.run.base)["hub"] == {"id": "org/tiny", "revision": "", "commit": commit}
    assert [
        event["message"].partition(":")[0] for event in read_jsonl(prepared.run.events) if event["kind"] == "base_fetched"
    ] == [f"fetching org/tiny at {commit[:12]} from the hub"]
    local = submit(name="local")
    assert plan.base_sha256 == local.plan.base_sha256
    assert plan.search == local.plan.search  # type: ignore[union-attr]
    assert "hub" not in read_json(local.run.base)


def test_a_run_keeps_its_commit_when_the_branch_moves(submit: Callable[..., Prepared], hub: HubServer, commit: str) -> None:
    first = submit(base=MODEL)
    other = hub.add("org/tiny", {"config.json": b"{}"})
    hub.requests.clear()
    again = submit(base=MODEL)
    assert again.plan == first.plan
    assert again.plan.base.revision == commit != other
    assert hub.requests == []
    assert reopen(first.run.path).plan == first.plan


def test_a_run_that_was_never_planned_takes_what_the_branch_is_now(
    submit: Callable[..., Prepared], hub: HubServer, commit: str
) -> None:
    first = submit(base=MODEL)
    first.run.plan.unlink()
    new = hub.add("org/tiny", {path.name: path for path in Path(SAMPLE_BASE).iterdir()} | {"NEW.md": b""})
    assert submit(base=MODEL).plan.base.revision == new != commit


def test_a_base_that_cannot_be_trained_is_refused_before_it_is_fetched(
    submit: Callable[..., Prepared], hub: HubServer, commit: str, tmp_path: Path
) -> None:
    config = json.loads((Path(SAMPLE_BASE) / "config.json").read_bytes()) | {"model_type": "mamba"}
    files = hub.repositories["model", "org/tiny"].commits[commit]
    hub.add("org/tiny", files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(BaseError, match="mamba"):
        submit(base=MODEL)
    assert 0 < weight_bytes(hub) < HEADER_BYTES


def test_bad_rows_are_told_before_the_base_is_fetched(
    submit: Callable[..., Prepared], hub: HubServer, commit: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="rows cannot be used"):
        submit(base=MODEL, data={"train": "train.jsonl", "columns": {"prompt": "question"}})
    assert 0 < weight_bytes(hub) < HEADER_BYTES


def test_a_rehearsal_fetches_no_weights(submit: Callable[..., Prepared], hub: HubServer, commit: str, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    submit(name="other")
    spec = (tmp_path / "spec.yaml").read_text().replace("model: base", "model: org/tiny")
    (tmp_path / "spec.yaml").write_text(spec)
    found = rehearse(spec_of(tmp_path), "sweep", output=tmp_path / "hidden", cluster=lambda: CLUSTER)
    assert (found.plan.base.hub_id, found.plan.base.revision) == ("org/tiny", commit)
    assert 0 < weight_bytes(hub) < HEADER_BYTES


def test_a_rehearsal_of_a_classifier_fetches_no_weights(hub: HubServer, commit: str, tmp_path: Path) -> None:
    rows = [{"text": f"{word} number {number}", "label": word} for number in range(40) for word in ("odd", "even")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "train.jsonl", "max_tokens": 64}
    values = {"name": "run", "base": MODEL, "task": "classify", "data": data, "finetune": {"layers": "last:1"}}
    (tmp_path / "spec.yaml").write_text(json.dumps(values))
    found = rehearse(spec_of(tmp_path), "finetune", output=tmp_path / "hidden", cluster=lambda: CLUSTER)
    assert found.plan.base.padding is not None
    assert 0 < weight_bytes(hub) < HEADER_BYTES


def test_a_rehearsal_knows_the_enlarged_base_of_a_run(submit: Callable[..., Prepared], tmp_path: Path, base: Path) -> None:
    first = submit(base={"model": "base", "add_tokens": ["<new>"]})
    output = first.run.path.parent
    assert rehearse(spec_of(tmp_path), "sweep", output=output, cluster=lambda: CLUSTER).would == "continue an interrupted run"
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunConflictError, match="differs from when this run began"):
        rehearse(spec_of(tmp_path), "sweep", output=output, cluster=lambda: CLUSTER)


def test_a_finished_run_is_shown_without_its_base(
    submit: Callable[..., Prepared], hub: HubServer, commit: str, tmp_path: Path
) -> None:
    first = submit(base=MODEL)
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    hub.requests.clear()
    loaded, view = spec_of(tmp_path), LogView(io.StringIO())
    with open_run(loaded, "sweep", tmp_path / "runs", view) as run:
        assert prepare(loaded, "sweep", run, view, None).plan == first.plan
    assert weight_bytes(hub) < HEADER_BYTES
