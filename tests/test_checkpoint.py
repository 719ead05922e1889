"""Checkpoint folders: every truncation, bit flip, missing or foreign file is detected and named."""

import json
import os
import random
import re
import shutil

import pytest

from resnet_bk import files
from resnet_bk.checkpoint import MANIFEST, RUN_FILES, CheckpointError, newest_valid, replacing, reseal, seal, verify


@pytest.fixture
def sealed(tmp_path):
    """A small sealed checkpoint. Two of its file names differ in one bit."""
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(random.Random(1).randbytes(300))
    for name in ("config.json", "a.safetensors", "c.safetensors"):
        (folder / name).write_bytes(b"same")
    seal(folder)
    return folder


def refusal(folder):
    """Return the one-line message with which `folder` is refused."""
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_entry(folder, name, entry=None):
    """Add `name` to the manifest."""
    manifest = folder / MANIFEST
    entries = json.loads(manifest.read_text()) | {name: entry or {"bytes": 4, "sha256": "0" * 64}}
    manifest.write_text(json.dumps(entries, indent=1) + "\n")


def test_a_sealed_folder_verifies_and_its_manifest_lists_its_files(sealed):
    verify(sealed)
    entries = json.loads((sealed / MANIFEST).read_text())
    assert {name: entry["bytes"] for name, entry in entries.items()} == {
        "a.safetensors": 4,
        "c.safetensors": 4,
        "config.json": 4,
        "model.safetensors": 300,
    }


def test_sealing_again_covers_changes(sealed):
    (sealed / "a.safetensors").write_bytes(b"other")
    reseal(sealed)
    verify(sealed)


def test_files_added_after_sealing_are_not_damage(sealed):
    (sealed / "README.md").write_text("a model card")
    (sealed / "tokenizer.json").write_text("{}")
    verify(sealed)


def test_model_cards_and_hidden_files_can_be_edited_after_sealing(sealed):
    (sealed / "README.md").write_text("a model card")
    (sealed / ".gitattributes").write_text("")
    seal(sealed)
    (sealed / "README.md").write_text("a longer model card")
    (sealed / ".gitattributes").unlink()
    verify(sealed)


def test_200_truncations_are_all_detected(sealed):
    draw = random.Random(0)
    paths = [path for path in sorted(sealed.rglob("*")) if path.is_file()]
    for _ in range(200):
        path = draw.choice(paths)
        whole = path.read_bytes()
        left = draw.randrange(len(whole))
        path.write_bytes(whole[:left])
        message = refusal(sealed)
        assert message.startswith(f"{path}: expected ")
        assert re.search(rf"got {left}\b", message)
        path.write_bytes(whole)
    verify(sealed)


def test_every_truncation_of_the_manifest_is_detected(sealed):
    manifest = sealed / MANIFEST
    whole = manifest.read_bytes()
    for left in range(len(whole)):
        manifest.write_bytes(whole[:left])
        assert refusal(sealed).startswith(f"{manifest}: expected ")


def fill(folder, weights):
    """Write a model of sorts."""
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_bytes(b"{}")


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_2000_flipped_bits_are_all_detected(sealed):
    draw = random.Random(0)
    paths = [path for path in sorted(sealed.rglob("*")) if path.is_file()]
    for _ in range(2000):
        path = draw.choice(paths)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        message = refusal(sealed)
        assert str(sealed) in message
        assert "expected " in message
        if path.name != MANIFEST:
            assert message.startswith(f"{path}: expected SHA-256 ")
            assert ", got " in message
        flip(path, bit)
    verify(sealed)


def test_a_flip_of_every_third_bit_of_the_manifest_is_detected(sealed):
    manifest = sealed / MANIFEST
    for bit in range(0, 8 * manifest.stat().st_size, 3):
        flip(manifest, bit)
        assert re.search("expected |missing", refusal(sealed))
        flip(manifest, bit)
    verify(sealed)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "..", "/"])
def test_names_outside_the_folder_are_refused(sealed, name):
    (sealed.parent / "secret").write_text("1234")
    with_entry(sealed, name)
    assert refusal(sealed) == f"{sealed / MANIFEST}: {name!r} missing; expected 4 bytes, got no such file"


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", ".", "sub", "\udcff", MANIFEST])
def test_names_that_are_not_a_file_of_the_folder_are_refused(sealed, name):
    with_entry(sealed, name)
    assert "expected 4 bytes, got no such file" in refusal(sealed)


@pytest.mark.parametrize("where", ["a.safetensors", "unlisted", "folder"])
def test_links_are_refused(sealed, tmp_path, where):
    target = tmp_path / "target"
    target.write_bytes(b"same")
    if where == "folder":
        (tmp_path / "elsewhere").mkdir()
        (sealed / "sub").symlink_to(tmp_path / "elsewhere")
    else:
        (sealed / where).unlink(missing_ok=True)
        (sealed / where).symlink_to(target)
    assert "expected a plain file, got a link; refused" in refusal(sealed)


def test_a_pipe_is_refused_without_blocking(sealed):
    (sealed / "a.safetensors").unlink()
    os.mkfifo(sealed / "a.safetensors")
    assert refusal(sealed).startswith(f"{sealed / 'a.safetensors'}: expected a plain file")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"{",
        b'{"a": 5}',
        b'{"a": {}}',
        b'{"a": {"bytes": null, "sha256": ""}}',
        b'{"a": {"bytes": "4", "sha256": 3}}',
        b'{"a": {"bytes": 1' + b"0" * 6000 + b', "sha256": ""}}',
        b"[" * 100_000,
        b"\xff\xfe\x00",
    ],
    ids=range(13),
)
def test_a_malformed_manifest_is_refused(sealed, text):
    (sealed / MANIFEST).write_bytes(text)
    message = refusal(sealed)
    assert message.startswith(f"{sealed / MANIFEST}: expected ")
    assert f"got {len(text)} " in message


def test_an_empty_manifest_is_refused(sealed):
    (sealed / MANIFEST).write_text("{}\n")
    assert refusal(sealed) == f"{sealed / MANIFEST}: expected at least 1 file, got 0; the checkpoint is empty"


def test_a_manifest_too_large_is_not_read(sealed):
    with (sealed / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert refusal(sealed) == f"{sealed / MANIFEST}: expected at most 16777216 bytes, got {1 << 40}; refused"


def test_a_missing_file_is_named(sealed):
    (sealed / "c.safetensors").unlink()
    assert refusal(sealed) == f"{sealed / MANIFEST}: 'c.safetensors' missing; expected 4 bytes, got no such file"


def test_a_folder_without_a_manifest_is_not_a_checkpoint(sealed):
    (sealed / MANIFEST).unlink()
    assert refusal(sealed).startswith(f"{sealed / MANIFEST}: missing; the folder is not a finished checkpoint")


def test_a_folder_that_does_not_exist_or_is_a_file_is_not_a_checkpoint(sealed):
    for path in (sealed / "nowhere", sealed / "a.safetensors"):
        assert refusal(path) == f"{path}: no such checkpoint folder"


def test_a_read_error_is_a_checkpoint_error(sealed, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("resnet_bk.checkpoint._sha256", broken)
    assert refusal(sealed) == f"{sealed / 'a.safetensors'}: cannot be read (Input/output error)"


def test_replacing_makes_a_sealed_folder(tmp_path):
    with replacing(tmp_path / "new" / "model") as scratch:
        fill(scratch, b"first")
        assert not (tmp_path / "new" / "model").exists()
    verify(tmp_path / "new" / "model")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["model"]


def test_replacing_takes_the_place_of_the_old(sealed):
    with replacing(sealed) as scratch:
        fill(scratch, b"second")
        verify(sealed)
    verify(sealed)
    assert sorted(p.name for p in sealed.iterdir()) == ["config.json", MANIFEST, "model.safetensors"]
    assert list(sealed.parent.iterdir()) == [sealed]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_the_old_folder_stays_when_the_block_raises(sealed, error):
    def write():
        with replacing(sealed) as scratch:
            fill(scratch, b"half")
            raise error

    with pytest.raises(error):
        write()
    verify(sealed)
    assert (sealed / "model.safetensors").exists()
    assert list(sealed.parent.iterdir()) == [sealed]


@pytest.mark.parametrize("boundary", range(5))
def test_a_failing_disk_at_any_fsync_leaves_the_old_or_the_new(sealed, monkeypatch, boundary):
    calls, real = [], files.fsync

    def fsync(path):
        calls.append(path)
        if len(calls) == boundary + 1:
            raise OSError(28, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(files, "fsync", fsync)
    try:
        with replacing(sealed) as scratch:
            fill(scratch, b"second")
    except OSError:
        assert len(calls) == boundary + 1
    else:
        assert len(calls) <= boundary
    verify(sealed)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_leaves_the_old(sealed, monkeypatch, fails):
    real, calls = type(sealed).rename, []

    def rename(path, target):
        calls.append(path)
        if len(calls) == fails:
            raise OSError(5, "Input/output error", str(path))
        return real(path, target)

    monkeypatch.setattr(type(sealed), "rename", rename)
    with pytest.raises(OSError, match="Input/output"), replacing(sealed) as scratch:
        fill(scratch, b"second")
    verify(sealed)
    assert (sealed / "model.safetensors").exists()


def test_a_kill_between_the_two_renames_is_repaired_next_time(sealed):
    sealed.rename(sealed.with_name(f".{sealed.name}.old"))

    def write():
        with replacing(sealed):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    verify(sealed)


def test_leftovers_of_a_killed_process_do_not_reach_the_new_folder(sealed):
    leftover = sealed.with_name(f".{sealed.name}.1.partial")
    leftover.mkdir()
    (leftover / "half").write_bytes(b"half")
    with replacing(sealed) as scratch:
        fill(scratch, b"second")
    assert sorted(p.name for p in sealed.iterdir()) == ["config.json", MANIFEST, "model.safetensors"]


def test_the_newest_valid_checkpoint_is_found_past_damaged_ones(sealed):
    runs = sealed.parent
    for step in (9, 100, 1000):
        shutil.copytree(sealed, runs / f"checkpoint-{step}")
    (runs / "checkpoint-1000" / MANIFEST).unlink()
    (runs / "checkpoint-100" / "a.safetensors").write_bytes(b"sbme")
    for other in ("checkpoint-x", "checkpoint-", "checkpoint-\u00b2", "checkpoint-5.partial"):
        (runs / other).mkdir()
    said = []
    assert newest_valid(runs, said.append) == sealed
    assert len(said) == 2
    assert said[0].startswith("skipping checkpoint-1000: ")
    assert said[1].startswith("skipping checkpoint-100: ")
    assert "expected SHA-256" in said[1]


def test_without_a_valid_checkpoint_there_is_none(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-2").write_text("a file")
    said = []
    assert newest_valid(tmp_path, said.append) is None
    assert len(said) == 2
    assert newest_valid(tmp_path / "nowhere", said.append) is None


def test_a_folder_without_weights_is_not_sealed(sealed):
    (sealed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected 'model\.safetensors', got no such file"):
        reseal(sealed)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        reseal(sealed / "nowhere")


def test_a_sealed_folder_without_weights_or_state_is_not_a_checkpoint(sealed):
    verify(sealed)
    with pytest.raises(
        CheckpointError, match=r"expected 'optimizer\.safetensors', got no such file; it is not a complete"
    ):
        verify(sealed, RUN_FILES)
    assert newest_valid(sealed.parent, lambda message: None) == sealed
    assert newest_valid(sealed.parent, lambda message: None, RUN_FILES) is None
    entries = json.loads((sealed / MANIFEST).read_text())
    del entries["model.safetensors"]
    (sealed / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")
    assert "expected 'model.safetensors'" in refusal(sealed)


def test_weights_in_several_files_with_an_index_are_complete(sealed):
    (sealed / "model.safetensors").rename(sealed / "model-00001-of-00001.safetensors")
    (sealed / "model.safetensors.index.json").write_text("{}")
    reseal(sealed)
    verify(sealed)


def test_files_that_people_edit_are_not_covered(sealed):
    for name in ("tokenizer.json", "generation_config.json", "training_args.bin", "chat_template.jinja"):
        (sealed / name).write_text("first")
    (sealed / "checkpoint-5").mkdir()
    (sealed / "checkpoint-5" / "model.safetensors").write_text("of transformers' Trainer")
    reseal(sealed)
    for name in ("tokenizer.json", "generation_config.json", "training_args.bin"):
        (sealed / name).write_text("second, longer")
    shutil.rmtree(sealed / "checkpoint-5")
    verify(sealed)


def test_a_manifest_of_an_earlier_version_covers_tokenizers_that_may_change(sealed):
    (sealed / "tokenizer.json").write_text("{}")
    with_entry(sealed, "tokenizer.json")
    verify(sealed)


def test_a_file_changed_after_sealing_is_told_from_a_damaged_one(sealed):
    later = (sealed / MANIFEST).stat().st_mtime + 60
    (sealed / "config.json").write_bytes(b"longer")
    os.utime(sealed / "config.json", (later, later))
    assert refusal(sealed).endswith(
        "expected 4 bytes, got 6; the file was changed since it was saved; if that was on purpose, run: "
        f"resnet-bk seal {sealed}; otherwise it is damaged"
    )
    reseal(sealed)
    verify(sealed)


def hub_snapshot(sealed, root):
    """Lay the folder out as the cache of huggingface_hub does. Return the snapshot."""
    snapshot = root / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = root / "models--owner--name" / "blobs"
    blobs.mkdir()
    for path in sealed.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_links_of_the_hub_cache_are_followed_and_checked(sealed, tmp_path):
    snapshot = hub_snapshot(sealed, tmp_path)
    verify(snapshot)
    (tmp_path / "linked").symlink_to(snapshot)
    verify(tmp_path / "linked")
    flip((snapshot / "model.safetensors").resolve(), 3)
    assert "expected SHA-256" in refusal(snapshot)


@pytest.mark.parametrize(
    "target", ["../../../secret", "../../blobs/deeper/secret", "/etc/hostname", "../../blobs/none"]
)
def test_links_that_leave_the_hub_cache_are_refused(sealed, tmp_path, target):
    snapshot = hub_snapshot(sealed, tmp_path)
    (tmp_path / "models--owner--name" / "blobs" / "deeper").mkdir()
    for secret in (tmp_path / "secret", tmp_path / "models--owner--name" / "blobs" / "deeper" / "secret"):
        secret.write_bytes(b"same")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    assert "refused" in refusal(snapshot)
