"""The test set on a real base with its tokenizer: what was scored over how many documents."""

from __future__ import annotations

from pathlib import Path

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import build_set, load_tokenizer
from orchestrator.samples import SAMPLE_BASE
from orchestrator.serve import BundleInputs, score_test
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec

NUM_DOCUMENTS = 6


def test_exact_match_carries_the_number_of_documents_that_were_answered(tmp_path: Path) -> None:
    folder = Path(SAMPLE_BASE)
    anatomy = read_anatomy(folder, need_weights=True)
    tokenizer = load_tokenizer(folder)
    pairs = []
    for number in range(NUM_DOCUMENTS):
        prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (f"Count to {number}.", " ten four"))
        pairs.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    data = build_set(pairs)
    data.save(tmp_path / "test.npz")
    trial = {"trial_id": "t000", "number": 0, "layers": "last:1", "tune": "full", "learning_rate": 1e-3, "seed": 0}
    inputs = BundleInputs(
        name="test",
        base_name="sample",
        base=BaseLoad(folder=str(folder), model_type=anatomy.model_type, quantize="none", task="completion"),
        anatomy=anatomy,
        trial=TrialSpec.model_validate(trial | {"total_steps": 1, "total_tokens": 1}),
        selection=select(anatomy, "last:1", "full", None, task="completion"),
        artifact="",
        held_dtype="float32",
        train_set="",
        eval_set="",
        test_set=str(tmp_path / "test.npz"),
        data_sha256="",
    )
    longest = int(data.num_supervised.max())
    scores = score_test(folder, inputs, tmp_path / "scores", device="cpu", num_prompts=1, generated_tokens=2 * longest)
    assert [(model.model, model.num_answered, model.num_documents) for model in scores.models] == [
        ("promoted", 2, NUM_DOCUMENTS),
        ("none", 2, NUM_DOCUMENTS),
    ]
    assert all("exact_match" in model.metrics for model in scores.models)
