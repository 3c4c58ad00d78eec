"""The command line: what it prints where, its exit codes, and how fast it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

import orchestrator
from orchestrator import this_machine
from orchestrator.cli import commands as cli
from orchestrator.cli.commands import app
from orchestrator.cli.group import GROUPS
from orchestrator.errors import (
    DataError,
    NonFiniteLossError,
    NothingPromotedError,
    PlanError,
    RunConflictError,
    VerificationError,
)
from orchestrator.store import parse_gpus
from orchestrator.units import GIB, MIB

HEAVY = ("torch", "ray", "transformers", "deepspeed", "matplotlib")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """--address is handed to Ray by the environment; no test leaves it to the next."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def spec(repository: Path) -> str:
    return str(repository / "jobs" / "specs" / "quickstart.yaml")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def in_a_process(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "SPEC"], ["render", "SPEC"], ["render", "--schema"], ["sweep", "--help"], ["doctor"]]
)
def test_light_commands_import_nothing_heavy(arguments, spec):
    code = f"""
        import sys
        from orchestrator.cli.commands import app
        app(args=sys.argv[1:], standalone_mode=False)
        heavy = [name for name in {HEAVY} if name in sys.modules]
        assert not heavy, heavy
    """
    done = in_a_process(code, *[spec if argument == "SPEC" else argument for argument in arguments])
    assert done.returncode == 0, done.stderr


def test_help_has_every_command_in_a_group_and_the_module_is_the_command(repository):
    shown = run().output
    assert "Other:" not in shown
    headings = [line.rstrip(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options", *GROUPS]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "--version"], capture_output=True, text=True, cwd=repository, check=False
    )
    assert done.stdout == f"orchestrator {orchestrator.__version__}\n"


def test_options_give_values_to_every_command_that_reads_a_spec(spec):
    assert "trials: 5" in run("render", spec, "--set", "search.trials=5").stdout
    planned = json.loads(run("plan", spec, "--json", "--set", "search.trials=5", "--set", "search.layers=[last:2]").stdout)
    assert planned["search"]["num_trials"] == 5
    for command in ("render", "data", "plan", "sweep", "finetune"):
        refused = run(command, spec, "--set", "search.trails=5")
        assert refused.exit_code == 2
        assert "--set search.trails=5: search.trails: unknown key (did you mean trials?)" in refused.stderr


def test_render_prints_a_spec_that_renders_to_itself(spec, tmp_path):
    first = run("render", spec)
    assert first.exit_code == 0
    assert first.stdout.startswith("# sha256 (sweep): ")
    again = tmp_path / "again.yaml"
    rendered = first.stdout.replace("../../", str(Path(spec).parent.parent.parent) + "/")
    again.write_text(rendered)
    assert run("render", str(again)).stdout.splitlines()[1:] == rendered.splitlines()[1:]


def test_render_schema_is_a_schema_that_the_shipped_spec_fits(spec):
    import jsonschema

    schema = json.loads(run("render", "--schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(run("render", spec, "--json").stdout), schema)


def test_plan_prints_tables_of_at_most_100_columns(spec):
    result = run("plan", spec)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout
    for wanted in ("Choices", "Memory of one rank", "Adam's moments", "Execution", "Time and disk", "hours", "disk"):
        assert wanted in result.stdout


def test_plan_json_is_the_plan(spec):
    from orchestrator.plan.values import RunPlan

    plan = RunPlan.model_validate_json(run("plan", spec, "--json").stdout)
    assert plan.name == "quickstart"
    assert plan.data.exact is False


def test_plan_for_a_cluster_that_one_does_not_stand_on(repository):
    big = repository / "jobs" / "specs" / "llama-70b-zero3.yaml"
    cluster = repository / "cluster" / "examples" / "four-nodes-8xh100.yaml"
    result = run("plan", str(big), "--cluster", str(cluster))
    assert result.exit_code == 0, result.stderr
    assert "ZeRO 3" in result.stdout
    assert "rejected" in result.stdout


def test_the_plan_of_a_70b_on_four_nodes_imports_nothing_heavy(repository):
    """From a laptop: no weights, no GPU, no cluster, and an answer at once (`scripts/bench plan` measures it)."""
    code = f"""
        import sys
        from orchestrator.cli.commands import app
        app(args=sys.argv[1:], standalone_mode=False)
        heavy = [name for name in {HEAVY} if name in sys.modules]
        assert not heavy, heavy
    """
    big = repository / "jobs" / "specs" / "llama-70b-zero3.yaml"
    cluster = repository / "cluster" / "examples" / "four-nodes-8xh100.yaml"
    done = in_a_process(code, "plan", str(big), "--cluster", str(cluster), "--explain")
    assert done.returncode == 0, done.stderr
    for wanted in (
        "Operations of one token",
        "From operations to hours",
        "1 gang of 32 GPUs, over 4 nodes",
        "Cheaper options, rejected",
    ):
        assert wanted in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_plan_that_does_not_fit_exits_with_3(repository, monkeypatch):
    monkeypatch.setattr(this_machine, "find_gpus", list)
    result = run("plan", str(repository / "jobs" / "specs" / "llama-8b-qlora.yaml"))
    assert result.exit_code == 3
    assert "GPU" in result.stderr
    assert result.stdout == ""


def test_data_counts_and_shows_an_example(spec):
    result = run("data", spec, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert set(summary["splits"]) == {"train", "eval", "test", "retain"}
    assert "«" in summary["one_example"]


def test_data_names_what_was_left_out(tmp_path):
    rows = [{"prompt": f"say {n}", "completion": f"{n} and more"} for n in range(40)]
    rows += [rows[0], {"prompt": "long " * 200, "completion": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "spec.yaml").write_text(
        "name: x\nbase: {model: sample}\ntask: completion\ndata: {train: rows.jsonl, max_tokens: 64}\nfinetune: {}\n"
    )
    result = run("data", str(tmp_path / "spec.yaml"))
    assert result.exit_code == 0, result.stderr
    assert "rows.jsonl:42" in result.stdout
    assert "longer than data.max_tokens = 64" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_control_codes_in_data_never_reach_the_terminal(tmp_path):
    """In rows, classes, column names and file names; of what is shown, of notices and of errors."""
    code = "\x1b[2J\x9b"
    rows = [{"te\x1bxt": f"{code}say {n} {'abc'[n % 3]}", "label": f"{code}{n % 2}"} for n in range(40)]
    rows += [{"te\x1bxt": "once", "label": f"{code}0 "}]
    (tmp_path / f"rows{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "name": "x",
        "base": {"model": "sample"},
        "task": "classify",
        "data": {"train": f"rows{code}.jsonl", "columns": {"text": "te\x1bxt"}},
        "finetune": {},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    result = run("data", str(tmp_path / "spec.yaml"))
    assert result.exit_code == 0, result.stderr
    assert "\\x1b[2J\\x9b" in result.stdout
    assert "in case or blanks only" in result.stdout
    assert not {"\x1b", "\x9b"} & set(result.stdout)
    spec["data"]["columns"] = {"text": "te\x1b"}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    result = run("data", str(tmp_path / "spec.yaml"))
    assert result.exit_code == 2
    assert "rows\\x1b[2J\\x9b.jsonl" in result.stderr
    assert not {"\x1b", "\x9b"} & set(result.stderr)


def test_the_plan_warns_of_odd_classes_and_refuses_numbers_to_predict(tmp_path):
    spec = "name: x\nbase: {model: sample}\ntask: classify\ndata: {train: rows.csv}\nfinetune: {}\n"
    (tmp_path / "spec.yaml").write_text(spec)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{n},{('good', 'Good', 'bad')[n % 3]}\n" for n in range(60)))
    result = run("plan", str(tmp_path / "spec.yaml"), "--json")
    assert result.exit_code == 0, result.stderr
    assert any("'Good' (20 rows) and 'good' (20 rows)" in line for line in json.loads(result.stdout)["warnings"])
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{n},{n / 7:.2f}\n" for n in range(60)))
    result = run("plan", str(tmp_path / "spec.yaml"))
    assert result.exit_code == 2
    assert "numbers to predict" in result.stderr


def test_a_bad_spec_is_told_at_once_with_positions(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nbase: {model: sample}\ntask: compleation\ndata: {train: rows.jsonl}\ntrain: {epoch: 2}\n")
    result = run("plan", str(path))
    assert result.exit_code == 2
    assert f"{path}:3:" in result.stderr
    assert f"{path}:5:" in result.stderr
    assert result.stderr.strip().splitlines()[-1].strip().startswith("to do:")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "nope"),
        (["plan"], "SPEC"),
        (["plan", "x.yaml", "--wrong"], "--wrong"),
        (["render"], "--schema"),
        (["plan", "no-such-file.yaml"], "no-such-file.yaml"),
        (["report", "no-such-folder"], "not a run directory"),
        (["merge", "no-such-folder"], "not a run directory"),
        (["verify", "no-such-folder"], "not a bundle"),
    ],
)
def test_usage_errors_exit_with_2(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_plan_refuses_an_unknown_job(spec):
    result = run("plan", spec, "--job", "bake")
    assert result.exit_code == 2
    assert "sweep or finetune" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("row 7 is empty"), 2),
        (RunConflictError("another run"), 2),
        (PlanError("does not fit"), 3),
        (NonFiniteLossError("NaN at step 3"), 4),
        (NothingPromotedError("nothing"), 5),
        (VerificationError("KL 0.4"), 6),
    ],
)
def test_every_error_has_its_exit_code_and_no_traceback(error, code, spec, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    result = run("sweep", spec)
    assert result.exit_code == code
    assert error.what in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_out_of_a_worker_speaks_for_itself(spec, monkeypatch):
    class WorkerError(Exception):
        cause = PlanError("no room", remedy="fewer ranks")

    def fail(*_: object) -> None:
        raise WorkerError("a long remote traceback")

    monkeypatch.setattr(cli, "_run", fail)
    result = run("sweep", spec)
    assert result.exit_code == 3
    assert result.stderr.splitlines() == ["error: no room", "  to do: fewer ranks"]


def test_a_bug_shows_its_traceback_once_and_exits_with_4(spec, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(cli, "_run", fail)
    result = run("sweep", spec)
    assert result.exit_code == 4
    assert result.stderr.count("Traceback") == 1
    assert "surprise" in result.stderr


def test_an_interrupt_exits_with_130_and_one_line(spec):
    code = """
        import sys, time
        from orchestrator.cli import commands as cli
        def wait(*_):
            print("ready", flush=True)
            time.sleep(60)
        cli._run = wait
        cli.main(["sweep", sys.argv[1]])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), spec],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.startswith("interrupted;")
    assert len(said.splitlines()) == 1


def test_the_jobs_are_the_same_calls(repository, spec):
    for job in ("sweep", "finetune", "merge"):
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{job}", "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=repository,
            check=True,
        )
        assert f"orchestrator {job}" in done.stdout


def test_doctor_names_what_is_wrong_and_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(this_machine, "NEEDED", ("typer", "no-such-package"))
    result = run("doctor", "--json", "--address", "127.0.0.1:1")
    examination = json.loads(result.stdout)
    wrong = {finding["name"]: finding["remedy"] for finding in examination["findings"] if finding["state"] == "wrong"}
    assert set(wrong) == {"no-such-package", "Ray"}
    assert all(wrong.values())
    assert result.exit_code == 4


def test_doctor_is_content_with_the_environment_of_the_tests():
    result = run("doctor")
    assert result.exit_code == 0, result.stdout
    assert "no problems found" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_gpus_as_nvidia_smi_lists_them():
    listed = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n"
    assert [(gpu.name, gpu.memory_bytes) for gpu in parse_gpus(listed)] == [("NVIDIA H100 80GB HBM3", 81559 * MIB)] * 2
    assert parse_gpus("No devices were found\n") == []


def test_a_container_has_the_memory_of_its_limit(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       67108864 kB\nMemFree: 1 kB\n")
    (tmp_path / "max").write_text(f"{8 * GIB}\n")
    (tmp_path / "unlimited").write_text("max\n")
    assert this_machine.memory_bytes(tmp_path / "meminfo", tmp_path / "max") == 8 * GIB
    assert this_machine.memory_bytes(tmp_path / "meminfo", tmp_path / "unlimited") == 64 * GIB
    assert this_machine.memory_bytes(tmp_path / "meminfo", tmp_path / "none") == 64 * GIB


def test_this_machine_is_a_cluster_of_one_node():
    cluster = this_machine.describe_this_machine()
    assert cluster.num_cpus == this_machine.num_usable_cpus() >= 1
    assert cluster.nodes[0].memory_bytes > GIB


def test_a_core_is_measured_in_a_moment_and_alike():
    """A laptop's core does tens of thousands of millions; were threads or other work counted, figures would lie far apart."""
    rates = sorted(this_machine.core_flops() for _ in range(5))
    assert rates[0] > 1e9
    assert rates[-1] < 1e12
    assert rates[3] < 2 * rates[1]
