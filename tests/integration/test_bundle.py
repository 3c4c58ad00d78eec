"""From a trial's artifact to a verified bundle, and every way in which a bundle can be wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, build_set
from orchestrator.errors import UsageError, VerificationError
from orchestrator.plan.merge import make_merge_plan
from orchestrator.serve import (
    BundleInputs,
    commit_bundle,
    document_scores,
    read_record,
    require_passed,
    score_test,
    stage_bundle,
    trained_model,
    verification,
    verify,
    verify_bundle,
)
from orchestrator.serve.card import model_card
from orchestrator.store import check_folder
from orchestrator.store.files import usual_mode
from orchestrator.train.adapters.artifacts import save_artifact
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.model.base import load_base
from orchestrator.transfer.records import PromptComparison, TransferReport, VerificationFigures
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec

WORDS = [f"w{number}" for number in range(93)]
CLASSES = ("low", "mid", "high")
VOCAB = len(WORDS) + 3


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
}


def make_base(folder: Path, *, tied: bool = True, encoder: bool = False) -> Path:
    """A three-block Llama (or BERT with its language-model head) in several shards, and a tokenizer of words."""
    torch.manual_seed(7)
    if encoder:
        model = BertForMaskedLM(BertConfig(**SIZES))
    else:
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **special, num_key_value_heads=2, tie_word_embeddings=tied))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: number + 3 for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def documents(seed: int, *, classify: bool = False) -> TokenizedSet:
    """Forty documents of 8 to 30 random words; the last four are the answer."""
    random = np.random.default_rng(seed)
    parts, prompts, answers = [], [], []
    for _ in range(40):
        ids = np.concatenate([[1], random.integers(3, VOCAB, random.integers(8, 30)), [] if classify else [2]]).astype(np.int32)
        supervised = np.zeros(len(ids), bool)
        supervised[-4:] = not classify
        parts.append((ids, supervised))
        prompts.append(" ".join(WORDS[i - 3] for i in ids[1:-4]))
        answers.append(" ".join(WORDS[i - 3] for i in ids[-4:-1]))
    if classify:
        return build_set(parts, labels=random.integers(0, 3, 40).tolist())
    return build_set(parts, prompts=prompts, answers=answers)


class Trials:
    """A base with its data, and trials on it whose weights are moved far enough to be told apart."""

    def __init__(self, folder: Path, *, quantize: str = "none", task: str = "completion", encoder: bool = False) -> None:
        self.folder = folder
        self.base = make_base(folder / "base", encoder=encoder)
        self.anatomy = read_anatomy(self.base, need_weights=True)
        classes = CLASSES if task == "classify" else ()
        self.load = BaseLoad.model_validate(
            {
                "folder": str(self.base),
                "model_type": self.anatomy.model_type,
                "quantize": quantize,
                "task": task,
                "num_classes": len(classes),
                "class_names": classes,
            }
        )
        for number, name in enumerate(("train", "eval", "test", "retain")):
            documents(number, classify=task == "classify").save(folder / f"{name}.npz")

    def trial(self, policy: str = "last:2", tune: str = "lora", *, seed: int = 0, **options: object) -> BundleInputs:
        rank = 4 if tune == "lora" else None
        selection = select(self.anatomy, policy, tune, rank, task=self.load.task, num_classes=self.load.num_classes)
        trial = TrialSpec(
            trial_id=f"t{seed:03d}-abcdef",
            number=seed,
            layers=policy,
            tune=tune,
            learning_rate=1e-3,
            lora_rank=rank,
            total_steps=10,
            total_tokens=1000,
            seed=seed,
        )
        rung = self.folder / f"{policy.replace(':', '')}-{tune}-{seed}" / "rung-0"
        base = load_base(self.load, self.anatomy, dtype=torch.bfloat16, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(100 + seed)
        with open_branch(base, selection, lora_alpha=trial.lora_alpha, seed=seed) as branch:
            for name, parameter in branch.learning_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * (0.03 if "lora_A" not in name else 0.1)
                parameter.data += noise.to(parameter.dtype)
            rung.mkdir(parents=True)
            save_artifact(branch, rung, {name: parameter.data for name, parameter in branch.learning_parameters()})
        values = {
            "name": "test-run",
            "base_name": str(self.base),
            "base": self.load,
            "anatomy": self.anatomy,
            "trial": trial,
            "selection": selection,
            "artifact": str(rung),
            "data_sha256": "d" * 64,
            **{f"{name}_set": str(self.folder / f"{name}.npz") for name in ("train", "eval", "test", "retain")},
        }
        return BundleInputs.model_validate(values | options)


CASES = [
    ("none", "completion", "last:2", "lora"),
    ("none", "completion", "last:1+head", "full"),
    ("none", "completion", "last:1+head", "lora"),
    ("nf4", "completion", "last:2", "lora"),
    ("nf4", "completion", "last:1", "full"),
    ("none", "classify", "last:1", "lora"),
    ("nf4", "classify", "head", "full"),
]


@pytest.mark.parametrize(("quantize", "task", "policy", "tune"), CASES)
def test_a_merged_model_reproduces_the_trained_one(tmp_path: Path, quantize: str, task: str, policy: str, tune: str):
    trials = Trials(tmp_path, quantize=quantize, task=task)
    inputs = trials.trial(policy, tune)
    staged = stage_bundle(inputs, tmp_path / "bundle")
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.passed
    assert figures.kl_bundle < 0.02 * figures.limit
    assert figures.kl_base > 0.01, "the trial moved the base, so that passing means something"
    assert figures.merged_into == ("dequantized" if quantize == "nf4" else "original")
    assert figures.num_prompts == 40


@pytest.mark.parametrize(("policy", "tune"), [("last:1", "lora"), ("all", "full")])
def test_an_encoder_becomes_a_classifier(tmp_path: Path, policy: str, tune: str):
    trials = Trials(tmp_path, task="classify", encoder=True)
    inputs = trials.trial(policy, tune)
    staged = stage_bundle(inputs, tmp_path / "bundle")
    assert verify(staged.folder, trained_model(inputs, staged.plan)).passed
    assert json.loads((staged.folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


@pytest.fixture(scope="module", params=["none", "nf4"])
def trials(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"), quantize=request.param)


def put_in_base(trials: Trials, right: BundleInputs, folder: Path) -> Path:
    shutil.copytree(trials.base, folder)
    return folder


def put_in_other_trial(trials: Trials, right: BundleInputs, folder: Path) -> Path:
    return stage_bundle(trials.trial(seed=9), folder).folder


def put_in_scaled_adapter(trials: Trials, right: BundleInputs, folder: Path) -> Path:
    scaled = folder.with_name("scaled")
    shutil.copytree(right.artifact, scaled)
    config_file = scaled / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"lora_alpha": 1.2 * config["lora_alpha"]}))
    return stage_bundle(right.model_copy(update={"artifact": str(scaled)}), folder).folder


@pytest.mark.parametrize("put_in", [put_in_base, put_in_other_trial, put_in_scaled_adapter])
def test_what_is_not_the_trained_model_fails(trials: Trials, tmp_path: Path, put_in: Callable[..., Path]):
    right = trials.trial(seed=trials_seed(put_in))
    wrong = put_in(trials, right, tmp_path / "bundle")
    plan = make_merge_plan(right.anatomy, right.artifact, right.base)
    figures = verify(wrong, trained_model(right, plan))
    assert not figures.passed
    assert figures.kl_bundle > 1.5 * figures.limit
    with pytest.raises(VerificationError, match="KL") as caught:
        require_passed(figures, wrong)
    assert caught.value.exit_code == 6


def trials_seed(put_in: Callable[..., Path]) -> int:
    """Each case trains its own right trial."""
    return 1 + [put_in_base, put_in_other_trial, put_in_scaled_adapter].index(put_in)


def test_a_merge_into_the_original_weights_says_so_and_drifts_more(tmp_path: Path):
    trials = Trials(tmp_path, quantize="nf4")
    inputs = trials.trial(merge_into="original")
    staged = stage_bundle(inputs, tmp_path / "bundle")
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.merged_into == "original"
    assert figures.kl_bundle > 1e-4, "the 16-bit weights are not those that training multiplied with"


def test_a_model_that_does_not_fit_in_memory_is_checked_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trials = Trials(tmp_path)
    inputs = trials.trial()
    staged = stage_bundle(inputs, tmp_path / "bundle")
    answers = []
    fresh = verification._check_in_fresh_process
    monkeypatch.setattr(verification, "_check_in_fresh_process", lambda *given: answers.append(fresh(*given)) or answers[-1])
    monkeypatch.setattr(verification, "free_bytes", lambda device: 1_000_000)
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert answers[0]["offloaded"]
    assert not answers[0]["knows_package"]
    assert figures.passed


def test_a_staged_bundle_that_transformers_cannot_load_fails(tmp_path: Path):
    trials = Trials(tmp_path)
    inputs = trials.trial()
    staged = stage_bundle(inputs, tmp_path / "bundle")
    next(staged.folder.glob("*.safetensors")).write_bytes(b"no weights")
    with pytest.raises(VerificationError, match="cannot load"):
        verify(staged.folder, trained_model(inputs, staged.plan))


EXPORT = """
import sys
sys.path = [path for path in sys.path if "site-packages" in path or "python3" in path]
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
bundle, base = sys.argv[1:]
merged, loading = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32, output_loading_info=True)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(bundle)("w1 w2 w3 w4 w5", return_tensors="pt")["input_ids"]
with torch.no_grad():
    untouched = plain(input_ids=ids).logits
    adapted = AutoPeftModelForCausalLM.from_pretrained(bundle + "/adapter", dtype=torch.float32).eval()(input_ids=ids).logits
    found = merged(input_ids=ids).logits
assert (untouched - found).abs().max() > 10 * (adapted - found).abs().max(), "adapter and merged model differ"
assert "orchestrator" not in sys.modules
print("exported")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trials, BundleInputs, Path]:
    """A committed bundle of a LoRA trial, with scores."""
    trials = Trials(tmp_path_factory.mktemp("finished"))
    for name in ("tekken.json", "NOTICE", "train.jsonl"):
        (trials.base / name).write_text("{}")
    head = trials.trial("head", "full", seed=5)
    inputs = trials.trial(controls={"head": head.artifact}, spec={"base": {"model": str(trials.base)}, "name": "test-run"})
    staged = stage_bundle(inputs, trials.folder / "run" / "bundle")
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    scores = score_test(staged.folder, inputs, trials.folder / "run" / "test")
    transfer = TransferReport(
        verdict="positive",
        sentence="better than the base",
        scores=scores.models,
        prompts=scores.prompts,
        verification=figures,
    )
    return trials, inputs, commit_bundle(staged, inputs, transfer)


def test_a_finished_bundle_loads_without_this_package(finished: tuple[Trials, BundleInputs, Path]):
    trials, _, bundle = finished
    command = [sys.executable, "-I", "-c", EXPORT, str(bundle), str(trials.base)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.strip().endswith("exported"), done.stderr


HUB_EXPORT = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 20)[None]
with torch.no_grad():
    merged = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)(input_ids=ids).logits
    adapted = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter", dtype=torch.float32).eval()(input_ids=ids).logits
assert (merged - adapted).abs().max() < 0.01 * merged.abs().max()
print("exported")
"""


def test_an_adapter_finds_its_base_from_the_hub_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A snapshot consists of links; the bundle has the files themselves, and its adapter the id and the commit."""
    trials, commit = Trials(tmp_path), "0123456789abcdef0123456789abcdef01234567"
    (trials.base / "NOTICE").write_text("terms")
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(trials.base.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    trials.load = trials.load.model_copy(update={"folder": str(snapshot), "hub_id": "owner/tiny", "revision": commit})
    trials.anatomy = read_anatomy(snapshot, need_weights=True)
    folder = stage_bundle(trials.trial(), tmp_path / "bundle").folder
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", commit)
    assert (folder / "NOTICE").read_text() == "terms"
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-I", "-c", HUB_EXPORT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.strip().endswith("exported"), done.stderr


def test_the_files_of_a_bundle_have_the_mode_of_a_new_file(finished: tuple[Trials, BundleInputs, Path], tmp_path: Path):
    """Whoever serves it may be another user; safetensors writes 0600."""
    files = [path for path in finished[2].rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {usual_mode(tmp_path)}


def test_a_finished_bundle_says_where_it_comes_from_and_its_base_alone_by_its_place(
    finished: tuple[Trials, BundleInputs, Path],
):
    trials, inputs, bundle = finished
    assert not bundle.with_name("bundle.partial").exists()
    record = read_record(bundle)
    assert record.trial == inputs.trial
    assert record.drift == record.verification.kl_bundle
    assert record.data_sha256 == inputs.data_sha256
    assert record.versions["torch"].split("+")[0] == torch.__version__.split("+")[0], "a build may name itself after a +"
    listed = {file.path for file in check_folder(bundle).files}
    assert {"README.md", "spec.json", "config.json", "tokenizer.json", "adapter/adapter_model.safetensors"} <= listed
    assert {"tekken.json", "NOTICE"} <= listed
    assert {each.path: each.reason for each in record.left_out} == {"train.jsonl": "data or log"}
    for file in bundle.rglob("*"):
        if file.name == "adapter_config.json":  # PEFT loads the base from there
            config = json.loads(file.read_text())
            assert config.pop("base_model_name_or_path") == str(trials.base)
            assert str(trials.folder) not in json.dumps(config)
        elif file.suffix in (".json", ".md", ".jinja"):
            assert str(trials.folder) not in file.read_text(), file.name
    card = (bundle / "README.md").read_text()
    for said in (
        "Positive in loss only: better than the base; but not one answer",
        "`last:2`",
        "vllm serve .",
        "transformers serve .",
        "0.001",
        "this model",
    ):
        assert said in card, said


def test_a_finished_bundle_can_be_verified_again(finished: tuple[Trials, BundleInputs, Path]):
    figures = verify_bundle(finished[2])
    assert figures.passed
    assert figures.kl_bundle == pytest.approx(read_record(finished[2]).drift, rel=0.1, abs=1e-7)


def test_a_changed_file_a_lost_base_and_another_base_are_found(finished: tuple[Trials, BundleInputs, Path], tmp_path: Path):
    trials, _, bundle = finished
    with pytest.raises(UsageError, match="the base cannot be found"):
        verify_bundle(shutil.copytree(bundle, tmp_path / "moved" / "bundle"))
    other = make_base(tmp_path / "other", tied=False)
    with pytest.raises(VerificationError, match="a different base"):
        verify_bundle(bundle, base=other)
    with pytest.raises(UsageError, match="not a bundle"):
        verify_bundle(trials.base)
    weights = next((tmp_path / "moved" / "bundle").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(VerificationError, match="changed"):
        verify_bundle(tmp_path / "moved" / "bundle", base=trials.base)


def test_an_unverified_bundle_stays_partial(tmp_path: Path):
    trials = Trials(tmp_path)
    inputs = trials.trial()
    staged = stage_bundle(inputs, tmp_path / "bundle")
    failed = VerificationFigures(passed=False, kl_bundle=1.0, kl_base=1.0, limit=0.02, num_prompts=1)
    for found in (None, failed):
        with pytest.raises(VerificationError):
            commit_bundle(staged, inputs, TransferReport(verification=found))
    assert staged.folder == tmp_path / "bundle.partial"
    assert staged.folder.exists()
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(UsageError, match="the bundle is incomplete"):
        verify_bundle(staged.folder)


def test_the_test_set_is_scored_on_bundle_base_and_controls(finished: tuple[Trials, BundleInputs, Path]):
    trials, _, bundle = finished
    folder = trials.folder / "run" / "test"
    test = TokenizedSet.load(trials.folder / "test.npz")
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.bfloat16)
    promoted = document_scores(folder, "promoted")
    for index in (0, 7, 39):
        ids, supervised = test.document(index)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:].astype(np.int64)), reduction="none")
        wanted = float(losses[torch.from_numpy(supervised[1:])].sum())
        assert promoted.loss_sums[index] == pytest.approx(wanted, rel=0.02)
        assert promoted.num_tokens[index] == supervised.sum()
    untouched, head = document_scores(folder, "none"), document_scores(folder, "head")
    assert not np.allclose(untouched.loss_sums, promoted.loss_sums)
    assert not np.allclose(untouched.loss_sums, head.loss_sums)
    card = (bundle / "README.md").read_text()
    assert "head only" in card
    assert "exact_match" in card
    assert "retention loss" in card


TEMPLATE = "{% for message in messages %}w3 w4 w{{ message['content'] | length }} {% endfor %}"


@pytest.mark.parametrize("task", ["completion", "text", "chat", "classify"])
def test_the_code_of_the_card_runs_in_the_bundle(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    trials = Trials(tmp_path, task=task)
    if task == "chat":
        (trials.base / "chat_template.jinja").write_text(TEMPLATE)
    inputs = trials.trial("last:1", "full", separator=" ")
    staged = stage_bundle(inputs, tmp_path / "bundle")
    prompts = (PromptComparison(prompt="w3 w4 w5", base_answer="w1", tuned_answer="w2"),)
    checked = VerificationFigures(passed=True, kl_bundle=0.0, kl_base=1.0, limit=0.1, num_prompts=1)
    card = model_card(inputs, TransferReport(prompts=prompts, verification=checked), {})
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(staged.folder)
    capsys.readouterr()
    variables: dict[str, Any] = {}
    exec(code, variables)
    said = capsys.readouterr().out.strip()
    if task == "classify":
        assert any(name in said for name in CLASSES)
        return
    model, tokenizer, asked = variables["model"], variables["tokenizer"], variables["inputs"]["input_ids"]
    assert tokenizer.decode(asked[0], skip_special_tokens=True).startswith("w3 w4")
    new = model.generate(asked, max_new_tokens=5, do_sample=False)[0, asked.shape[1] :]
    assert said.startswith(tokenizer.decode(new, skip_special_tokens=True)), "what the bundle answers, and not the prompt"


def test_a_classifier_bundle_is_scored_against_the_class_prior_and_loads_in_a_pipeline(tmp_path: Path):
    trials = Trials(tmp_path, task="classify")
    inputs = trials.trial("last:1", "full")
    staged = stage_bundle(inputs, tmp_path / "bundle")
    scores = score_test(staged.folder, inputs, tmp_path / "test")
    assert [model.model for model in scores.models] == ["promoted", "none"]
    assert {"accuracy", "macro_f1"} <= scores.models[0].metrics.keys()
    assert scores.prompts[0].expected in CLASSES
    classify = pipeline("text-classification", str(staged.folder))
    test = TokenizedSet.load(tmp_path / "test.npz")
    texts = [classify.tokenizer.decode(test.document(index)[0], skip_special_tokens=True) for index in range(5)]
    predictions = document_scores(tmp_path / "test", "promoted").predictions
    assert predictions is not None
    assert [found["label"] for found in classify(texts)] == [CLASSES[label] for label in predictions[:5]]
    assert "lm_head.weight" not in staged.plan.weight_map
