"""A base with more tokens: what it is made from, what a plan makes of it, and where it cannot be made."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.anatomy.reader import ADDED_TOKENS
from orchestrator.bases import EnlargedBase, locate_base
from orchestrator.bases.added_tokens import _write_config  # pyright: ignore[reportPrivateUsage]
from orchestrator.errors import UsageError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec.models import BaseSpec

TOKEN = "<new>"


@pytest.fixture
def enlarged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnlargedBase:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    shutil.copytree(SAMPLE_BASE, tmp_path / "base")
    base = locate_base(BaseSpec(model="./base", add_tokens=(TOKEN,)), tmp_path, run_folder=tmp_path / "run")
    assert isinstance(base, EnlargedBase)
    return base


def quiet(message: str) -> None:
    pass


def test_a_plan_writes_headers_and_a_run_the_same_with_weights(enlarged: EnlargedBase, tmp_path: Path) -> None:
    planned = enlarged.for_plan()
    assert planned.is_relative_to(tmp_path / "cache")
    assert not list(planned.glob("*.safetensors"))
    assert (enlarged.for_data() / "tokenizer.json").is_file()
    before, num_tokens = read_anatomy(planned, need_weights=True), read_anatomy(tmp_path / "base", need_weights=True).vocab_size
    folder = enlarged.for_training(quiet)
    after = read_anatomy(folder, need_weights=True)
    assert before.model_copy(update={"folder": after.folder}) == after
    assert after.new_rows
    assert after.vocab_size >= num_tokens
    assert enlarged.for_plan() == enlarged.for_data() == folder
    modes = {path.stat().st_mode & 0o777 for path in (folder / ADDED_TOKENS, *folder.glob("*.safetensors"))}
    assert len(modes) == 1
    assert not list(folder.parent.glob("*.partial*"))


def test_another_base_in_the_same_folder_makes_another(enlarged: EnlargedBase, tmp_path: Path) -> None:
    folder = enlarged.for_training(quiet)
    record = (folder / ADDED_TOKENS).read_bytes()
    assert (enlarged.for_training(quiet) / ADDED_TOKENS).read_bytes() == record
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert enlarged.for_data() != folder, "the run's was made from another base"
    assert (enlarged.for_training(quiet) / ADDED_TOKENS).read_bytes() != record


def test_a_config_whose_text_part_has_no_vocabulary_gets_the_rows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 8}}))
    (tmp_path / "made").mkdir()
    _write_config(tmp_path, tmp_path / "made", 640)
    assert json.loads((tmp_path / "made" / "config.json").read_bytes())["text_config"]["vocab_size"] == 640


def test_a_place_that_cannot_be_written_is_told(enlarged: EnlargedBase, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        enlarged.for_training(quiet)


def test_a_plan_imports_no_torch(enlarged: EnlargedBase, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.bases import locate_base; "
        "from orchestrator.spec.models import BaseSpec; "
        f"base = locate_base(BaseSpec(model='./base', add_tokens=({TOKEN!r},)), Path({str(tmp_path)!r})); "
        "sys.exit(not base.anatomy().new_rows or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("limit", [100_000, 1_000_000])  # of the tokenizer, of the weights
def test_a_file_size_limit_is_told(enlarged: EnlargedBase, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UsageError, match="cannot be written"):
            enlarged.for_training(quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(enlarged.folder.parent.iterdir()), "no partial folder stays behind"
