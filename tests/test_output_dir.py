"""The output directory: whole or not at all, and never over something else."""

import errno
import os
from pathlib import Path

import pytest

from bitnet_export import output_dir
from bitnet_export.errors import StageError, UsageError
from bitnet_export.output_dir import check_replaceable, staged


def old_export(path):
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (path / "old").write_text("old")
    return path


def fail(work, error):
    (work / "half").write_text("x")
    raise error


def contents(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "a" / "b"
    with staged(out, overwrite=False) as work:
        (work / "model.onnx").write_text("x")
        assert not out.exists()
        assert work.parent == out.parent
    assert contents(tmp_path) == ["a", "a/b", "a/b/model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_fails(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "a" / "b", overwrite=False) as work:
        fail(work, error)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_earlier_export_stays_when_the_block_fails(tmp_path, error):
    out = old_export(tmp_path / "out")
    with pytest.raises(error), staged(out, overwrite=True):
        raise error
    assert contents(tmp_path) == ["out", "out/manifest.json", "out/old"]


def test_force_replaces_an_earlier_export(tmp_path):
    out = old_export(tmp_path / "out")
    with staged(out, overwrite=True) as work:
        (work / "new").write_text("x")
    assert contents(tmp_path) == ["out", "out/new"]


def test_an_earlier_export_needs_force(tmp_path):
    out = old_export(tmp_path / "out")
    with pytest.raises(UsageError, match="holds an earlier export") as caught:
        check_replaceable(out, overwrite=False)
    assert "--force" in caught.value.fix


@pytest.mark.parametrize("overwrite", [True, False])
def test_foreign_directories_and_files_are_never_replaced(tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name, what in (
        ("photos", "no export wrote it"),
        ("file", "is a file"),
        ("broken", "is a file"),
    ):
        with pytest.raises(UsageError, match=what):
            check_replaceable(tmp_path / name, overwrite)


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=False) as work:
        (work / "new").write_text("x")
    assert contents(tmp_path) == ["out", "out/new"]


def test_of_a_link_the_target_is_replaced(tmp_path):
    real = old_export(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    with staged(link, overwrite=True) as work:
        (work / "new").write_text("x")
    assert link.is_symlink()
    assert contents(link) == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", full_disk)
    with (
        pytest.raises(StageError, match="cannot be written: No space left"),
        staged(tmp_path / "out", overwrite=False),
    ):
        raise AssertionError("not reached")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StageError, match="cannot be written"),
        staged(tmp_path / "file" / "out", overwrite=False),
    ):
        raise AssertionError("not reached")


def test_the_old_directory_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    out = old_export(tmp_path / "out")
    rename, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            full_disk()
        rename(source, target)

    monkeypatch.setattr(output_dir.os, "replace", second_fails)
    with pytest.raises(StageError, match="No space left"), staged(out, overwrite=True) as work:
        (work / "new").write_text("x")
    assert contents(tmp_path) == ["out", "out/manifest.json", "out/old"]
