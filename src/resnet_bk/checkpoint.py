"""Checkpoint folders that say what they should contain: safetensors and JSON, a SHA-256 manifest written last.

A folder without a manifest, or with one that does not match, was not finished or was damaged; nothing is read from it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or damaged: names the file, what was expected and what is there."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Flush every file of `folder` to the disk, then write the manifest of their sizes and hashes, then flush that."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _fsync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(entries, indent=1) + "\n")
    _fsync(partial)
    partial.rename(folder / MANIFEST)
    _fsync(folder)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of `folder` is the one its manifest names."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest}: missing; the folder is no finished checkpoint of this program")
    try:
        entries = json.loads(manifest.read_bytes())
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: not a manifest ({type(error).__name__}); the file is damaged") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise CheckpointError(f"{manifest}: {name!r} points outside the checkpoint; refused")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; expected {size} bytes")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: expected {size} bytes, got {path.stat().st_size}; the file is truncated or damaged")
        if (actual := _sha256(path)) != digest:
            raise CheckpointError(f"{path}: expected SHA-256 {digest}, got {actual}; the file is damaged")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder`, sealed and in one rename, when the block ends well; else it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        seal(scratch)
        verify(scratch)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            scratch.rename(folder)
            shutil.rmtree(old)
        else:
            scratch.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def newest_valid(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest ``checkpoint-<step>`` in `folder` that verifies; each one that does not is reported and passed over."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda p: -int(p.name.removeprefix("checkpoint-"))):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            report(f"passing over {path.name}: {error}")
    return None
