from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.anatomy import select
from orchestrator.plan.merge import MergePlan
from orchestrator.serve.bundle import bundle_config, serve_commands
from orchestrator.serve.bundle_inputs import BundleInputs, base_label
from orchestrator.serve.card import model_card
from orchestrator.transfer import over_seeds
from orchestrator.transfer.records import (
    ComparisonRecord,
    Control,
    ModelScores,
    PromptComparison,
    TransferReport,
    VerificationFigures,
)
from orchestrator.work.trial import TrialSpec

FIGURES = VerificationFigures(passed=True, kl_bundle=3e-6, kl_base=0.5, limit=0.01, num_prompts=9, merged_into="dequantized")


@pytest.fixture
def inputs_of(make_base: Callable, load_of: Callable) -> Callable[..., BundleInputs]:
    def build(*, task: str = "completion", tune: str = "lora", **values: object) -> BundleInputs:
        anatomy = make_base()
        rank = 4 if tune == "lora" else None
        classes = ("low", "high") if task == "classify" else ()
        trial = TrialSpec(
            trial_id="t007-abcdef",
            number=7,
            layers="last:2",
            tune=tune,
            learning_rate=3.1e-3,
            lora_rank=rank,
            total_steps=40,
            total_tokens=12_000,
            seed=3,
        )
        return BundleInputs.model_validate(
            {
                "name": "math-tutor",
                "base_name": "/home/somebody/models/tiny",
                "base": load_of(anatomy, quantize="nf4", task=task, classes=classes),
                "anatomy": anatomy,
                "trial": trial,
                "selection": select(anatomy, "last:2", tune, rank, task=task, num_classes=len(classes)),
                "artifact": "rung",
                "data_sha256": "abc123",
                "train_set": "train.npz",
                "eval_set": "eval.npz",
                "test_set": "test.npz",
            }
            | values
        )

    return build


def test_the_card_says_what_was_done_and_found_and_not_where(inputs_of: Callable):
    transfer = TransferReport(
        verdict="negative",
        sentence="worse than the base",
        verification=FIGURES,
        comparisons=(ComparisonRecord(against="head", mean=-0.25, low=-0.3, high=-0.2, method="sign_flip", num_examples=180),),
        scores=(ModelScores(model="promoted", metrics={"loss": 1.83}), ModelScores(model="none", metrics={"loss": 1.58})),
        prompts=(PromptComparison(prompt="2 | 3\nwhat?", expected="5", base_answer="x" * 999, tuned_answer="five"),),
    )
    card = model_card(inputs_of(), transfer, {"torch": "2.13.0"})
    for said in (
        "# math-tutor",
        "Negative: worse than the base",
        "| base | tiny, revision not given |",
        "nf4, double quantization",
        "LoRA, rank 4, alpha 8",
        "0.0031",
        "40 steps, 12k tokens, seed 3",
        "SHA-256 abc123",
        "torch 2.13.0",
        "| this model | 1.83 |",
        "| base model | 1.58 |",
        "Gain over head only: -0.250 nats per token, 95% interval [-0.300, -0.200], 180 examples (sign flip).",
        "| 2 \\| 3<br>what? | 5 |",
        "KL 3e-06",
        "quantized weights as used in training",
        "'\\n'",
        "forgetting was not measured",
        "a gain over the base was not shown",
    ):
        assert said in card, said
    assert "somebody" not in card
    assert "x" * 300 not in card


def test_the_card_says_what_exact_match_was_taken_over_and_who_read_the_test_set_before(inputs_of: Callable):
    scores = (ModelScores(model="promoted", metrics={"loss": 1.83, "exact_match": 0.5}, num_documents=180, num_answered=40),)
    card = model_card(inputs_of(), TransferReport(verification=FIGURES, scores=scores, test_set_reads=2), {})
    assert "| this model | 1.83 | 0.5 on 40 of 180 |" in card
    assert "has been read 2 times for this run" in card
    assert "read once" not in card


def test_the_card_of_few_examples_says_what_is_not_known(inputs_of: Callable):
    infinite = float("inf")
    comparison = ComparisonRecord(against="none", mean=0.4, low=-infinite, high=infinite, method="sign_flip", num_examples=4)
    scores = tuple(ModelScores(model=model, metrics={"loss": 1.5}) for model in ("promoted", "none", "repeat-2"))
    transfer = TransferReport(verdict="inconclusive", comparisons=(comparison,), scores=scores, verification=FIGURES)
    card = model_card(inputs_of(step=12), transfer, {})
    assert "| training | 12 of 40 steps, seed 3 |" in card
    assert "Gain over base model: +0.400 nats per token, too few examples for an interval, 4 examples (sign flip)." in card
    assert "| this model trained with seed no. 2 | 1.5 |" in card
    assert "40 steps, 12" in model_card(inputs_of(step=40), transfer, {})
    assert "inf" not in card.replace("information", "")


def compared(against: Control, low: float, high: float) -> ComparisonRecord:
    mean = (low + high) / 2
    return ComparisonRecord(against=against, mean=mean, low=low, high=high, method="sign_flip", num_examples=180)


@pytest.mark.parametrize(
    ("verdict", "none", "scratch", "line"),
    [
        ("negative", (-0.3, -0.1), None, "a gain over the base was not shown."),
        ("negative", (-0.1, 0.3), (-0.3, -0.1), "a gain over the base was not shown."),
        ("negative", (0.1, 0.3), (-0.3, -0.1), "was shown, but not over random weights trained from scratch."),
        ("no gain", (0.1, 0.3), (-0.001, 0.001), "was shown, but not over random weights trained from scratch."),
        ("inconclusive", (0.1, 0.3), (-0.1, 0.2), "was shown, but not over random weights trained from scratch."),
        ("inconclusive", (0.1, 0.3), None, "was shown for this model, but not for training from other seeds."),
        ("inconclusive", (0.1, 0.3), (0.1, 0.2), "was shown for this model, but not for training from other seeds."),
    ],
)
def test_the_card_says_of_what_a_gain_was_not_shown(
    inputs_of: Callable, verdict: str, none: tuple[float, float], scratch: tuple[float, float] | None, line: str
):
    comparisons = (compared("none", *none), *([compared("scratch", *scratch)] if scratch else []))
    gains = over_seeds([0, 1], [0.2, -0.4])
    transfer = TransferReport(verdict=verdict, comparisons=comparisons, gain_over_seeds=gains, verification=FIGURES)
    (said,) = [each for each in model_card(inputs_of(), transfer, {}).splitlines() if "The verdict is" in each]
    assert said.startswith(f"* The verdict is `{verdict}`: a gain over the base was ")
    assert said.endswith(line)


def test_a_card_warns_of_serving_what_is_worse_than_the_base(inputs_of: Callable):
    """Whoever finds the folder reads the card, and not the run's last screen."""
    for verdict, interval in (("negative", (-0.4, -0.2)), ("positive", (0.2, 0.4))):
        transfer = TransferReport(verdict=verdict, comparisons=(compared("none", *interval),), verification=FIGURES)
        serving = model_card(inputs_of(), transfer, {}).split("## Serving")[1]
        assert ("Do not serve this bundle, serve the base model" in serving) is (verdict == "negative")


def test_every_control_has_its_name(inputs_of: Callable):
    controls = ("none", "head", "shuffled", "scratch", "k_shot")
    scores = tuple(ModelScores(model=name, metrics={"loss": 1.5}) for name in controls)
    transfer = TransferReport(comparisons=(compared("k_shot", 0.1, 0.2),), scores=scores, verification=FIGURES)
    card = model_card(inputs_of(), transfer, {})
    assert "| random weights | 1.5 |" in card
    assert "| examples in the prompt | 1.5 |" in card
    assert "Gain over examples in the prompt: +0.150" in card


def test_a_card_without_scores_has_no_empty_tables(inputs_of: Callable):
    card = model_card(inputs_of(tune="full", retain_set="retain.npz"), TransferReport(verification=FIGURES), {})
    assert "Results" not in card
    assert "Answers" not in card
    assert "`delta/`" in card
    assert "forgotten" not in card


def test_a_classifiers_card_and_commands_do_not_generate(inputs_of: Callable):
    card = model_card(inputs_of(task="classify"), TransferReport(verification=FIGURES), {})
    assert "pipeline_tag: text-classification" in card
    assert "transformers serve" not in card
    assert serve_commands("b", "classify") == ("vllm serve b --runner pooling",)
    assert serve_commands("b", "chat") == ("transformers serve b    # pip install 'transformers[serving]'", "vllm serve b")


def plan_of(**values: object) -> MergePlan:
    fields = {"base_folder": "", "artifact_folder": "", "merged_into": "original", "held_dtype": "bfloat16", "shards": ()}
    return MergePlan.model_validate({"task": "completion"} | fields | values)


def test_the_config_changes_only_where_the_model_does():
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "eos_token_id": 2}
    assert bundle_config(config, plan_of()) == config
    assert bundle_config(config, plan_of(unties_head=True)) == config | {"tie_word_embeddings": False}
    found = bundle_config(config, plan_of(task="classify", class_names=("low", "high")))
    assert found["architectures"] == ["LlamaForSequenceClassification"]
    assert found["id2label"] == {"0": "low", "1": "high"}
    assert found["label2id"] == {"low": 0, "high": 1}
    assert found["pad_token_id"] == 2
    assert config["architectures"] == ["LlamaForCausalLM"], "the base's own stays as it is"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sample", "sample"),
        ("/data/m/llama", "llama"),
        ("../models/tiny", "tiny"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_a_base_is_shown_without_this_machines_folders(name: str, shown: str):
    assert base_label(name) == shown


@pytest.mark.parametrize(
    ("model_type", "layers", "said"),
    [
        ("llama", "last:2", True),
        ("llama", "head", True),
        ("gemma2", "last:2", True),
        ("gemma2", "head", False),
        ("bloom", "all", False),
    ],
)
def test_the_card_names_the_gguf_converter_where_it_keeps_what_was_trained(
    inputs_of: Callable, model_type: str, layers: str, said: bool
):
    inputs = inputs_of(tune="full")
    anatomy = inputs.anatomy.model_copy(update={"model_type": model_type})
    selection = select(inputs.anatomy, layers, "full", None, task="completion", num_classes=0)
    card = model_card(
        inputs.model_copy(update={"anatomy": anatomy, "selection": selection}), TransferReport(verification=FIGURES), {}
    )
    assert ("convert_hf_to_gguf.py . --outfile model.gguf" in card) == said
