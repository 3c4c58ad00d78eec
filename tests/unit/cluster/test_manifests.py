"""The files that start clusters: valid where a schema says what valid is, and asking for a token."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML


def parsed(path: Path) -> dict[str, Any]:
    return json.loads(json.dumps(YAML(typ="safe").load(path)))


@pytest.fixture
def cluster(repository: Path) -> Path:
    return repository / "cluster"


@pytest.fixture
def rayjob(cluster: Path) -> dict[str, Any]:
    return parsed(cluster / "kuberay" / "rayjob.yaml")


def strict(schema: Any) -> Any:
    """The same schema, refusing unknown fields as `kubectl create` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    closed = isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields")
    return {"additionalProperties": False, **schema} if closed and schema.get("type") == "object" else schema


@pytest.fixture(scope="module")
def kuberay(real_data: Path) -> jsonschema.Draft202012Validator:
    file = real_data / "kuberay-crds" / "ray.io_rayjobs.json"
    if not file.exists():
        pytest.skip(f"KubeRay's resource definition missing: {file}")
    versions = json.loads(file.read_text())["spec"]["versions"]
    (found,) = (version for version in versions if version["name"] == "v1")
    schema = strict(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def test_the_rayjob_is_what_kuberay_accepts(rayjob: dict[str, Any], kuberay: jsonschema.Draft202012Validator) -> None:
    kuberay.validate(rayjob)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(shutdownAfterJobFinished=True),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("template"),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
)
def test_the_schema_finds_mistakes(rayjob: dict[str, Any], kuberay: jsonschema.Draft202012Validator, spoil: Any) -> None:
    spoil(rayjob)
    with pytest.raises(jsonschema.ValidationError):
        kuberay.validate(rayjob)


def test_the_rayjob_asks_for_a_token_and_spells_out_no_secret(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "runtimeEnvYAML" not in spec
    pods = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            names = [variable["name"] for variable in container["env"]]
            assert not [name for name in names if re.search("TOKEN|KEY|SECRET|PASSWORD", name)]


def test_the_clusters_run_the_pinned_ray(rayjob: dict[str, Any], cluster: Path, repository: Path) -> None:
    (pinned,) = re.findall(r"^ray(?:\[.*\])?==(\S+)$", (repository / "constraints.txt").read_text(), re.MULTILINE)
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pinned == metadata.version("ray")
    assert f"rayproject/ray:{pinned}-" in (cluster / "Dockerfile").read_text()


def test_ray_up_accepts_its_file(cluster: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = parsed(cluster / "ray-up.yaml")
    filled = prepare_config(config)
    validate_config(filled)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands)


@pytest.mark.parametrize("name", ["local", "slurm.sbatch"])
def test_scripts_parse_ask_for_a_token_and_stop_nothing_else(cluster: Path, name: str) -> None:
    subprocess.run(["bash", "-n", cluster / name], check=True)
    text = (cluster / name).read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "umask 077" in text
    assert not re.search(r"ray stop|pkill|killall", text)


def test_each_file_says_how_it_is_started(cluster: Path) -> None:
    for name in ("local", "slurm.sbatch", "ray-up.yaml", "kuberay/rayjob.yaml", "Dockerfile"):
        head = (cluster / name).read_text().split("\n\n")[0]
        assert re.search(r"^# +(cluster/local|sbatch|ray|kubectl|docker) .*", head, re.MULTILINE), name
        assert f"cluster/{name}" in head, name


def run_local(cluster: Path, state: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "CLUSTER_LOCAL_DIR": str(state), **environment}
    return subprocess.run([cluster / "local", *arguments], env=variables, capture_output=True, text=True, check=False)


def test_local_says_what_it_needs(cluster: Path, tmp_path: Path) -> None:
    assert (cluster / "local").stat().st_mode & stat.S_IXUSR
    assert run_local(cluster, tmp_path, "status").stdout.startswith("not up")
    for arguments in (("env",), ("sideways",), ()):
        answer = run_local(cluster, tmp_path, *arguments)
        assert answer.returncode == 2
        assert answer.stderr.splitlines()[-1].startswith("  to do: ")
    assert list(tmp_path.iterdir()) == []


def test_local_leaves_a_process_alone_that_only_has_the_number_of_its_own(cluster: Path, tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        (tmp_path / "process").write_text(f"{bystander.pid} 1\n")
        assert run_local(cluster, tmp_path, "status").returncode == 1
        assert run_local(cluster, tmp_path, "down").returncode == 0
        assert bystander.poll() is None
        assert not (tmp_path / "process").exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_local_cleans_up_after_a_ray_that_does_not_start(cluster: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "ray"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    state = tmp_path / "state"
    answer = run_local(cluster, state, "up", PATH=f"{broken.parent}:{os.environ['PATH']}")
    assert answer.returncode == 2
    assert "no such option" in answer.stderr
    assert [entry.name for entry in state.iterdir()] == ["ray.log"]
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
