"""The card's metadata, read back by the hub's own library, and the licence that the base's files name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from orchestrator.serve.bundle_inputs import BundleInputs
from orchestrator.serve.card import model_card
from orchestrator.serve.metadata import UNKNOWN, licence_of, licence_sentence
from orchestrator.transfer.records import ModelScores, TransferReport, VerificationFigures

from .test_card import inputs_of as inputs_of

FIGURES = VerificationFigures(passed=True, kl_bundle=3e-6, kl_base=0.5, limit=0.01, num_prompts=9)
SCORES = (
    ModelScores(model="promoted", metrics={"loss": 1.83, "exact_match": 0.412, "perplexity": float("inf")}),
    ModelScores(model="none", metrics={"loss": 3.92, "exact_match": 0.0}),
)


def card_of(inputs: BundleInputs, **values: object) -> ModelCard:
    transfer = TransferReport.model_validate({"verification": FIGURES, "scores": SCORES} | values)
    return ModelCard(model_card(inputs, transfer, {}))


def test_the_hub_reads_base_licence_and_metrics(inputs_of: Callable[..., BundleInputs]) -> None:
    data = card_of(inputs_of(base_name="somebody/tiny")).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("somebody/tiny", "transformers", "text-generation")
    assert data.license == UNKNOWN
    assert data.tags == ["fine-tuned", "lora", "completion"]
    found = {result.metric_type: result for result in data.eval_results or []}
    assert found.keys() == {"loss", "exact_match"}, "of this model alone, and what is not finite is left out"
    assert (found["loss"].metric_value, found["exact_match"].metric_value) == (1.83, 0.412)
    assert (found["loss"].task_type, found["loss"].dataset_split) == ("text-generation", "test")
    assert data.model_name == "math-tutor"


def test_a_classifiers_card(inputs_of: Callable[..., BundleInputs]) -> None:
    scores = (ModelScores(model="promoted", metrics={"loss": 0.4, "accuracy": 0.91, "macro_f1": 0.88}),)
    data = card_of(inputs_of(task="classify"), scores=scores).data
    assert data.pipeline_tag == "text-classification"
    assert {result.metric_type: result.metric_value for result in data.eval_results or []} == {
        "loss": 0.4,
        "accuracy": 0.91,
        "f1": 0.88,
    }


def test_a_card_without_scores_has_no_metrics(inputs_of: Callable[..., BundleInputs]) -> None:
    assert card_of(inputs_of(), scores=()).data.eval_results is None


def test_the_base_has_its_id_and_never_a_path_of_this_machine(inputs_of: Callable[..., BundleInputs]) -> None:
    inputs = inputs_of(base_name="/home/somebody/models/tiny")
    assert card_of(inputs).data.base_model == "tiny"
    config = Path(inputs.base.folder) / "config.json"
    for own, shown in (("org/Tiny-1B", "org/Tiny-1B"), ("/home/somebody/x", "tiny"), ("", "tiny")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": own}))
        assert card_of(inputs).data.base_model == shown


def test_data_sets_of_the_hub_are_named_and_files_are_not(inputs_of: Callable[..., BundleInputs]) -> None:
    train = [{"path": "hub:org/rows@v1:easy/train", "weight": 1.0}, {"path": "/home/somebody/private.jsonl", "weight": 1.0}]
    card = card_of(inputs_of(spec={"data": {"train": train}}))
    assert card.data.datasets == ["org/rows"]
    assert "private.jsonl" not in card.content
    assert card_of(inputs_of(spec={"data": {"train": "/home/somebody/private.jsonl"}})).data.datasets is None


@pytest.mark.parametrize(
    ("files", "licence", "said_by"),
    [
        ({"README.md": "---\nlicense: mit\n---\n# Base"}, {"license": "mit"}, "README.md"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "house", "license_link": "LICENSE"},
            "README.md",
        ),
        ({"README.md": "# Base\n", "config.json": '{"license": "Apache-2.0"}'}, {"license": "apache-2.0"}, "config.json"),
        ({"LICENSE": "   Apache License\n  Version 2.0, January 2004"}, {"license": "apache-2.0"}, "LICENSE"),
        ({"LICENSE.txt": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, {"license": "llama3.1"}, "LICENSE.txt"),
        (
            {"LICENSE": "You may look at it."},
            {"license": "other", "license_name": "base-model-licence", "license_link": "LICENSE"},
            "LICENSE",
        ),
        ({"README.md": "---\n: [\n---\n"}, {"license": UNKNOWN}, ""),
        ({}, {"license": UNKNOWN}, ""),
    ],
    ids=["readme", "a licence of its own", "config", "apache's text", "llama's text", "another text", "a torn readme", "nothing"],
)
def test_the_licence_is_what_the_base_says(files: dict[str, str], licence: dict[str, str], said_by: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == (licence, said_by)
    assert ("name no licence" in licence_sentence(tmp_path)) is (not said_by)
