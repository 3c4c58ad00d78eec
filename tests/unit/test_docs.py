"""What the documents promise is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML
from typer.testing import CliRunner

from orchestrator import errors
from orchestrator.cli.commands import INTERRUPTED, app
from orchestrator.errors import OrchestratorError
from orchestrator.plan import read_cluster_file
from orchestrator.plan.cluster import NODE_KEYS
from orchestrator.spec import UNSUPPORTED, JobSpec


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in `text`, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return [row for row, following in zip(cells, [*cells[1:], [""]], strict=True) if not {*row, *following} & {"---"}]


def leaves(model: type[BaseModel], prefix: str = ""):
    """(dotted key, default) of every leaf of a spec; required ones have `required`."""
    for name, field in model.model_fields.items():
        parts = () if get_origin(field.annotation) is tuple else get_args(field.annotation)
        kinds = [kind for kind in (field.annotation, *parts) if isinstance(kind, type)]
        named = any(get_origin(part) is Literal for part in parts)  # one of a few words, or a mapping: a value by itself
        inner = next((kind for kind in kinds if issubclass(kind, BaseModel) and not named), None)
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default()
            yield f"{prefix}{name}", list(default) if isinstance(default, tuple) else default


def test_the_readme_lists_what_is_not_supported(readme):
    assert rows(section(readme, "Not supported yet")) == [[entry.title, entry.remedy] for entry in UNSUPPORTED]


def test_the_reference_has_every_key_with_its_default(repository):
    table = rows((repository / "docs" / "spec.md").read_text().split("## Layer policies")[0])
    documented = {key.strip("`"): default for key, default, _ in table}
    expected = dict(leaves(JobSpec))
    assert list(documented) == list(expected)
    for key, default in expected.items():
        written = documented[key].strip("`")
        assert written == default or YAML(typ="safe").load(written) == default, f"{key}: {written!r} is not {default!r}"


@pytest.mark.parametrize("document", ["README.md", "docs/exit-codes.md"])
def test_the_exit_codes_are_those_of_the_errors(repository, document):
    text = (repository / document).read_text()
    text = section(text, "Exit codes") if document == "README.md" else text.partition("\n## ")[0]
    documented = {int(row[0]) for row in rows(text)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OrchestratorError)]
    assert documented == {0, INTERRUPTED, *(kind.exit_code for kind in kinds)}


def test_every_command_in_the_documents_exists(repository, readme):
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for document in (readme, *(path.read_text() for path in (repository / "docs").glob("*.md"))):
        assert set(re.findall(r"`orchestrator ([a-z]+)", document)) <= commands
    assert commands <= set(re.findall(r"`orchestrator ([a-z]+)", readme)), "the README leaves a command out"


def commands_of(document: str) -> list[list[str]]:
    """The arguments of every `orchestrator` command that stands on a line of its own."""
    return [line.split()[1:] for line in document.splitlines() if line.startswith("    orchestrator ")]


def test_the_plans_of_the_guide_can_be_made(repository, monkeypatch):
    monkeypatch.chdir(repository)
    commands = commands_of((repository / "docs" / "plan.md").read_text())
    assert len(commands) == 4
    for arguments in commands:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}: {done.stderr}"


def test_the_guides_cluster_file_is_one_and_its_keys_are_all(repository, tmp_path):
    text = section((repository / "docs" / "plan.md").read_text(), "The cluster file")
    written = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    (tmp_path / "cluster.yaml").write_text(written)
    assert read_cluster_file(tmp_path / "cluster.yaml").num_gpus == 36
    assert {row[0].strip("`") for row in rows(text)} == set(NODE_KEYS)


def test_what_the_documents_link_to_is_there(repository):
    for document in (repository / "README.md", *(repository / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readmes_specs_are_valid(readme, tmp_path):
    from orchestrator.spec.models import JobSpec

    found = []
    for block in section(readme, "Your own model and data").split("    name:")[1:]:
        code = "    name:" + block.split("\n\n")[0]
        written = YAML(typ="safe").load("\n".join(line.removeprefix("    ") for line in code.splitlines()))
        found.append(JobSpec.model_validate_json(json.dumps(written)))
    shortest, longer = found
    assert shortest.model_fields_set == {"name", "base", "task", "data"}
    assert longer.search is not None


def test_the_design_names_files_that_exist(repository):
    text = (repository / "docs" / "design.md").read_text()
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    missing = [name for name in named if not ((repository / "orchestrator" / name).exists() or (repository / name).exists())]
    assert named
    assert missing == []


def test_every_law_that_is_cited_is_defined(repository):
    laws = re.findall(r"^(\d+)\. ", section((repository / "docs" / "design.md").read_text(), "The laws"), re.MULTILINE)
    files = [*(repository / "orchestrator").rglob("*.py"), *(repository / "docs").glob("*.md")]
    cited = {number for file in files for number in re.findall(r"\blaw (\d+)", file.read_text(), re.IGNORECASE)}
    assert cited
    assert cited <= set(laws)
