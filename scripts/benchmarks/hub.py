"""Plan a 70B base that lies on the hub, from a local server of the hub's API: bytes and requests, seconds, and no torch.

    scripts/bench hub [--json]

The server has the published config.json of Llama 3.1 70B and 30 shards with real headers, 141 GB, whose data is never made.
The plan runs twice in fresh processes: with empty caches, and again. The exit status is 1 if more was read than the bound, or
torch imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.hub_models import sparse_base  # noqa: E402
from tests.hub_server import HubServer, size_of  # noqa: E402

SPEC, SHAPE = ROOT / "jobs/specs/llama-70b-zero3.yaml", ROOT / "jobs/specs/shapes/llama-3.1-70b"
CLUSTER = ROOT / "cluster/examples/four-nodes-8xh100.yaml"
MODEL = "meta-llama/Llama-3.1-70B"
BOUND_BYTES = 2_000_000
PLAN = """
import sys
from orchestrator.cli.commands import app
app(args=sys.argv[1:], standalone_mode=False)
print(*(name for name in ("torch", "transformers", "ray") if name in sys.modules), file=sys.stderr)
"""


def measure() -> dict[str, Any]:
    """Plan twice; return bytes, requests and seconds of each, and the heavy libraries that were imported."""
    with HubServer() as server, tempfile.TemporaryDirectory(prefix="orchestrator-hub-") as home:
        files = sparse_base(SHAPE)
        commit = server.add(MODEL, files)
        command = [sys.executable, "-c", PLAN, "plan", str(SPEC), "--cluster", str(CLUSTER), "--json"]
        command += ["--set", f"base.model={MODEL}"]
        runs: list[dict[str, Any]] = []
        for _ in range(2):
            server.requests.clear()
            started = time.monotonic()
            done = subprocess.run(
                command, env=server.environment(Path(home)), cwd=ROOT, capture_output=True, text=True, check=True
            )
            seconds = time.monotonic() - started
            runs.append(
                {
                    "seconds": round(seconds, 2),
                    "bytes": server.bytes_of(),
                    "weight_file_bytes": server.bytes_of(".safetensors?"),
                    "requests": len(server.requests),
                    "imported": done.stderr.split(),
                    "parameters": json.loads(done.stdout)["num_parameters"],
                    "commit": json.loads(done.stdout)["base"]["revision"] == commit,
                }
            )
    return {"model": MODEL, "repository_bytes": sum(map(size_of, files.values())), "first": runs[0], "second": runs[1]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench hub", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = measure()
    print(json.dumps(found) if options.json else _text(found))
    if found["first"]["bytes"] > BOUND_BYTES or found["first"]["imported"]:
        sys.exit(1)


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['model']}: {found['repository_bytes'] / 1e9:.0f} GB of files, planned without them"]
    for name in ("first", "second"):
        run = found[name]
        lines.append(
            f"{name:7} plan  {run['seconds']:5.2f} s  {run['requests']:3} requests  {run['bytes']:9,} bytes "
            f"({run['weight_file_bytes']:,} of weight files)  imported: {', '.join(run['imported']) or 'nothing heavy'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
