"""What a good spec becomes: paths, places, identity, difference, schema, resolved YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from orchestrator.errors import SpecError
from orchestrator.spec import (
    UNSUPPORTED,
    JobSpec,
    LoadedSpec,
    describe_difference,
    dump_yaml,
    json_schema,
    learning_rate_range,
    load_spec,
    require_section,
    spec_sha256,
)

REPOSITORY = Path(__file__).resolve().parents[3]
SHIPPED = sorted((REPOSITORY / "jobs" / "specs").glob("*.yaml"))

TEXT = """\
name: tutor
base: {model: sample}
task: completion
data: {train: "data/*.jsonl", retain: /abs/r.jsonl}
train: {epochs: 1_0e-1, grad_clip: 1e-4}
search: {layers: [head, "last: 2"], trials: 0x10}
"""


def write(tmp_path: Path, text: str = TEXT, name: str = "spec.yaml") -> LoadedSpec:
    (tmp_path / name).write_text(text)
    return load_spec(tmp_path / name)


def changed(loaded: LoadedSpec, section: str, **values: Any) -> JobSpec:
    return loaded.spec.model_copy(update={section: getattr(loaded.spec, section).model_copy(update=values)})


def test_paths_are_relative_to_the_spec_wherever_the_process_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    loaded = load_spec(Path(tmp_path.name) / "spec.yaml")
    assert loaded.folder == tmp_path
    assert loaded.resolve("data/*.jsonl") == f"{tmp_path}/data/*.jsonl"
    assert loaded.resolve("../x") == str(tmp_path.parent / "x")
    assert loaded.resolve("/abs/r.jsonl") == "/abs/r.jsonl"
    assert loaded.resolve("~/r") == str(Path.home() / "r")
    assert loaded.resolve("s3://bucket/a/../b") == "s3://bucket/a/../b"
    assert loaded.output_root == tmp_path / "runs"


def test_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    spec = write(tmp_path).spec
    assert spec.train.epochs == 1.0
    assert spec.train.grad_clip == 1e-4
    assert spec.search is not None
    assert spec.search.trials == 16


def test_a_whole_number_serves_where_a_number_is_due(tmp_path: Path) -> None:
    assert write(tmp_path, TEXT.replace("1_0e-1", "3")).spec.train.epochs == 3.0


def test_a_value_has_its_place(tmp_path: Path) -> None:
    loaded = write(tmp_path)
    assert loaded.where("search.layers[1]") == f"{tmp_path}/spec.yaml:6:25"
    assert loaded.where("data.train") == f"{tmp_path}/spec.yaml:4:15"
    assert loaded.where("data.eval") == f"{tmp_path}/spec.yaml"


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    text = TEXT.replace("train: {epochs: 1_0e-1, grad_clip: 1e-4}", "train: &t {epochs: 4}").replace(
        "search: {", "finetune: {learning_rate: &rate 1e-3}\nsearch: {<<: [{trials: 3, tune: [full]}], "
    )
    spec = write(tmp_path, text).spec
    assert spec.search is not None
    assert (spec.search.trials, spec.search.tune) == (16, ("full",))


def test_a_folder_beside_the_spec_is_a_base_and_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert write(tmp_path, TEXT.replace("model: sample", "model: models/base")).spec.base.model == "models/base"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_spec_is_good_and_agrees_with_the_schema(path: Path) -> None:
    loaded = load_spec(path)
    jsonschema.validate(YAML(typ="safe").load(path), json_schema())
    sources = [loaded.spec.data.train, loaded.spec.data.eval, loaded.spec.data.test, loaded.spec.data.retain]
    for source in sources:
        if isinstance(source, str):
            assert Path(loaded.resolve(source)).is_file(), source
    assert loaded.output_root == REPOSITORY / "runs"


def test_specs_are_shipped() -> None:
    assert {path.name for path in SHIPPED} >= {"quickstart.yaml", "llama-8b-qlora.yaml", "llama-70b-zero3.yaml", "classify.yaml"}


def test_every_key_of_the_schema_is_described() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["name"]["description"] == "The run's folder."
    assert schema["$defs"]["TrainSpec"]["properties"]["warmup"]["description"].startswith("Share of the training tokens")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "epochs": 3}, schema)


def test_the_resolved_spec_loads_and_is_the_same_run(tmp_path: Path) -> None:
    loaded = write(tmp_path)
    text = dump_yaml(loaded)
    again = write(tmp_path, text, "resolved.yaml")
    assert again.spec == loaded.spec
    digest = spec_sha256(loaded.spec, "sweep")
    assert text.startswith(f"# sha256 (sweep): {digest}\n")
    assert spec_sha256(again.spec, "sweep") == digest
    assert "tokens_per_step: auto" in text


def test_identity_leaves_out_what_may_change_between_submissions(tmp_path: Path) -> None:
    loaded = write(tmp_path)
    digest = spec_sha256(loaded.spec, "sweep")
    same = [
        changed(loaded, "search", trials=99),
        changed(loaded, "resources", max_gpus=3),
        loaded.spec.model_copy(update={"output": "elsewhere"}),
        write(tmp_path, TEXT + "finetune: {lora_rank: 4}\n").spec,
    ]
    assert [spec_sha256(spec, "sweep") for spec in same] == [digest] * 4
    other = [
        changed(loaded, "search", layers=("head",)),
        changed(loaded, "train", seed=1),
        changed(loaded, "data", train="x"),
        changed(loaded, "base", quantize="nf4"),
        loaded.spec.model_copy(update={"task": "text"}),
        loaded.spec.model_copy(update={"name": "other"}),
    ]
    digests = {spec_sha256(spec, "sweep") for spec in other}
    assert len(digests) == 6
    assert digest not in digests
    assert spec_sha256(loaded.spec, "finetune") != digest


FIXED = """\
name: tutor
base: {model: sample}
task: completion
data: {train: a.jsonl}
search: {algorithm: fixed, points: [{layers: "last:2", learning_rate: 1e-3}, {layers: all, tune: full, learning_rate: 1e-4}]}
"""


def test_a_fixed_list_is_part_of_the_identity_and_survives_being_written(tmp_path: Path) -> None:
    loaded = write(tmp_path, FIXED)
    assert loaded.spec.search is not None
    assert loaded.spec.search.num_trials == 2
    assert write(tmp_path, dump_yaml(loaded), "resolved.yaml").spec == loaded.spec
    other = changed(loaded, "search", points=loaded.spec.search.points[:1])
    assert spec_sha256(other, "sweep") != spec_sha256(loaded.spec, "sweep")


@pytest.mark.parametrize(
    ("section", "key", "usual", "other"),
    [
        ("search", "adapter", ["lora"], ["lora", "dora"]),
        ("search", "lora_alpha", [], [8]),
        ("search", "lora_dropout", [0.0], [0.1]),
        ("search", "modules", ["all"], ["mlp"]),
        ("finetune", "adapter", "lora", "rslora"),
        ("finetune", "lora_alpha", None, 8),
        ("finetune", "lora_dropout", 0.0, 0.1),
        ("finetune", "modules", "all", ["q_proj", "v_proj"]),
    ],
)
def test_adapter_keys_are_part_of_the_identity_only_when_they_are_not_the_default(
    tmp_path: Path, section: str, key: str, usual: Any, other: Any
) -> None:
    job, path = ("sweep", "search.layers=[all]") if section == "search" else ("finetune", "finetune.layers=all")
    spec = write(tmp_path).path
    plain, same, different = (
        spec_sha256(load_spec(spec, [path, *asked]).spec, job)
        for asked in ([], [f"{section}.{key}={json.dumps(usual)}"], [f"{section}.{key}={json.dumps(other)}"])
    )
    assert plain == same != different


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("search.adapter=[dorra]", "did you mean dora"),
        ("search.adapter=dora", "write a list"),
        ("search.modules=[atention]", "did you mean attention"),
        ("search.modules=attention", "write a list"),
        ("finetune.modules=atention", "did you mean attention"),
        ("search.lora_dropout=[1.0]", "below 1"),
        ("search.modules=[[q_proj], [q_proj]]", "duplicate"),
        ("search.lora_alpha=[8, 8]", "duplicate"),
    ],
)
def test_adapter_mistakes_are_told_in_the_users_words(tmp_path: Path, asked: str, message: str) -> None:
    with pytest.raises(SpecError) as raised:
        load_spec(write(tmp_path).path, [asked, "finetune.layers=all"])
    assert message in str(raised.value)


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_an_anchor_on_products_needs_adapters_that_are_products(tmp_path: Path, adapter: str) -> None:
    asked = [f"search.adapter=[{adapter}]", "search.anchor=[{kind: product, strength: 3}]"]
    if adapter != "dora":
        assert load_spec(write(tmp_path).path, asked)
        return
    with pytest.raises(SpecError, match=r"dora .search\.adapter\[0\]. changes weights by more than the product"):
        load_spec(write(tmp_path).path, asked)


def test_runs_begun_by_older_versions_keep_their_identity(tmp_path: Path) -> None:
    found = write(tmp_path)
    # Of version 865dcb3, before there were `classify`, `base.add_tokens` and `base.extra_tensors`; older ones gave the same.
    assert spec_sha256(found.spec, "sweep") == "954804bf54b4c88c819b9b9a69bd3d6b734592149a9ece6d37b3015c23f3f802"
    asked = changed(found, "search", learning_curve=True)
    assert spec_sha256(asked, "sweep") != spec_sha256(found.spec, "sweep")


def test_the_difference_of_two_specs_is_told_value_by_value(tmp_path: Path) -> None:
    loaded = write(tmp_path)
    old = loaded.spec.model_dump(mode="json")
    new = changed(loaded, "train", epochs=3.0).model_dump(mode="json") | {"finetune": {"layers": "all"}}
    assert describe_difference(old, new) == [
        "train.epochs: 1.0 -> 3.0",
        "finetune.layers: (absent) -> all",
        "finetune: null -> (absent)",
    ]
    assert describe_difference(old, loaded.spec.model_dump()) == []


def test_full_learns_at_a_tenth_of_loras_rate_unless_given(tmp_path: Path) -> None:
    search = require_section(write(tmp_path), "sweep")
    assert learning_rate_range(search, "lora") == (1e-4, 5e-3)
    assert learning_rate_range(search, "full") == pytest.approx((1e-5, 5e-4))
    given = write(tmp_path, TEXT.replace("search: {", "search: {learning_rate: {full: [1e-6, 1e-5]}, ")).spec.search
    assert given is not None
    assert learning_rate_range(given, "full") == (1e-6, 1e-5)


def test_a_job_without_its_section_is_told_which_one(tmp_path: Path) -> None:
    loaded = write(tmp_path)
    with pytest.raises(SpecError, match=r"spec\.yaml:1:1: finetune: is missing; the job `finetune` needs .*or run `sweep`"):
        require_section(loaded, "finetune")


def test_what_is_not_built_yet_has_a_title_and_a_remedy() -> None:
    assert len({row.title for row in UNSUPPORTED}) == len(UNSUPPORTED) == 2
    assert all(row.remedy for row in UNSUPPORTED)
