"""Where a bundle looks for a base that came from the hub."""

from __future__ import annotations

from pathlib import Path

from orchestrator.bases import locate_base
from orchestrator.samples import SAMPLE_BASE
from orchestrator.serve.bundle import BaseRecord
from orchestrator.serve.bundle_check import hub_copy, where_to_get
from orchestrator.spec.models import BaseSpec
from orchestrator.work.execution import BaseLoad
from tests.hub_server import HubServer
from tests.unit.hub.fixtures import hub

__all__ = ["hub"]


def test_a_bundle_finds_the_hubs_copy_on_any_machine(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_folder("org/tiny", Path(SAMPLE_BASE))
    load = BaseLoad(folder="", model_type="llama", quantize="none", task="completion", hub_id="org/tiny", revision=commit)
    record = BaseRecord(name="org/tiny", path="../base", revision=commit, config_sha256="", weights_sha256="", load=load)
    assert hub_copy(record) is None
    wanted = f"give its folder with --base, or run `hf download org/tiny --revision {commit}`"
    assert where_to_get(record, "--base") == wanted
    folder = locate_base(BaseSpec(model="org/tiny"), tmp_path).for_training(lambda message: None)
    assert hub_copy(record) == folder
    local = record.model_copy(update={"load": load.model_copy(update={"hub_id": ""})})
    assert hub_copy(local) is None
    assert where_to_get(local, "--base") == "give its folder with --base"
