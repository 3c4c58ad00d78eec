"""One row of the matrix: a small model of a type, through all that this package does with a base."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from orchestrator.anatomy import ModelAnatomy, read_anatomy, select
from orchestrator.anatomy import learned as learned_module
from orchestrator.anatomy.learning import Answer
from orchestrator.data import build_set
from orchestrator.errors import BaseError, OrchestratorError
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.plan.merge import make_merge_plan
from orchestrator.probe.classes import RefusedError
from orchestrator.probe.learn import answer, learn
from orchestrator.serve.bundle import bundle_config
from orchestrator.serve.loading import serving_class
from orchestrator.serve.merging import merge
from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.spec.tasks import Task
from orchestrator.store import read_jsonl
from orchestrator.train import TrainHost
from orchestrator.train.adapters.artifacts import attach_artifact
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.trial import TrialSpec
from scripts.base_matrix.published import PUBLISHED, SHARDED, group_of
from scripts.base_matrix.tiny import make_tiny, write_shape

STEPS, DOCUMENTS, LORA_RANK = 6, 8, 8
RATES = {"lora": 1e-2, "full": 1e-3}
CLASSES = ("low", "mid", "high")
PROMPT, NEW_TOKENS = tuple(range(20, 28)), 6
LARGE_TOKENS = 1024
DIFFERENCE = 1e-3
"""Largest difference of a logit between the trained and the merged model: rounding of float32."""
FIGURE_SECONDS = 90
EXPERT_ADAPTERS = AdapterOptions(modules=("all", "experts"))

Row = dict[str, Any]


def examine(model_type: str, folder: Path, *, quick: bool = False) -> Row:
    """Return the row of a type. What it refuses is in `refused`, what goes wrong in `fails`.

    Args:
        folder: Empty; the checkpoints and the bundles are written there.
        quick: Without two ranks, and with the memory of one type of each kind.
    """
    started = time.monotonic()
    group = group_of(model_type)
    row: Row = {"type": model_type, "base": PUBLISHED[model_type], "group": group}
    task: Task = "classify" if group == "encoder" else "completion"
    # The class is built here, where torch is imported already. A small model's costs are not needed.
    learned_module.ask = lambda question: Answer(anatomy=learn(question))
    try:
        Examination(model_type, task, folder, row).run(quick=quick)
    except RefusedError as error:
        row["refused"] = error.refusal.what
    except BaseError as error:
        row["refused"] = f"{error.what}; {error.remedy or ''}".strip("; ")
    except Exception as error:
        row["fails"] = f"{row.get('at', '')}: {type(error).__name__}: {str(error).strip()[:300]}"
    return row | {"seconds": round(time.monotonic() - started, 1)}


class Examination:
    """A type's small model, and what was seen of it."""

    def __init__(self, model_type: str, task: Task, folder: Path, row: Row) -> None:
        self.type, self.task, self.folder, self.row = model_type, task, folder, row
        self.base_folder = folder / "base"

    def run(self, *, quick: bool) -> None:
        self._at("small model")
        make_tiny(self.type, self.base_folder, self.task)
        self._at("anatomy")
        self.anatomy = read_anatomy(self.base_folder, need_weights=True, task=self.task)
        self._describe()
        self._write_sets()
        self._train_and_serve()
        for stage in (2, 3) if self.type in SHARDED and not quick else ():
            self._at(f"zero{stage}")
            self.row[f"zero{stage}"] = self._sharded(stage)
        self._attempt("nf4", self._train_nf4)
        if not quick or self.type in SHARDED:
            self._attempt("memory", self._memory)
        del self.row["at"]

    def _at(self, what: str) -> None:
        self.row["at"] = what

    def _attempt(self, what: str, measure: Any) -> None:
        """Keep a figure, or why there is none. Blocks that go from token to token take too long to be counted here."""
        self._at(what)
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(FIGURE_SECONDS)
        try:
            self.row[what] = measure()
        except OrchestratorError as error:
            self.row[what] = {"refused": error.what}
        except Exception as error:
            self.row[what] = {"fails": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        finally:
            signal.alarm(0)

    def _describe(self) -> None:
        anatomy = self.anatomy
        self.row |= {
            "source": anatomy.source,
            "class": anatomy.architecture,
            "kinds": len(set(anatomy.block_kinds)) or 1,
            "experts": anatomy.experts is not None,
            "ways": anatomy.ways.model_dump(exclude={"reasons"}),
            "reasons": anatomy.ways.reasons,
            "logits": {"scale": anatomy.logit_scale, "cap": anatomy.logit_cap},
            "notes": anatomy.notes,
        }

    def _write_sets(self) -> None:
        generator = np.random.default_rng(0)
        lengths = generator.integers(8, 24, size=DOCUMENTS)
        # An ESM has 33 tokens.
        most = min(200, self.anatomy.vocab_size or 200)
        low, span = (5, most - 9) if most < 200 else (20, 160)
        pairs = [((np.arange(n) * 7 + generator.integers(span)) % span + low, np.arange(n) >= n // 2) for n in lengths]
        labels = (np.arange(DOCUMENTS) % len(CLASSES)).tolist() if self.task == "classify" else None
        build_set(pairs, labels=labels).save(self.folder / "train.npz")

    def _load(self, quantize: str = "none") -> BaseLoad:
        classes = {"num_classes": len(CLASSES), "class_names": CLASSES} if self.task == "classify" else {}
        values = {"folder": str(self.base_folder), "model_type": self.anatomy.model_type, "quantize": quantize}
        return BaseLoad.model_validate(values | {"task": self.task} | classes)

    def _execution(self, stage: int | None = None) -> ExecutionPlan:
        ways = self.anatomy.ways
        return ExecutionPlan(
            device="cpu",
            ranks=1 if stage is None else 2,
            threads_per_rank=1,
            executor="torch" if stage is None else "deepspeed",
            zero_stage=stage or 0,  # type: ignore[arg-type]
            dtype="float32",
            row_tokens=32,
            micro_batch_rows=2 if ways.pads else 1,
            pack=ways.packs and self.task != "classify",
            pads=ways.pads,
        )

    def work(self, name: str, tune: Any, execution: ExecutionPlan, *, steps: int = STEPS) -> TrainRung:
        classes = len(CLASSES) if self.task == "classify" else 0
        adapter = EXPERT_ADAPTERS if self.anatomy.experts and tune == "lora" else PLAIN_LORA
        rank = LORA_RANK if tune == "lora" else None
        selection = select(self.anatomy, "all", tune, rank, adapter=adapter, task=self.task, num_classes=classes)
        data = str(self.folder / "train.npz")
        tokens = DOCUMENTS * 24  # all documents in a step
        return TrainRung(
            context=WorkContext(
                settings=TrainSettings(warmup=0.0, schedule="constant", weight_decay=0.0, grad_clip=1.0, tokens_per_step=tokens),
                data=DataPaths(train=data, eval=data),
                metric="loss",
            ),
            trial=TrialSpec(
                trial_id=name,
                number=0,
                control=None,
                layers="all",
                tune=tune,
                learning_rate=RATES[tune],
                lora_rank=rank,
                adapter=adapter,
                total_steps=steps,
                total_tokens=steps * tokens,
                seed=1,
            ),
            selection=selection,
            execution=execution,
            folder=str(self.folder / name),
            stop_step=steps,
        )

    def _trained(self, host: TrainHost, work: TrainRung) -> tuple[list[float], Path]:
        """Return the losses of the steps and the folder of what was saved."""
        result = host.run_trial(work)
        if result.state != "done":
            raise RuntimeError(f"{work.trial.trial_id}: {result.reason}")
        losses = [line["loss"] for line in read_jsonl(Path(work.folder) / "steps.jsonl")]
        return [round(losses[0], 3), round(losses[-1], 3)], Path(result.checkpoint or "")

    def _train_and_serve(self) -> None:
        execution = self._execution()
        self._at("load and self-test")
        host = TrainHost.create(self._load(), self.anatomy, execution, 0, 1, None)
        self.row["self_test"] = host.context.base_test
        try:
            for tune in ("lora", "full"):
                self._at(tune)
                work = self.work(tune, tune, execution)
                losses, saved = self._trained(host, work)
                self.row[tune] = {"losses": losses}
                self._at(f"{tune}, merge")
                self.row[tune] |= self._served(host, saved, tune)
        finally:
            host.close()

    def _served(self, host: TrainHost, saved: Path, tune: str) -> Row:
        """Merge, load with plain transformers and compare."""
        bundle = self.folder / f"bundle-{tune}"
        bundle.mkdir()
        plan = make_merge_plan(self.anatomy, saved, self._load(), self.work(tune, tune, self._execution()).selection)
        merge(plan, bundle)
        config = bundle_config(json.loads((self.base_folder / "config.json").read_bytes()), plan)
        (bundle / "config.json").write_text(json.dumps(config))
        self._at(f"{tune}, served")
        merged = self._load_bundle(bundle)
        base: Any = host.context.base
        ids = torch.tensor([PROMPT])
        with torch.no_grad(), attach_artifact(base, saved) as branch:
            branch.model.eval()
            trained = branch.model(input_ids=ids).logits
            answer_tokens = _greedy(branch.model) if self.task != "classify" else []
            branch.model.train()
        with torch.no_grad():
            difference = float((merged(input_ids=ids).logits - trained).abs().max())
        found: Row = {"difference": difference, "names": self._names(bundle)}
        if self.task != "classify":
            found["generates"] = _generated(merged) == answer_tokens
        return found

    def _load_bundle(self, bundle: Path) -> Any:
        if self.task == "classify":
            kind: Any = AutoModelForSequenceClassification
        else:
            kind = getattr(transformers, serving_class(bundle, "AutoModelForCausalLM"))
        options = {"dtype": torch.float32, "output_loading_info": True, "attn_implementation": None}
        if self.anatomy.ways.attention == "eager":
            options["attn_implementation"] = "eager"
        model, info = kind.from_pretrained(bundle, **{key: value for key, value in options.items() if value is not None})
        if missing := sorted(map(str, info["missing_keys"])):
            raise RuntimeError(f"plain transformers misses {missing[:3]}")
        return model.eval()

    def _names(self, bundle: Path) -> str:
        """Return how the stored names differ from the base's; empty if they do not."""
        before, after = _stored(self.base_folder), _stored(bundle)
        if self.task == "classify":  # another head
            backbone = self.anatomy.blocks_module
            before, after = ({name for name in names if backbone in name} for names in (before, after))
        return ", ".join(
            [*(f"-{name}" for name in sorted(before - after)[:2]), *(f"+{name}" for name in sorted(after - before)[:2])]
        )

    def _sharded(self, stage: int) -> Row:
        from scripts.base_matrix.ranks import train_on_two_ranks

        return train_on_two_ranks(self, stage)

    def _train_nf4(self) -> Row:
        execution = self._execution()
        host = TrainHost.create(self._load("nf4"), self.anatomy, execution, 0, 1, None)
        try:
            return {"losses": self._trained(host, self.work("nf4", "lora", execution, steps=3))[0]}
        finally:
            host.close()

    def _memory(self) -> Row:
        """Compare the plan's memory of the published shape with the allocations of a step."""
        if self.task == "classify":
            return {}
        from scripts.benchmarks.allocations import count_step

        learned_module.ask = answer
        shape = self.folder / "shape"
        shape.mkdir()
        write_shape(self.type, shape, self.task)
        anatomy: ModelAnatomy = read_anatomy(shape, need_weights=False, task=self.task)
        tokens = min(LARGE_TOKENS, anatomy.max_positions or LARGE_TOKENS)
        found: Row = {"blocks": anatomy.num_blocks, "costs_note": anatomy.costs_note}
        for tune, policy in (("lora", "all"), ("full", "last:2")):
            selection = select(anatomy, policy, tune, 16 if tune == "lora" else None, task=self.task)  # type: ignore[arg-type]
            counted = count_step(anatomy, selection, rows=1, row_tokens=tokens, checkpointing=False)
            candidate = Candidate("cuda", 1, "torch", 0, "none", False, tokens)
            planned = estimate(make_footprint(anatomy, selection, "none", 2), candidate).device.allocated_bytes
            found[tune] = round(planned / counted.peak_bytes, 3)
        return found


def _too_long(*_: object) -> None:
    raise TimeoutError(f"longer than {FIGURE_SECONDS} s")


def _stored(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            names |= set(reader.keys())
    return names


def _greedy(model: Any) -> list[int]:
    """Return the likeliest tokens, each computed from all tokens before it."""
    ids = torch.tensor([PROMPT])
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


def _generated(model: Any) -> list[int]:
    """Return what `generate` answers, with its caches."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    answered = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return answered[0, len(PROMPT) :].tolist()
