"""Code that comes with a base: never run unless the spec pins it, and never other code than that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orchestrator.anatomy import read_anatomy
from orchestrator.anatomy.own_code import code_sha256
from orchestrator.bases import locate_base
from orchestrator.data import load_tokenizer
from orchestrator.errors import BaseError
from orchestrator.plan.explain import _base_warnings
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec.models import BaseSpec, JobSpec
from orchestrator.train.model.base import load_base
from orchestrator.work.execution import BaseLoad
from tests.own_code import AUTO_MAP, MARKER, write_own_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_own_base(tmp_path / "base")


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once the code was imported, in this process or in one that it starts."""
    monkeypatch.setenv(MARKER, str(tmp_path / "imported"))
    return tmp_path / "imported"


def spec_of(base: Path | str, **keys: object) -> BaseSpec:
    return BaseSpec.model_validate({"model": str(base), **keys})


def test_without_the_key_it_is_refused_and_not_run(base: Path, marker: Path) -> None:
    found = locate_base(spec_of(base, code_sha256=code_sha256(base)), base.parent)
    with pytest.raises(BaseError, match="its own code") as raised:
        found.anatomy()
    assert code_sha256(base) in raised.value.remedy
    load_tokenizer(base)  # its class is transformers' own
    assert not marker.exists()


def test_the_key_alone_is_refused_with_the_hash_to_write(base: Path, marker: Path) -> None:
    with pytest.raises(BaseError, match="not pinned") as raised:
        locate_base(spec_of(base, trust_remote_code=True), base.parent)
    assert f"code_sha256: {code_sha256(base)}" in raised.value.remedy
    assert raised.value.exit_code == 2
    assert not marker.exists()


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_code_of_a_hub_id_needs_a_full_commit(tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(BaseError, match="one commit only") as raised:
        locate_base(spec_of("org/own", trust_remote_code=True, revision=revision), tmp_path)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_other_code_than_the_pinned_is_refused_before_it_is_imported(base: Path, marker: Path, change: str) -> None:
    pinned = code_sha256(base)
    if change == "removed":
        (base / "configuration_own.py").unlink()
    else:
        with (base / ("modeling_own.py" if change == "edited" else "more.py")).open("a") as file:
            file.write("\n")
    load = BaseLoad(folder=str(base), model_type="own_llama", quantize="none", task="completion", code_sha256=pinned)
    anatomy = read_anatomy(SAMPLE_BASE, need_weights=True)
    with pytest.raises(BaseError, match="has the hash") as raised:
        locate_base(spec_of(base, trust_remote_code=True, code_sha256=pinned), base.parent)
    assert pinned in raised.value.expected
    assert code_sha256(base) in raised.value.what
    with pytest.raises(BaseError, match="has the hash"):  # as a rank does
        load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu"))
    assert not marker.exists()


def test_code_in_another_repository_is_refused(base: Path, marker: Path) -> None:
    values = json.loads((base / "config.json").read_text())
    values["auto_map"] = AUTO_MAP | {"AutoConfig": "org/other--configuration_own.OwnConfig"}
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(BaseError, match="in another repository"):
        locate_base(spec_of(base, trust_remote_code=True, code_sha256=code_sha256(base)), base.parent)
    assert not marker.exists()


def test_a_type_of_transformers_is_its_own_class_whatever_the_key_says(base: Path, marker: Path) -> None:
    values = json.loads((base / "config.json").read_text()) | {"model_type": "llama"}
    (base / "config.json").write_text(json.dumps(values))
    anatomy = locate_base(spec_of(base, trust_remote_code=True), base.parent).anatomy()
    assert (anatomy.model_type, anatomy.code_sha256) == ("llama", "")
    load = BaseLoad(folder=str(base), model_type="llama", quantize="none", task="completion")
    model = load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu")).model
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not marker.exists()


def test_pinned_code_is_learned_told_and_loaded(base: Path, marker: Path) -> None:
    pinned = code_sha256(base)
    anatomy = locate_base(spec_of(base, trust_remote_code=True, code_sha256=pinned), base.parent).anatomy()
    assert marker.exists()
    assert (anatomy.architecture, anatomy.code_sha256) == ("OwnForCausalLM", pinned)
    assert anatomy.code_files == ("configuration_own.py", "modeling_own.py")
    assert anatomy.ways.packs
    data = {"name": "x", "base": spec_of(base), "task": "completion", "data": {"train": "x"}, "finetune": {}}
    assert any(pinned in line for line in _base_warnings(JobSpec.model_validate(data), anatomy))
    load = BaseLoad(folder=str(base), model_type="own_llama", quantize="none", task="completion", code_sha256=pinned)
    model = load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu")).model
    assert isinstance(model.model.layers[0].mlp.act_fn, torch.nn.Tanh)
