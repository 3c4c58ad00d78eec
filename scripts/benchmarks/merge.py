"""Merge of a made model against plainly copying its bytes.

    scripts/bench merge [--gigabytes 1.1] [--quantize nf4] [--folder DIR] [--json]

Prints the peak anonymous memory beside its bound (three of the largest tensors plus 0.5 GB) and the time beside its
bound (1.5 times reading, hashing, writing and syncing the same bytes).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MEMORY_TENSORS, MEMORY_BYTES, TIME_RATIO = 3, 500_000_000, 1.5
PIECE = 16 << 20


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    if options.worker:
        print(json.dumps(_measure_merge(Path(options.folder), options.quantize)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _make(folder, options)
        copies, merges = [], []
        for _ in range(options.rounds):
            copies.append(_measure_copy(folder))
            merges.append(_run_worker(folder, options))
    best = min(merges, key=lambda merge: merge["seconds"])
    bound_bytes = MEMORY_TENSORS * best["largest_tensor_bytes"] + MEMORY_BYTES
    result = {
        "num_bytes": best["num_bytes"],
        "quantize": options.quantize,
        "merge_seconds": best["seconds"],
        "copy_seconds": min(copies),
        "time_ratio": best["seconds"] / min(copies),
        "time_ratio_bound": TIME_RATIO,
        "peak_bytes": max(merge["peak_bytes"] for merge in merges),
        "idle_bytes": best["idle_bytes"],
        "largest_tensor_bytes": best["largest_tensor_bytes"],
        "peak_bytes_bound": bound_bytes,
    }
    print(json.dumps(result) if options.json else _text(result))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench merge", description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.1, help="size of the made model")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help="how training held the base")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many is printed")
    parser.add_argument("--folder", default=None, help="where the model is made; a disk, not a memory file system")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _make(folder: Path, options: argparse.Namespace) -> None:
    """A Llama of about the wanted size in shards, and a rank-16 adapter on every matrix of its blocks."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocab = options.hidden, options.hidden * 11 // 4, 32000 * options.hidden // 2048
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    block_bytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    num_blocks = max(1, round((options.gigabytes * 1e9 - 2 * vocab * hidden) / block_bytes))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inner, hidden, generator=generator).mul_(0.02).bfloat16().reshape(-1)
    adapter, weight_map = {}, {}
    base = folder / "base"
    (folder / "rung" / "adapter").mkdir(parents=True)
    base.mkdir()

    def save(file: str, tensors: dict) -> None:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, base / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    embeddings = torch.randn(vocab, hidden, generator=generator).mul_(0.02).bfloat16()
    save("model-0.safetensors", {"model.embed_tokens.weight": embeddings, "model.norm.weight": noise[:hidden]})
    for number in range(num_blocks):
        prefix = f"model.layers.{number}."
        block = {f"{prefix}{norm}.weight": noise[:hidden] for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, (rows, columns) in shapes.items():
            block[f"{prefix}{name}.weight"] = noise[: rows * columns].reshape(rows, columns)
            key = f"base_model.model.{prefix}{name}.lora_"
            adapter[f"{key}A.weight"] = torch.randn(16, columns, generator=generator) * 0.01
            adapter[f"{key}B.weight"] = torch.randn(rows, 16, generator=generator) * 0.01
        save(f"model-{number + 1}.safetensors", block)
    save_file(adapter, folder / "rung" / "adapter" / "adapter_model.safetensors")
    (folder / "rung" / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 32}))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config))


def _measure_copy(folder: Path) -> float:
    """Seconds to read, hash, write and sync the base's bytes, one after the other."""
    target = folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.sync()
    started = time.monotonic()
    for source in sorted((folder / "base").glob("*.safetensors")):
        digest = hashlib.sha256()
        with source.open("rb", buffering=0) as reader, (target / source.name).open("wb", buffering=0) as writer:
            while piece := reader.read(PIECE):
                digest.update(piece)
                writer.write(piece)
            os.fsync(writer.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _run_worker(folder: Path, options: argparse.Namespace) -> dict:
    """The merge in a process of its own, which watches its own memory."""
    command = [sys.executable, __file__, "--worker", "--folder", str(folder), "--quantize", options.quantize]
    os.sync()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_merge(folder: Path, quantize: str) -> dict:
    from orchestrator.anatomy import read_anatomy
    from orchestrator.plan.merge import make_merge_plan
    from orchestrator.serve.merging import merge
    from orchestrator.work.execution import BaseLoad

    target = folder / "merged"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    anatomy = read_anatomy(folder / "base", need_weights=True)
    load = BaseLoad.model_validate({"folder": anatomy.folder, "model_type": "llama", "quantize": quantize, "task": "completion"})
    plan = make_merge_plan(anatomy, folder / "rung", load)
    idle_bytes = anonymous_bytes()
    with PeakMemory() as peak:
        record = merge(plan, target)
    shutil.rmtree(target)
    return {
        "seconds": record.seconds,
        "num_bytes": record.num_bytes,
        "peak_bytes": peak.num_bytes,
        "idle_bytes": idle_bytes,
        "largest_tensor_bytes": plan.largest_tensor_bytes,
    }


def anonymous_bytes() -> int:
    """This process's resident anonymous memory: what is its own, not the page cache's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class PeakMemory:
    """The largest anonymous memory seen while the context lasts, looked at every few milliseconds."""

    num_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.003):
            self.num_bytes = max(self.num_bytes, anonymous_bytes())


def _text(result: dict) -> str:
    def gigabytes(num_bytes: float) -> str:
        return f"{num_bytes / 1e9:.2f} GB"

    return "\n".join(
        [
            f"merge   {gigabytes(result['num_bytes'])}, base held as {result['quantize']}, lora r16 on every block",
            f"memory  {gigabytes(result['peak_bytes'])} anonymous at most (before the merge {gigabytes(result['idle_bytes'])}), "
            f"bound {gigabytes(result['peak_bytes_bound'])} = 3 x {gigabytes(result['largest_tensor_bytes'])} + 0.50 GB",
            f"time    {result['merge_seconds']:.2f} s, copying the same bytes {result['copy_seconds']:.2f} s: "
            f"{result['time_ratio']:.2f}x, bound {result['time_ratio_bound']}x",
        ]
    )


if __name__ == "__main__":
    main()
