"""Files that are written whole or not at all, and folders that one process at a time may write to."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from resnet_bk import files
from resnet_bk.config import ConfigError


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_whole(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: 1 / 0)  # killed before all of the text is on disk
        with pytest.raises(ZeroDivisionError):
            files.write_whole(path, "new")
    assert path.read_text() == "old"
    files.write_whole(path, "new \u00e9 \udcff")
    assert path.read_bytes() == b"new \xc3\xa9 \xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_the_same_text_is_not_touched(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    files.write_whole(path, "a: 1\n")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    files.write_whole(path, "a: 1\n")


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: 'weights'") as caught, files.writing("weights"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="Input/output error: 'weights'"), files.writing("weights"):
        raise Exception("Error while serializing: IoError(Os error, Input/output error (os error 5))")
    with pytest.raises(ZeroDivisionError), files.writing("weights"):
        _ = 1 / 0


def test_a_folder_is_removed_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_text("")
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: None)  # killed before the first file is gone
    files.remove(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
    monkeypatch.undo()
    (tmp_path / ".results.json.7-0123abcd.partial").write_text("half")
    for name in (".mine", ".film.mkv.partial"):
        (tmp_path / name).write_text("kept")
    files.remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".film.mkv.partial", ".mine"]


def test_a_locked_folder_is_refused_and_left_as_it_was(tmp_path):
    folder = tmp_path / "runs" / "a"
    with files.lock(folder, "train.output_dir"):
        (folder / "config.yaml").write_text("")
        refused = pytest.raises(ConfigError, match=r"^train\.output_dir: .*a is in use by another process")
        with refused, files.lock(folder, "train.output_dir"):
            pytest.fail("locked twice")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    with files.lock(folder, "train.output_dir"):
        pass


def test_a_folder_that_stays_empty_is_removed_if_it_is_new(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "new/deeper"):
        with files.lock(tmp_path / name, "where"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("file", "file/below", "broken"):
        with pytest.raises(ConfigError, match="exists and is not a folder"), files.lock(tmp_path / name, "where"):
            pass


def test_a_lock_is_free_after_a_kill(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from resnet_bk import files\n"
        f"with files.lock(Path({str(tmp_path)!r}), 'where'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use"), files.lock(tmp_path, "where"):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.lock(tmp_path, "where"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock_file", refuse)
    with files.lock(tmp_path, "where"):
        pass
    assert capsys.readouterr().err == f"resnet-bk: {tmp_path}: this file system has no locks; start one process only\n"


def test_an_error_when_the_lock_file_is_closed_is_not_an_error_of_the_run(tmp_path, monkeypatch):
    class Full:
        def close(self):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(files, "_locked", lambda folder, where: Full())
    with files.lock(tmp_path, "output_dir"):
        pass
