"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporter.files import disk_full, folder_in_progress, put_in_place, save_tensors, sha256, written_whole


def test_a_file_takes_its_place_by_a_rename_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with written_whole(path) as temporary:
        temporary.write_bytes(b"all of it")
        inode = temporary.stat().st_ino
        assert not path.exists()
    assert path.stat().st_ino == inode  # moved, not copied: there is no moment at which half of it is there
    assert [item.name for item in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_fails_on_the_way_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), written_whole(path) as temporary:
        temporary.write_bytes(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_folder_replaces_the_one_that_stood_there_and_what_is_left_in_progress_goes(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    for content in ("first", "second"):
        with folder_in_progress(tmp_path, "bundle") as folder:
            (folder / "file").write_text(content)
            put_in_place(folder, place)
    assert (place / "file").read_text() == "second"
    with pytest.raises(KeyboardInterrupt), folder_in_progress(tmp_path, "bundle") as folder:
        (folder / "file").write_text("third")
        raise KeyboardInterrupt
    assert (place / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    place.mkdir()
    (place / "file").write_text("first")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "absent", place)
    assert (place / "file").read_text() == "first"


def test_tensors_and_digests_are_what_others_make_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    tensors = {"a": torch.arange(5), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    save_tensors(path, tensors, metadata={"x": "y"})
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o644


def test_only_a_disk_that_is_full_is_told_as_one() -> None:
    full = disk_full(OSError(errno.ENOSPC, "No space left on device", "weights.bin"))
    assert full is not None
    assert str(full) == "the disk is full while writing weights.bin"
    assert disk_full(PermissionError(errno.EACCES, "Permission denied", "weights.bin")) is None
