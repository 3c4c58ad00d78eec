"""Committed folders: old or new, never half; and checked against their manifests."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store import Manifest, check_folder, commit_folder, read_manifest, recover_folder, restore_folder


def write(final: Path, version: str) -> None:
    with commit_folder(final) as folder:
        (folder / "weights").write_text(version * 100)
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "state.json").write_text(version)


def version_of(final: Path) -> str:
    check_folder(final)
    weights, state = (final / "weights").read_text(), (final / "deep" / "er" / "state.json").read_text()
    assert weights == state * 100, "a mixture of two versions"
    return state


def litter(final: Path) -> list[str]:
    return [entry.name for entry in final.parent.iterdir() if entry != final]


def test_what_was_committed_is_checked_and_complete(tmp_path: Path) -> None:
    final = tmp_path / "rung-0"
    with commit_folder(final, about={"step": 3}) as folder:
        assert folder.parent == final.parent
        (folder / "weights").write_bytes(b"abc")
        assert not final.exists()
    manifest = check_folder(final)
    assert [(file.path, file.num_bytes) for file in manifest.files] == [("weights", 3)]
    assert manifest.files[0].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.about == {"step": 3}
    assert manifest.num_bytes == 3
    assert litter(final) == []


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    write(final, "a")
    with pytest.raises(FileNotFoundError), commit_folder(final) as folder:
        (folder / "no" / "such" / "folder").write_text("half")
    assert version_of(final) == "a"
    assert litter(final) == []


def test_a_writer_killed_anywhere_leaves_the_old_folder_or_the_new_one(tmp_path: Path, killed_everywhere) -> None:
    final = tmp_path / "bundle"

    def reset() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(final, "a")

    seen = []
    for where in killed_everywhere(lambda: write(final, "b"), reset):
        try:
            seen.append(version_of(final))
        except IntegrityError as error:
            raise AssertionError(where) from error
        recover_folder(final)
        assert litter(final) == [], where
        assert version_of(final) == seen[-1], where
        write(final, "c")
        assert version_of(final) == "c", where
    assert {"a", "b"} == set(seen)


def test_a_writer_killed_anywhere_leaves_no_first_folder_or_a_whole_one(tmp_path: Path, killed_everywhere) -> None:
    final = tmp_path / "bundle"

    def reset() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()

    seen = set()
    for where in killed_everywhere(lambda: write(final, "a"), reset):
        restore_folder(final)
        seen.add(final.exists())
        assert not final.exists() or version_of(final) == "a", where
    assert seen == {True, False}


def test_a_reader_that_restores_in_the_exchange_does_not_disturb_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "bundle"
    write(final, "a")
    rename, disturbed = Path.rename, []

    def rename_with_a_reader_between(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if self == final and not disturbed:
            disturbed.append(self)
            assert version_of(final) == "a"
        return result

    monkeypatch.setattr(Path, "rename", rename_with_a_reader_between)
    write(final, "b")
    assert disturbed
    assert version_of(final) == "b"
    assert litter(final) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights").write_text("a" * 99), "99 bytes"),
        (lambda f: (f / "weights").write_text("a" * 99 + "b"), "content changed"),
        (lambda f: (f / "deep" / "er" / "state.json").unlink(), "missing"),
        (lambda f: (f / "deep" / "more").write_text("x"), "does not list"),
        (lambda f: (f / "manifest.json").unlink(), "the folder is incomplete"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text('{"files": 3}'), "damaged manifest"),
        (lambda f: os.truncate(f / "manifest.json", 80), "not valid JSON"),
        (lambda f: shutil.rmtree(f), "no such folder"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage, message: str) -> None:
    final = tmp_path / "bundle"
    write(final, "a")
    check_folder(final)
    damage(final)
    with pytest.raises(IntegrityError, match=message) as caught:
        check_folder(final)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.remedy


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    write(final, "a")
    content = (final / "weights").read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        (final / "weights").write_bytes(bytes(changed))
        with pytest.raises(IntegrityError):
            check_folder(final)
    (final / "weights").write_bytes(content)
    check_folder(final)


def test_hashes_that_the_writer_knows_are_believed_and_later_checked(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    with commit_folder(final, known_sha256={"weights": "0" * 64}) as folder:
        (folder / "weights").write_text("abc")
        (folder / "other").write_text("abc")
    hashes = {file.path: file.sha256 for file in read_manifest(final).files}
    assert hashes["weights"] == "0" * 64
    assert hashes["other"].startswith("ba7816bf")
    with pytest.raises(IntegrityError, match="content changed"):
        check_folder(final)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    write(final, "a")
    plain = json.loads((final / "manifest.json").read_text())
    assert Manifest.model_validate(plain) == read_manifest(final)
    assert {file["path"] for file in plain["files"]} == {"weights", "deep/er/state.json"}


def test_leftovers_of_a_folder_with_a_similar_name_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".rung-[1].partial-1234").mkdir()
    (tmp_path / ".rung-1.partial-1234").mkdir()
    recover_folder(tmp_path / "rung-[1]")
    assert [entry.name for entry in tmp_path.iterdir()] == [".rung-1.partial-1234"]
