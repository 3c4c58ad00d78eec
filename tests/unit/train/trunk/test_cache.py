"""Stored hidden states are whole or made again, shared between processes, and within their budget."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from orchestrator.data import TokenizedSet, build_set
from orchestrator.train.adapters.branch import head_name
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.integrity import base_fingerprint
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import objective_of
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk import chunks
from orchestrator.train.trunk.build import TrunkBuilder, trunk_key
from orchestrator.train.trunk.cache import TrunkCache
from orchestrator.train.trunk.chunks import DiskChunks
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.execution import DataPaths, TrunkPlan

ROWS = RowPlan(32, 2, pack=True)
BuildBase = Callable[..., LoadedBase]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * 4 * 40)


@pytest.fixture
def base(llama_folder: Callable[..., Path], base_of: BuildBase) -> LoadedBase:
    return base_of(llama_folder())


def make_set(seed: int = 0) -> TokenizedSet:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(8, 24, size=12)
    return build_set([(generator.integers(3, 90, size=n), np.arange(n) >= n // 2) for n in lengths])


class Shelf:
    """A library on a folder, and the set that it serves."""

    def __init__(self, base: LoadedBase, folder: Path, *, max_bytes: int | None = 10**8, cuts: tuple[int, ...] = (2,)) -> None:
        self.base = base
        self.data = make_set()
        self.objective = objective_of(base, base.model.get_submodule(head_name(base).rpartition(".")[0]), cuts[-1])
        self.notes: list[str] = []
        self.plan = TrunkPlan(cuts=cuts, num_bytes=0, folder=str(folder), max_bytes=max_bytes)
        self.library = TrunkLibrary(base, base_fingerprint(base.model), Ranks(), lambda path: self.data)

    def open(self) -> None:
        data = DataPaths(train="train", eval="train")
        self.library.open(self.plan, data, ROWS, self.objective, partitioned=False, note=self.notes.append)

    def loss(self) -> float:
        (batch, *_) = ROWS.batches(self.data, np.arange(4))
        trunk = self.library.states("train", self.plan.cuts[-1])
        with torch.no_grad():
            return self.objective(**to_tensors(batch, torch.device("cpu"), trunk)).item()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each forward pass of a builder was for."""
    made: list[int] = []
    compute = TrunkBuilder._compute

    def counted(self: TrunkBuilder, data: TokenizedSet, documents: np.ndarray, cuts: list[int]) -> dict[int, torch.Tensor]:
        made.append(len(documents))
        return compute(self, data, documents, cuts)

    monkeypatch.setattr(TrunkBuilder, "_compute", counted)
    return made


def pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/chunk-*.bin"))


def test_a_later_sweep_computes_nothing(base: LoadedBase, tmp_path: Path, computed: list[int]) -> None:
    first, later = Shelf(base, tmp_path, cuts=(1, 2)), Shelf(base, tmp_path, cuts=(1, 2))
    first.open()
    assert sum(computed) == len(first.data)
    assert len(pieces(tmp_path)) == 2 * len(computed) > 2
    computed.clear()
    later.open()
    assert computed == []
    assert later.loss() == first.loss()


@pytest.mark.parametrize("damage", ["flipped", "cut short", "gone"])
def test_a_damaged_piece_is_made_again(base: LoadedBase, tmp_path: Path, computed: list[int], damage: str) -> None:
    first = Shelf(base, tmp_path)
    first.open()
    file = pieces(tmp_path)[1]
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if damage == "cut short" else bytes([whole[0] ^ 1]) + whole[1:])
    before, expected = len(computed), first.loss()
    later = Shelf(base, tmp_path)
    later.open()
    assert len(computed) == before + 1
    assert file.read_bytes() == whole
    assert later.loss() == expected


def test_a_changed_entry_with_its_checksum_changes_the_loss(base: LoadedBase, tmp_path: Path) -> None:
    """So what is stored is really what is trained on."""
    first = Shelf(base, tmp_path)
    first.open()
    file, before = pieces(tmp_path)[0], first.loss()
    numbers = np.frombuffer(file.read_bytes()[:-8], dtype=np.float32) * np.float32(1.5)
    file.write_bytes(numbers.tobytes() + struct.pack("<Q", zlib.crc32(numbers.tobytes())))
    later = Shelf(base, tmp_path)
    later.open()
    assert abs(later.loss() - before) > 1e-3


def test_the_key_is_all_that_decides_the_numbers(base: LoadedBase) -> None:
    marks, data = base_fingerprint(base.model), make_set()
    key = trunk_key(base, marks, data, 2, ROWS)
    other_mask = build_set([(data.document(d)[0], np.ones(data.lengths[d], bool)) for d in range(len(data))])
    last, first = "model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert trunk_key(base, marks, other_mask, 2, ROWS) == key
    assert trunk_key(base, {**marks, last: "other"}, data, 2, ROWS) == key
    assert trunk_key(base, {**marks, first: "other"}, data, 2, ROWS) != key
    assert trunk_key(base, marks, data, 3, ROWS) != key
    assert trunk_key(base, marks, make_set(1), 2, ROWS) != key


def test_the_least_recently_used_goes_first_and_never_what_is_open(tmp_path: Path) -> None:
    first, second = TrunkCache(tmp_path, 250), TrunkCache(tmp_path, 250)
    assert first.open("a", 100) is not None
    assert first.open("b", 100) is not None
    assert second.open("c", 100) is None  # both are open
    first.close()
    assert second.open("c", 100) is not None
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"b", "c"}
    assert second.open("d", 300) is None


def test_without_room_on_disk_the_memory_keeps_it(base: LoadedBase, tmp_path: Path) -> None:
    shelf, roomy = Shelf(base, tmp_path / "small", max_bytes=10), Shelf(base, tmp_path / "large")
    shelf.open()
    roomy.open()
    assert pieces(tmp_path / "small") == []
    assert shelf.notes == ["1 of 1 stored trunks have no room on disk and are kept in memory"]
    assert shelf.loss() == roomy.loss()


def test_what_cannot_be_written_stays_in_memory(
    base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    """A disk that fills up under the cache costs the next process its work, and this one nothing."""
    roomy = Shelf(base, tmp_path / "roomy")
    roomy.open()
    computed.clear()

    def full(file: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chunks, "write_atomic", full)
    shelf = Shelf(base, tmp_path / "full")
    shelf.open()
    assert pieces(tmp_path / "full") == []
    assert sum(computed) == len(shelf.data)
    assert shelf.loss() == roomy.loss()


class TwoMachines(Ranks):
    """One of two ranks; the pieces that the other one misses are known beforehand."""

    others: ClassVar[set[int]] = set()

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others]


def test_ranks_of_a_partitioned_base_compute_what_any_of_them_misses(
    base: LoadedBase, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With disks of their own they may miss different pieces; both run the same passes, and keep what they miss themselves."""
    shelf = Shelf(base, tmp_path)
    shelf.open()
    files, expected = pieces(tmp_path), shelf.loss()
    before = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    computed.clear()
    monkeypatch.setattr(TwoMachines, "others", {0, 2})
    builder = TrunkBuilder(base, shelf.objective, ROWS, TwoMachines(), partitioned=True)
    states = builder.build(shelf.data, {2: DiskChunks(files[0].parent, base.anatomy.hidden_size, base.dtype)})[2]
    assert len(computed) == 2
    after = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [number != 2 for number in range(len(files))]
    (batch, *_) = ROWS.batches(shelf.data, np.arange(4))
    with torch.no_grad():
        assert shelf.objective(**to_tensors(batch, torch.device("cpu"), states)).item() == expected


BUILD = """
import sys
from pathlib import Path
import numpy as np, torch
from orchestrator.anatomy import read_anatomy
from orchestrator.data import TokenizedSet
from orchestrator.work.execution import BaseLoad, DataPaths, TrunkPlan
from orchestrator.train.model.base import load_base
from orchestrator.train.batches import RowPlan
from orchestrator.train.integrity import base_fingerprint
from orchestrator.train.ranks import Ranks
from orchestrator.train.model.objective import objective_of
from orchestrator.train.trunk import build, chunks
from orchestrator.train.trunk.library import TrunkLibrary

folder, data_file, cache, meeting = sys.argv[1:]
chunks.CHUNK_BYTES = 64 * 4 * 40
compute, made = build.TrunkBuilder._compute, []
def counted(self, data, documents, cuts):
    made.append(len(documents))
    return compute(self, data, documents, cuts)
build.TrunkBuilder._compute = counted
anatomy = read_anatomy(Path(folder), need_weights=True)
load = BaseLoad(folder=folder, model_type="llama", quantize="none", task="completion")
base = load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu"))
library = TrunkLibrary(base, base_fingerprint(base.model), Ranks(), lambda path: TokenizedSet.load(path))
objective = objective_of(base, base.model.lm_head, 2)
print("ready", flush=True)
sys.stdin.readline()
plan = TrunkPlan(cuts=(2,), num_bytes=0, folder=cache, max_bytes=10**8)
rows = RowPlan(32, 2, True)
library.open(plan, DataPaths(train=data_file, eval=data_file), rows, objective, partitioned=False, note=print)
states = library.states(data_file, 2)
print(sum(made), sum(piece.double().sum().item() for piece in states.pieces).hex(), flush=True)
"""


def test_two_processes_share_the_work(llama_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = make_set()
    data.save(tmp_path / "set.npz")
    command = [sys.executable, "-c", BUILD, str(llama_folder()), str(tmp_path / "set.npz"), str(tmp_path / "cache"), ""]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].split() for process in both]
    assert sum(int(made) for made, _ in answers) == len(data)
    assert answers[0][1] == answers[1][1]
