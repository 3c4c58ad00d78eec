"""The notebook of the documents, run cell by cell in a fresh process as a reader would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

RUNNER = """
import ast, json, sys

names = {"__name__": "__main__"}
shown = []
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] != "code":
        continue
    body = ast.parse("".join(cell["source"]), f"cell {number}").body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        as_html = getattr(value, "_repr_html_", None)
        shown.append(as_html() if as_html else repr(value))
run = names["run"]
scores = {each.model: each.metrics for each in run.transfer.scores}
print(json.dumps({"shown": shown, "folder": str(run.folder), "steps": names["plan"].total_steps, "scores": scores}))
"""


def test_the_notebook_runs_from_its_first_cell_to_its_last(repository: Path, tmp_path: Path):
    (tmp_path / "runner.py").write_text(RUNNER)
    done = subprocess.run(
        [sys.executable, tmp_path / "runner.py", repository / "docs" / "quickstart.ipynb"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    rows, planned, run, verdict, trials, figures, kind, answers = result["shown"]
    assert rows == "300"
    assert planned.startswith("(4, ")
    assert "topics" in run
    assert verdict in ("'positive'", "'no gain'", "'negative'", "'inconclusive'")
    assert result["scores"]["promoted"]["exact_match"] > result["scores"]["none"]["exact_match"]
    assert result["steps"] >= 30
    assert "<table" in trials
    assert figures.count("<svg") >= 3
    assert kind == "'LlamaForCausalLM'"
    assert answers.startswith("['")
    run_folder = Path(result["folder"])
    written = (run_folder / "spec.yaml").read_text()
    shutil.rmtree(run_folder.parent.parent)
    assert written.startswith("# Resolved from a program's values")


def test_the_notebook_is_kept_without_outputs(repository: Path):
    cells = json.loads((repository / "docs" / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
