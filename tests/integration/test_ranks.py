"""ZeRO x LoRA x nf4 over two real processes that stay warm: the whole matrix runs in the same two.

Every trial is compared with one process that knows nothing of DeepSpeed, on the same global batches. A second run of
the same trial in the same process, after a `full` one and a failed one, must give the same bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import build_set
from orchestrator.plan.memory.transient import LOGIT_CHUNK_BYTES
from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.store import read_jsonl
from orchestrator.train.batches import RowPlan, StepPlan
from orchestrator.work.assignment import EvaluateBase, TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.remedies import NOTHING, Remedies
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

WORKER = Path(__file__).parent / "ranks_worker.py"
NUM_STEPS = 4
TOKENS_PER_STEP = 160
SKEWED_TOKENS_PER_STEP = 116
TOLERANCE = 1e-3
TIMEOUT_S = 1200


def make_base(folder: Path) -> None:
    """Random weights in four blocks, wide enough for bitsandbytes' kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(320)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0").save_pretrained(folder)


def make_sets(folder: Path) -> None:
    """Counting sequences; in `skewed` the longer documents carry ten times the supervised tokens of the shorter ones."""
    generator = np.random.default_rng(0)

    def document(length: int, num_supervised: int) -> tuple[np.ndarray, np.ndarray]:
        ids = (int(generator.integers(3, 300)) + np.arange(length)) % 300 + 3
        return ids, np.arange(length) >= length - num_supervised

    lengths = generator.integers(20, 60, size=56)
    build_set([document(int(n), int(n) // 2) for n in lengths[:48]]).save(folder / "train.npz")
    build_set([document(int(n), int(n) // 2) for n in lengths[48:]]).save(folder / "eval.npz")
    build_set([document(60, 50) if number % 2 else document(56, 5) for number in range(24)]).save(folder / "skewed.npz")


@dataclass
class Matrix:
    """Jobs, collected first and run at once; results by trial name afterwards."""

    folder: Path
    anatomy: Any
    worker: Path = WORKER
    jobs: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: {1: [], 2: []})
    results: dict[str, RungResult] = field(default_factory=dict)
    every_rank: dict[str, list[RungResult]] = field(default_factory=dict)
    built: dict[str, list[int]] = field(default_factory=dict)
    """Documents of the trunk that each rank computed for a trial, where the worker counts them."""

    def host(self, quantize: str, execution: ExecutionPlan, *, chunk_bytes: int = LOGIT_CHUNK_BYTES) -> None:
        base = BaseLoad.model_validate(
            {
                "folder": str(self.folder / "base"),
                "model_type": self.anatomy.model_type,
                "quantize": quantize,
                "task": "completion",
            }
        )
        self.jobs[execution.ranks].append(
            {
                "base": base.model_dump(mode="json"),
                "anatomy": self.anatomy.model_dump(mode="json"),
                "execution": execution.model_dump(mode="json"),
                "assignments": [],
                "chunk_bytes": chunk_bytes,
            }
        )

    def trial(
        self,
        name: str,
        execution: ExecutionPlan,
        *,
        tune: str = "lora",
        policy: str = "last:2",
        rate: float | None = None,
        train: str = "train",
        stop: int | None = None,
        start: str | None = None,
        rung: int = 0,
        metric: str = "loss",
        control: Any = None,
        tokens_per_step: int = TOKENS_PER_STEP,
        num_steps: int = NUM_STEPS,
        trunk: TrunkPlan | None = None,
        remedies: Remedies = NOTHING,
        adapter: AdapterOptions = PLAIN_LORA,
    ) -> None:
        selection = select(self.anatomy, policy, tune, 8 if tune == "lora" else None, adapter=adapter, task="completion")
        rate = rate if rate is not None else {"lora": 5e-3, "full": 5e-4}[tune]
        context = WorkContext(
            settings=TrainSettings(
                warmup=0.1, schedule="cosine", weight_decay=0.01, grad_clip=1.0, tokens_per_step=tokens_per_step
            ),
            data=DataPaths(
                train=str(self.folder / f"{train}.npz"),
                eval=str(self.folder / "eval.npz"),
                replay=str(self.folder / "replay.npz") if remedies.needs_replayed_text else None,
            ),
            metric=metric,
            trunk=trunk,
        )
        spec = TrialSpec(
            trial_id=name,
            number=0,
            control=control,
            layers=policy,
            tune="lora" if tune == "lora" else "full",
            learning_rate=rate,
            lora_rank=selection.lora_rank,
            adapter=adapter,
            total_steps=num_steps,
            total_tokens=num_steps * TOKENS_PER_STEP,
            seed=3,
            remedies=remedies,
        )
        own = {"context": context, "trial": spec, "selection": selection, "execution": execution}
        own["folder"] = str(self.folder / "trials" / name)
        stop_step = num_steps if stop is None else stop
        begun = str(self.folder / "trials" / start) if start else None
        assignment = (
            EvaluateBase.model_validate(own)
            if control == "none"
            else TrainRung.model_validate({**own, "rung": rung, "start": begun, "stop_step": stop_step})
        )
        self.jobs[execution.ranks][-1]["assignments"].append(assignment.model_dump(mode="json"))

    def group(self, rates: dict[str, float], execution: ExecutionPlan, *, width: int | None = None, **trial: Any) -> None:
        """Trials by name, of these rates, that a gang takes as a group; with a `width` so many share a batch."""
        assignments = self.jobs[execution.ranks][-1]["assignments"]
        first = len(assignments)
        for name, rate in rates.items():
            self.trial(name, execution, rate=rate, **trial)
        assignments[first:] = [{"group": assignments[first:], "width": width}]

    def run(self, num_ranks: int) -> None:
        jobs = self.folder / f"jobs-{num_ranks}.json"
        jobs.write_text(json.dumps(self.jobs[num_ranks]))
        outs = [self.folder / f"out-{num_ranks}-{rank}.json" for rank in range(num_ranks)]
        logs = [out.with_suffix(".log").open("w") for out in outs]
        meeting = self.folder / f"meeting-{num_ranks}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes = [
            subprocess.Popen(
                [sys.executable, str(self.worker), str(jobs), str(rank), str(num_ranks), str(meeting), str(out)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
        ]
        try:
            codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
            for log in logs:
                log.close()
        assert codes == [0] * num_ranks, "\n".join(out.with_suffix(".log").read_text()[-3000:] for out in outs)
        answers = [json.loads(out.read_text()) for out in outs]
        for key in answers[0]:
            name = key.rpartition("#")[0].rpartition("/")[2] + (key[-2:] if not key.endswith("#0") else "")
            self.every_rank[name] = [RungResult.model_validate(answer[key]) for answer in answers]
            self.results[name] = self.every_rank[name][0]
            counts = [out.with_suffix(".built.json") for out in outs]
            if all(count.exists() for count in counts):
                self.built[name] = [json.loads(count.read_text())[key] for count in counts]

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in self.steps(name)]

    def bits(self, name: str) -> list[str]:
        return [line["loss_hex"] for line in self.steps(name)]

    def steps(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "trials" / name / "steps.jsonl")

    def artifact(self, name: str) -> dict[str, torch.Tensor]:
        rung = Path(self.results[name].checkpoint or "")
        return load_file(next(file for kind in ("adapter", "delta") for file in (rung / kind).glob("*.safetensors")))


def plan(stage: int | None, *, offload: str = "none", dtype: str = "bfloat16", checkpointing: bool = False) -> ExecutionPlan:
    """Two ranks of DeepSpeed at `stage`, or one without it. Small micro-batches, so that there are several rounds."""
    return ExecutionPlan.model_validate(
        {
            "device": "cpu",
            "ranks": 1 if stage is None else 2,
            "threads_per_rank": 1,
            "executor": "torch" if stage is None else "deepspeed",
            "zero_stage": stage or 0,
            "offload": offload,
            "checkpointing": checkpointing,
            "dtype": dtype,
            "row_tokens": 64,
            "micro_batch_rows": 1,
        }
    )


def add_warm_trials(matrix: Matrix, stage: int, quantize: str) -> None:
    """LoRA first; unfrozen weights; one that fails in the middle; LoRA again."""
    execution, kind = plan(stage), "qlora" if quantize == "nf4" else "lora"
    matrix.trial(f"z{stage}-{kind}", execution)
    matrix.trial(f"z{stage}-{kind}-full", execution, tune="full")
    matrix.trial(f"z{stage}-{kind}-failed", execution, tune="full", rate=1e30)
    matrix.trial(f"z{stage}-{kind}-again", execution)


def add_resumed(matrix: Matrix, stage: int) -> None:
    matrix.trial(f"z{stage}-resumed", plan(stage), stop=2)
    matrix.trial(f"z{stage}-resumed", plan(stage), start=f"z{stage}-resumed/rung-0", rung=1)


def add_skewed(matrix: Matrix, stage: int | None, name: str) -> None:
    matrix.trial(name, plan(stage), train="skewed", tokens_per_step=SKEWED_TOKENS_PER_STEP)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("ranks")
    make_base(folder / "base")
    make_sets(folder)
    matrix = Matrix(folder, read_anatomy(folder / "base", need_weights=True))
    for quantize, kind in (("none", "lora"), ("nf4", "qlora")):
        matrix.host(quantize, plan(None))
        matrix.trial(f"one-{kind}", plan(None), metric="exact_match")
        matrix.trial(f"one-{kind}-full", plan(None), tune="full")
        if quantize == "none":
            add_skewed(matrix, None, "one-skewed")
    matrix.host("none", plan(1))
    for stage in (1, 2):
        add_warm_trials(matrix, stage, "none")
        add_skewed(matrix, stage, f"z{stage}-skewed")
    matrix.trial("z1-blown-at-the-end", plan(1), tune="full", rate=1e30, stop=1)
    matrix.trial("z0-lora", plan(0))
    add_resumed(matrix, 1)
    matrix.host("nf4", plan(1))
    for stage in (1, 2):
        add_warm_trials(matrix, stage, "nf4")
    matrix.host("none", plan(3))
    matrix.trial("z3-none", plan(3), policy="none", control="none", stop=0)
    add_warm_trials(matrix, 3, "none")
    add_skewed(matrix, 3, "z3-skewed")
    add_resumed(matrix, 3)
    matrix.trial("z3-checkpointing", plan(3, checkpointing=True), metric="exact_match")
    matrix.trial("z3-offload", plan(3, offload="optimizer"))
    matrix.host("nf4", plan(3))
    add_warm_trials(matrix, 3, "nf4")
    matrix.host("none", plan(3), chunk_bytes=4 * 320 * 4)
    add_skewed(matrix, 3, "z3-chunks")
    matrix.host("none", plan(3, offload="parameters"))
    matrix.trial("z3-offload-parameters", plan(3, offload="parameters"))
    matrix.host("none", plan(None, dtype="float32"))
    matrix.trial("one-float32", plan(None, dtype="float32"))
    matrix.host("none", plan(1, dtype="float32"))
    for stage in (0, 1, 2):
        matrix.trial(f"z{stage}-float32", plan(stage, dtype="float32"))
    matrix.run(1)
    matrix.run(2)
    return matrix


KINDS = ("lora", "qlora", "lora-full", "qlora-full")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_learn_what_one_learns(matrix: Matrix, stage: int, kind: str) -> None:
    ours, alone = matrix.losses(f"z{stage}-{kind}"), matrix.losses(f"one-{kind}")
    assert len(ours) == len(alone) == NUM_STEPS
    np.testing.assert_allclose(ours, alone, rtol=TOLERANCE)
    np.testing.assert_allclose(
        [line["grad_norm"] for line in matrix.steps(f"z{stage}-{kind}")],
        [line["grad_norm"] for line in matrix.steps(f"one-{kind}")],
        rtol=2e-2,
    )
    assert alone[-1] < alone[0] - 10 * TOLERANCE * alone[0], "a trial that does not learn proves nothing"
    assert matrix.results[f"z{stage}-{kind}"].eval_loss == pytest.approx(matrix.results[f"one-{kind}"].eval_loss, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["z3-checkpointing", "z3-offload", "z3-offload-parameters"])
def test_other_ways_learn_the_same(matrix: Matrix, name: str) -> None:
    np.testing.assert_allclose(matrix.losses(name), matrix.losses("one-lora"), rtol=TOLERANCE)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_float32_learns_the_same_bar_rounding(matrix: Matrix, stage: int) -> None:
    np.testing.assert_allclose(matrix.losses(f"z{stage}-float32"), matrix.losses("one-float32"), rtol=1e-5)
    norms = [[line["grad_norm"] for line in matrix.steps(name)] for name in (f"z{stage}-float32", "one-float32")]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_long_logits_in_unequal_pieces(matrix: Matrix) -> None:
    """Four positions at a time: one rank has many pieces where the other has one or none, and both gather the head."""
    np.testing.assert_allclose(matrix.losses("z3-chunks"), matrix.losses("one-skewed"), rtol=TOLERANCE)


def test_zero_0_learns_nearly_the_same(matrix: Matrix) -> None:
    """DeepSpeed adds up the rounds of a step in bf16 there, and has no other way."""
    np.testing.assert_allclose(matrix.losses("z0-lora"), matrix.losses("one-lora"), rtol=5 * TOLERANCE)


def test_the_skewed_set_is_skewed(matrix: Matrix) -> None:
    from orchestrator.data import TokenizedSet

    data = TokenizedSet.load(matrix.folder / "skewed.npz")
    ratios = []
    for _, (_, documents) in zip(range(NUM_STEPS), StepPlan(data, SKEWED_TOKENS_PER_STEP, 3).steps_from(0), strict=False):
        shares = [
            sum(batch.num_supervised for batch in RowPlan(64, 1, True, rank, 2).batches(data, documents)) for rank in (0, 1)
        ]
        ratios.append(shares[0] / max(1, shares[1]))
    assert max(ratios) >= 10


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_unequal_shares_weigh_right(matrix: Matrix, stage: int) -> None:
    np.testing.assert_allclose(matrix.losses(f"z{stage}-skewed"), matrix.losses("one-skewed"), rtol=TOLERANCE)
    np.testing.assert_allclose(
        [line["grad_norm"] for line in matrix.steps(f"z{stage}-skewed")],
        [line["grad_norm"] for line in matrix.steps("one-skewed")],
        rtol=2e-2,
    )


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_warm_process_gives_the_same_bits(matrix: Matrix, stage: int, kind: str) -> None:
    first, again = f"z{stage}-{kind}", f"z{stage}-{kind}-again"
    assert len(matrix.bits(first)) == NUM_STEPS
    assert matrix.bits(again) == matrix.bits(first)
    assert matrix.results[again].eval_loss == matrix.results[first].eval_loss
    before, after = matrix.artifact(first), matrix.artifact(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_failed_trial_is_a_result_on_every_rank(matrix: Matrix, stage: int, kind: str) -> None:
    for result in matrix.every_rank[f"z{stage}-{kind}-failed"]:
        assert result.state == "failed"
        assert "nan" in result.reason.lower() or "inf" in result.reason.lower()


def test_a_loss_that_is_not_finite_at_evaluation_is_told_on_every_rank(matrix: Matrix) -> None:
    for result in matrix.every_rank["z1-blown-at-the-end"]:
        assert (result.state, result.step, result.eval_loss) == ("failed", 1, None)
        assert "the loss on eval became" in result.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_saved_is_whole(matrix: Matrix, stage: int, kind: str) -> None:
    alone, ours = matrix.artifact(f"one-{kind}"), matrix.artifact(f"z{stage}-{kind}")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in alone.items()}
    assert all(tensor.numel() and tensor.float().abs().sum() > 0 for tensor in ours.values())
    for name, tensor in ours.items():
        difference = (tensor.float() - alone[name].float()).norm() / alone[name].float().norm()
        assert difference < 0.1, name


def test_the_record_shows_the_machinery(matrix: Matrix) -> None:
    classes = {1: "BF16_Optimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}
    for name, result in matrix.results.items():
        engine = result.engine
        if name.startswith("one") or result.state == "failed":
            continue
        assert engine is not None
        if engine.executor == "none":
            assert (engine.live_engines, engine.partitioned_bytes) == (0, 0)
            continue
        stage = int(name[1])
        assert (engine.executor, engine.zero_stage, engine.ranks) == ("deepspeed", stage, 2)
        wrapped = stage > 0 and "float32" not in name
        assert not wrapped or engine.engine_class.endswith(f"/{classes[stage]}"), engine.engine_class
        assert engine.live_engines == 1, name
        whole = 12 * engine.trainable_parameters
        share = whole if stage == 0 else whole / 2
        assert share <= engine.partitioned_bytes <= 1.02 * share + 2048, name


def test_a_host_loads_its_base_once(matrix: Matrix) -> None:
    """A process of this test has several hosts, so the counter says how many of them there were."""
    for num_ranks, jobs in matrix.jobs.items():
        for number, job in enumerate(jobs, start=1):
            loads, ordinals = [], []
            for values in job["assignments"]:
                name = values["trial"]["trial_id"] + ("" if values["rung"] == 0 else f"#{values['rung']}")
                engine = matrix.results[name].engine
                if engine is not None:
                    loads.append(engine.base_loads)
                    ordinals.append(engine.ordinal)
            assert set(loads) == {number}, (num_ranks, number)
            assert ordinals == sorted(set(ordinals))


@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_is_bit_identical(matrix: Matrix, stage: int) -> None:
    assert matrix.results[f"z{stage}-resumed"].step == 2
    assert matrix.bits(f"z{stage}-resumed") == matrix.bits(f"z{stage}-lora")
    resumed, straight = matrix.artifact(f"z{stage}-resumed#1"), matrix.artifact(f"z{stage}-lora")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_greedy_answers_agree_under_zero_3(matrix: Matrix) -> None:
    ours, alone = matrix.results["z3-checkpointing"].metrics, matrix.results["one-lora"].metrics
    assert ours["exact_match"] == pytest.approx(alone["exact_match"], abs=0.1)


def test_the_untouched_base_scores_alike_when_partitioned(matrix: Matrix) -> None:
    folder = matrix.folder / "trials" / "z3-none"
    assert matrix.results["z3-none"].checkpoint is None
    with np.load(folder / "eval.npz") as arrays:
        assert arrays["loss_sums"].sum() / arrays["num_tokens"].sum() == pytest.approx(matrix.results["z3-none"].eval_loss)


def test_peft_loads_the_adapter_in_a_fresh_process(matrix: Matrix) -> None:
    script = """
import sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base_folder, adapter, data = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).eval()
assert not any(name.startswith("orchestrator") for name in sys.modules)
arrays = np.load(data)
total = count = 0
for start, end in zip(arrays["offsets"][:-1], arrays["offsets"][1:]):
    ids = torch.from_numpy(arrays["ids"][start:end].astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(arrays["supervised"][start:end])[None], ids, -100)
    with torch.no_grad():
        number = int((labels[:, 1:] != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss.item() * number, count + number
print(total / count)
"""
    adapter = Path(matrix.results["z3-lora"].checkpoint or "") / "adapter"
    done = subprocess.run(
        [sys.executable, "-c", script, str(matrix.folder / "base"), str(adapter), str(matrix.folder / "eval.npz")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    loss, untouched = float(done.stdout.splitlines()[-1]), matrix.results["z3-none"].eval_loss
    assert loss == pytest.approx(matrix.results["z3-lora"].eval_loss, rel=TOLERANCE)
    assert untouched is not None
    assert abs(untouched - loss) > 10 * TOLERANCE * loss, "the adapter must matter for this to prove anything"
