"""Sealed checkpoint folders: safetensors and JSON files, and a manifest of their sizes and SHA-256, written last.

A folder without a manifest is incomplete; one that does not match its manifest is damaged. Neither is ever loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 24  # bytes
_NOT_SEALED = {MANIFEST, f"{MANIFEST}.partial", "README.md"}  # nothing is loaded from a model card

RENAMED = {".way_out.": ".bypass."}  # part of a parameter name in checkpoints of earlier versions: its replacement


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged. The message names the file, what was expected and what it has."""


def current_name(name: str) -> str:
    """Return the current name of a parameter, given its name in a checkpoint, perhaps of an earlier version."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows flushes files only, and through writable handles only."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files that a manifest covers, by relative name: all but itself, the model card and hidden ones.

    Raises:
        CheckpointError: the folder has a link or a device.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: expected a plain file, got a link or device; refused")
        if path.is_file() and name.as_posix() not in _NOT_SEALED:
            found[name.as_posix()] = path
    return found


def _manifest_text(entries: dict[str, Any]) -> bytes:
    return (json.dumps(entries, indent=1) + "\n").encode()


def seal(folder: Path) -> None:
    """Flush every file of `folder` to disk, then write the manifest of their sizes and hashes and flush it."""
    entries = {}
    for name, path in _files(folder).items():
        _fsync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    for path in folder.rglob("*"):
        if path.is_dir():
            _fsync(path)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_bytes(_manifest_text(entries))
    _fsync(partial)
    partial.rename(folder / MANIFEST)
    _fsync(folder)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file that the manifest of `folder` names is there and unchanged.

    Files added after sealing, such as a tokenizer, are not covered. A link is refused wherever it is.
    """
    try:
        _verify(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error


def _verify(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest}: missing; the folder is not a finished checkpoint of this program")
    files = _files(folder)
    expected = _read_manifest(manifest)
    for name, (size, digest) in expected.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{manifest}: {name!r} points outside the checkpoint; refused")
        if name not in files:
            raise CheckpointError(f"{manifest}: {name!r} missing; expected {size} bytes, got no such file")
        path = files[name]
        if (actual := path.stat().st_size) != size:
            raise CheckpointError(f"{path}: expected {size} bytes, got {actual}; the file is truncated or damaged")
        if (found := _sha256(path)) != digest:
            raise CheckpointError(f"{path}: expected SHA-256 {digest}, got {found}; the file is damaged")


def _read_manifest(manifest: Path) -> dict[str, tuple[int, str]]:
    """Map file names to (bytes, SHA-256). Accept only the exact bytes that `seal` writes, to find any changed bit."""
    size = manifest.stat().st_size
    if size > _LARGEST_MANIFEST:
        raise CheckpointError(f"{manifest}: expected at most {_LARGEST_MANIFEST} bytes, got {size}; refused")
    text = manifest.read_bytes()
    try:
        entries = json.loads(text)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        written = _manifest_text({name: {"bytes": int(b), "sha256": str(s)} for name, (b, s) in expected.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{manifest}: expected sizes and SHA-256 of files, got {size} bytes that are not such JSON "
            f"({type(error).__name__}); the file is truncated or damaged"
        ) from error
    if text != written:
        raise CheckpointError(
            f"{manifest}: expected {len(written)} bytes with SHA-256 {hashlib.sha256(written).hexdigest()}, "
            f"got {size} with {hashlib.sha256(text).hexdigest()}; the file is truncated or damaged"
        )
    if not expected:
        raise CheckpointError(f"{manifest}: expected at least 1 file, got 0; the checkpoint is empty")
    return expected


def write_atomically(path: Path, text: str) -> None:
    """Write a file by renaming a complete one, so that `path` never holds a part of the text."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _fsync(partial)
    partial.replace(path)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder. If the block succeeds, seal it and rename it to `folder`; otherwise remove it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        seal(scratch)
        verify(scratch)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        scratch.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def saved_steps(folder: Path) -> dict[int, Path]:
    """Map the step of each ``checkpoint-<step>`` in `folder` to its path."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return {int(step): path for path, step in steps.items() if step.isascii() and step.isdecimal()}


def newest_valid(folder: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest ``checkpoint-<step>`` in `folder` that verifies, or None. Report each damaged one."""
    for _, path in sorted(saved_steps(folder).items(), reverse=True):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            report(f"skipping {path.name}: {error}")
    return None
