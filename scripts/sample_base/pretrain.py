"""Pretrains the embedded sample base on one CPU core and writes its folder, card and retention sample.

    scripts/build_sample_base --speeches inaugural.jsonl state_union.jsonl

The same texts, Python version and options give the same tokenizer, the same rows in the same order and, on the same
hardware, the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.sample_base import card, corpus
from scripts.sample_base.tokens import VOCABULARY_SIZE, train_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "orchestrator" / "samples"
ROW_TOKENS = 512  # rows as long as the position range, so that every position has been trained
MIN_LEARNING_RATE_SHARE = 0.02


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the text. The schedule spans `steps`; training ends at `stop_after`."""

    steps: int
    stop_after: int
    rows_per_step: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    seed: int
    save_every_steps: int


def build_model() -> LlamaForCausalLM:
    """3.3 million parameters; every width is a multiple of 64, the block size of nf4."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    # A narrow model needs larger weights than the default 0.02: with it, attention stays flat for a long time. What is
    # added to the residual stream is scaled by depth, as in GPT-2 (Radford et al., 2019).
    depth_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, matrix in model.model.layers.named_parameters():
            if matrix.ndim == 2:
                is_added = name.endswith(("o_proj.weight", "down_proj.weight"))
                matrix.normal_(std=matrix.shape[1] ** -0.5 * (depth_scale if is_added else 1.0))
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """One id tensor per document, between bos and eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(texts, verbose=False)["input_ids"]  # verbose: documents longer than a row are expected
    return [torch.tensor([bos, *ids, eos]) for ids in encoded]


def batches(documents: list[torch.Tensor], rows_per_step: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [rows, ROW_TOKENS] batches; each epoch joins the documents in a new order, so rows are cut elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[index] for index in order])
        rows = stream[: len(stream) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        yield from rows.split(rows_per_step)[: len(rows) // rows_per_step]


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a small share of the peak."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return MIN_LEARNING_RATE_SHARE + (1 - MIN_LEARNING_RATE_SHARE) * cosine


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, documents: list[torch.Tensor]) -> float:
    """Nats per token over all documents, each read in rows of ROW_TOKENS with nothing carried from row to row."""
    model.eval()
    total_nats, num_tokens = 0.0, 0
    for document in documents:
        for row in document.split(ROW_TOKENS):
            if len(row) > 1:
                total_nats += model(input_ids=row[None], labels=row[None]).loss.item() * (len(row) - 1)
                num_tokens += len(row) - 1
    model.train()
    return total_nats / num_tokens


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A bf16 copy in Hugging Face's layout; the weights that learn stay in fp32."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: corpus.Corpus, recipe: Recipe, folder: Path) -> int:
    """Trains in place, leaves a usable folder every `save_every_steps`, returns the tokens in one epoch."""
    documents = encode(tokenizer, text.train)
    heldout_sample = [document[: 2 * ROW_TOKENS] for document in encode(tokenizer, list(text.heldout))]
    epoch_tokens, step_tokens = sum(map(len, documents)), recipe.rows_per_step * ROW_TOKENS
    print(
        f"{recipe.rows_per_step} rows x {ROW_TOKENS} tokens = {step_tokens} tokens a step; {recipe.stop_after} steps = "
        f"{recipe.stop_after * step_tokens / epoch_tokens:.1f} epochs of {epoch_tokens} tokens",
        flush=True,
    )
    optimizer = build_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, recipe))
    started_s = time.process_time()
    rows_of_steps = batches(documents, recipe.rows_per_step, recipe.seed)
    for step in range(1, recipe.stop_after + 1):
        rows = next(rows_of_steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a third faster; weights and optimizer stay in fp32
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {(time.process_time() - started_s) / 60:.2f} CPU minutes", flush=True)
        if step % recipe.save_every_steps == 0:
            save(model, tokenizer, folder)
            print(f"step {step} held-out {heldout_loss(model, heldout_sample):.4f}, saved", flush=True)
    return epoch_tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeches", type=Path, nargs="+", required=True, help='JSON-lines files of {"text"} rows')
    parser.add_argument("--out", type=Path, default=SAMPLES / "base", help="the base's folder")
    parser.add_argument(
        "--retain", type=Path, default=SAMPLES / "data" / "retain.jsonl", help="where excerpts of the held-out speeches go"
    )
    parser.add_argument("--steps", type=int, default=2000, help="the length of the learning rate schedule")
    parser.add_argument("--stop-after", type=int, help="end after so many steps of the schedule; default: all of them")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    recipe = Recipe(
        steps=arguments.steps,
        stop_after=arguments.steps if arguments.stop_after is None else arguments.stop_after,
        rows_per_step=arguments.rows_per_step,
        learning_rate=arguments.learning_rate,
        warmup_steps=100,
        weight_decay=0.1,
        seed=arguments.seed,
        save_every_steps=200,
    )
    text = corpus.collect(arguments.speeches, arguments.seed)
    tokenizer = train_tokenizer(text.train, ROW_TOKENS)
    arguments.retain.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": row}, ensure_ascii=False) for row in corpus.retention_rows(text)]
    arguments.retain.write_text("\n".join(rows) + "\n", encoding="utf-8")

    started_s = time.process_time()
    model = build_model()
    epoch_tokens = train(model, tokenizer, text, recipe, arguments.out)
    cpu_minutes = (time.process_time() - started_s) / 60
    save(model, tokenizer, arguments.out)

    # Measured on what was written, not on what was in memory.
    stored = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    loss = heldout_loss(stored, encode(tokenizer, list(text.heldout)))
    facts = card.Facts(
        num_parameters=stored.num_parameters(),
        steps=recipe.stop_after,
        schedule_steps=recipe.steps,
        seed=recipe.seed,
        cpu_minutes=cpu_minutes,
        learning_rate=recipe.learning_rate,
        step_tokens=recipe.rows_per_step * ROW_TOKENS,
        epoch_tokens=epoch_tokens,
        heldout_loss=loss,
        heldout_tokens=sum(map(len, encode(tokenizer, list(text.heldout)))),
    )
    (arguments.out / "README.md").write_text(card.render(facts, text), encoding="utf-8")
    print(f"held-out loss {loss:.4f} nats per token after {cpu_minutes:.1f} CPU minutes", flush=True)


if __name__ == "__main__":
    main()
