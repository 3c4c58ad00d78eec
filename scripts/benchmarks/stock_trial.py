"""One trial of the stock sweep, with Hugging Face's `Trainer` and PEFT. Imported by Ray's workers."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from sweep_points import LORA_ALPHA, LORA_RANK
from transformers import Trainer, TrainerCallback, TrainingArguments

from orchestrator.data import UNSUPERVISED, TokenizedSet

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Every linear layer of a Llama block."""


class Rungs(TrainerCallback):
    """Evaluates and saves at the rungs' steps, and takes the time of the first step."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = set(steps)
        self.first_step_at = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step_at = self.first_step_at or time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            control.should_evaluate = control.should_save = True


class TokenWeighted(Trainer):
    """Trainer, whose own eval loss is a mean over batches; ours counts every supervised token once, and so does this."""

    rungs: Rungs
    rung_steps: list[int]
    reduction_factor: int
    _sums = (0.0, 0)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        answer = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            loss = answer[0] if isinstance(answer, tuple) else answer
            count = int((inputs["labels"][:, 1:] != UNSUPERVISED).sum()) if "labels" in inputs else 0
            self._sums = (self._sums[0] + float(loss) * count, self._sums[1] + count)
        return answer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._sums = (0.0, 0)
        metrics = super().evaluate(*args, **kwargs)
        rung = self.rung_steps.index(self.state.global_step)
        # What Ray's callback reports is the log, all of it.
        self.log(
            {
                "eval_token_loss": self._sums[0] / max(1, self._sums[1]),
                "pace": self.reduction_factor**rung,
                "step": self.state.global_step,
                "first_step_at": self.rungs.first_step_at,
                "finished_at": time.time(),
            }
        )
        return metrics


def train_one(config: dict[str, Any]) -> None:
    """The worker's function, as Ray's and PEFT's documents have it."""
    from ray import train
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder)
        trainer.add_callback(RayTrainReportCallback())
        trainer = prepare_trainer(trainer)
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            trainer.train()
            return
        with checkpoint.as_directory() as saved:
            trainer.train(resume_from_checkpoint=f"{saved}/{RayTrainReportCallback.CHECKPOINT_NAME}")


def make_trainer(config: dict[str, Any], folder: str) -> TokenWeighted:
    """One trial: the base in bf16 with LoRA on the chosen blocks."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    layers, learning_rate = config["point"]
    sets = config["sets"]
    rungs = Rungs(list(sets["rungs"]))
    rows = -(-sets["num_train"] // sets["steps_per_epoch"])
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=sets["rungs"][-1],
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        train_sampling_strategy="group_by_length",
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=config["seed"],
        use_cpu=True,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    trainer = TokenWeighted(
        model=adapted_model(config["base"], layers, config["adapters"]),
        args=arguments,
        train_dataset=as_dataset(TokenizedSet.load(sets["train"])),
        eval_dataset=as_dataset(TokenizedSet.load(sets["eval"])),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        callbacks=[rungs],
    )
    trainer.rungs, trainer.rung_steps, trainer.reduction_factor = rungs, list(sets["rungs"]), sets["reduction_factor"]
    return trainer


def adapted_model(base: str, layers: str, adapters: str = "bfloat16") -> Any:
    """The base with LoRA of PEFT's own making on every linear layer of the last blocks.

    Args:
        adapters: `float32`, PEFT's default, or `bfloat16`: on a CPU a step then takes 0.65x to 0.8x the time (measured here),
            since inputs need not be cast; AdamW then works on bf16 weights, for Trainer keeps no masters.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    num_blocks = model.config.num_hidden_layers
    chosen = None if layers == "all" else list(range(num_blocks - int(layers.removeprefix("last:")), num_blocks))
    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules=LINEARS,  # PEFT refuses its "all-linear" beside layers_to_transform
            layers_to_transform=chosen,
        ),
        autocast_adapter_dtype=adapters == "float32",
    )


def as_dataset(tokens: TokenizedSet) -> Any:
    """Our token ids and masks as Trainer's columns; labels stand at their own token, the model shifts them."""
    from datasets import Dataset

    documents = [tokens.document(index) for index in range(len(tokens))]
    return Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in documents],
            "attention_mask": [[1] * len(ids) for ids, _ in documents],
            "labels": [np.where(supervised, ids, UNSUPERVISED).tolist() for ids, supervised in documents],
            "length": [len(ids) for ids, _ in documents],
        }
    )
