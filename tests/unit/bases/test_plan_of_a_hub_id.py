"""`orchestrator plan` for a hub id, in a process with the environment of a user: headers alone, no torch, the token nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_models import sparse_base
from tests.hub_server import HubServer
from tests.unit.hub.fixtures import TOKEN

MODEL = "meta-llama/Llama-3.1-70B"
PLAN = """
import sys
from orchestrator.cli.commands import main
try:
    main()
finally:
    print([name for name in ("torch", "transformers", "datasets", "ray") if name in sys.modules], file=sys.stderr)
"""
Plan = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def plan(hub: HubServer, repository: Path, tmp_path: Path) -> Plan:
    def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        spec = repository / "jobs" / "specs" / "llama-70b-zero3.yaml"
        cluster = repository / "cluster" / "examples" / "four-nodes-8xh100.yaml"
        command = [sys.executable, "-c", PLAN, "plan", str(spec), "--cluster", str(cluster), "--set", f"base.model={MODEL}"]
        return subprocess.run(
            [*command, *options], env=hub.environment(tmp_path, **environment), capture_output=True, text=True, check=False
        )

    return run


def test_70_billion_parameters_are_planned_from_half_a_megabyte(hub: HubServer, plan: Plan, repository: Path) -> None:
    folder = repository / "jobs" / "specs" / "shapes" / "llama-3.1-70b"
    commit = hub.add(MODEL, sparse_base(folder))
    hub.repositories["model", MODEL].readers = {TOKEN}
    done = plan("--json", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_parameters"] == 70_553_706_496
    assert (found["base"]["hub_id"], found["base"]["revision"]) == (MODEL, commit)
    assert done.stderr.splitlines()[-1] == "[]", "nothing heavy was imported"
    assert hub.bytes_of() < 1_000_000
    assert {request.token for request in hub.asked("/api/")} == {TOKEN}
    assert not hub.asked("/api/agent"), "no telemetry"
    local = plan("--json", "--set", f"base.model={folder}", HF_HUB_OFFLINE="1")
    assert found | {"base": {}, "spec_sha256": ""} == json.loads(local.stdout) | {"base": {}, "spec_sha256": ""}
    hub.requests.clear()
    assert json.loads(plan("--json", HF_TOKEN=TOKEN).stdout) == found
    assert f"llama-70b-zero3: {MODEL} at {commit[:12]}, llama, 70.6B parameters" in plan(HF_HUB_OFFLINE="1").stdout
    assert [request.path for request in hub.requests] == [f"/api/models/{MODEL}"]
    assert TOKEN not in done.stdout + done.stderr


def test_what_is_missing_exits_with_2_and_says_what_to_do(hub: HubServer, plan: Plan, tmp_path: Path) -> None:
    hub.add(MODEL, {"config.json": b"{}"})
    offline = plan(HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert f"to do: run `hf download {MODEL}` where the hub can be reached" in offline.stderr
    assert hub.requests == []
    # The token of `hf auth login` lies in a file.
    hub.tokens = {"another"}
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text(TOKEN)
    rejected = plan()
    assert rejected.returncode == 2
    assert f"the hub rejects the token of the token file {tmp_path}/hf/token (401)" in " ".join(rejected.stderr.split())
    assert TOKEN not in rejected.stdout + rejected.stderr
    assert "Traceback" not in rejected.stderr
