"""Sealed checkpoint folders: safetensors and JSON files, and a manifest of their sizes and SHA-256, written last.

A folder without a manifest is incomplete; one that does not match its manifest is damaged. Neither is ever loaded.

The manifest covers the files that nobody edits. A tokenizer, a generation configuration or a model card may change.
"""

import contextlib
import fnmatch
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from resnet_bk import files

MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER, ELAPSED, STATE = "model.safetensors", "optimizer.safetensors", "elapsed.json", "trainer_state.json"
MODEL_FILES = ("config.json", WEIGHTS)
RUN_FILES = (*MODEL_FILES, OPTIMIZER, ELAPSED, STATE)  # what a run needs to resume
_COVERED = ("*.safetensors", "*.safetensors.index.json", "config.json", ELAPSED, STATE, "tokens.bin", "index.json")
_LARGEST_MANIFEST = 1 << 24  # bytes

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


def _is_covered(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _COVERED)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files in `folder` by name, without hidden ones and the manifest.

    Raises:
        CheckpointError: the folder has a device, a pipe, or a link that is not one of the Hugging Face cache.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not _is_in_hub_cache(path):
            raise CheckpointError(f"{path}: expected a plain file, got a link; refused")
        if not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: expected a plain file, got a pipe, a device or a broken link; refused")
        if path.is_file() and path.name != MANIFEST:
            found[path.name] = path
    return found


def _is_in_hub_cache(link: Path) -> bool:
    """Return True for a link from models--x--y/snapshots/z/ to a file in models--x--y/blobs/."""
    snapshots = link.parent.resolve().parent
    return snapshots.name == "snapshots" and link.resolve().parent == snapshots.parent / "blobs"


def _check_complete(folder: Path, names: Sequence[str], required: Sequence[str]) -> None:
    """Raise CheckpointError unless `names` has all that is required. Weights may be in several files with an index."""
    for name in required:
        if name not in names and f"{name}.index.json" not in names:
            raise CheckpointError(f"{folder}: expected {name!r}, got no such file; it is not a complete checkpoint")


def seal(folder: Path, required: Sequence[str] = MODEL_FILES) -> None:
    """Flush the files of `folder` to disk, then write the manifest of the covered ones, and flush it.

    Raises:
        CheckpointError: a file of `required` is missing.
    """
    found = _files(folder)
    covered = {name: path for name, path in found.items() if _is_covered(name)}
    _check_complete(folder, list(covered), required)
    for path in found.values():
        files.fsync(path)
    entries = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in covered.items()}
    files.write_whole(folder / MANIFEST, files.json_text(entries))


def reseal(folder: Path) -> None:
    """Write a new manifest for a model folder whose files were changed on purpose.

    Raises:
        CheckpointError: `folder` is not a folder with a model, or has a link or a device.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    seal(folder)


def verify(folder: Path, required: Sequence[str] = MODEL_FILES) -> None:
    """Raise CheckpointError unless the files that the manifest of `folder` covers are there and unchanged.

    The manifest must cover those of `required`.
    """
    try:
        _verify(folder, required)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error


def _verify(folder: Path, required: Sequence[str]) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest}: missing; the folder is not a finished checkpoint of this program")
    found, expected = _files(folder), _read_manifest(manifest)
    for name, (size, digest) in expected.items():
        if name not in found:
            raise CheckpointError(f"{manifest}: {name!r} missing; expected {size} bytes, got no such file")
        path = found[name]
        if not _is_covered(name):  # in a manifest of an earlier version
            continue
        if (actual := path.stat().st_size) != size:
            fault = "truncated" if actual < size else "damaged"
            raise CheckpointError(f"{path}: expected {size} bytes, got {actual}; {_what_happened(path, fault)}")
        if (actual_digest := _sha256(path)) != digest:
            raise CheckpointError(
                f"{path}: expected SHA-256 {digest}, got {actual_digest}; {_what_happened(path, 'damaged')}"
            )
    _check_complete(folder, list(expected), required)


def _what_happened(path: Path, fault: str) -> str:
    """Return the end of the message about a file that differs from the manifest."""
    if path.stat().st_mtime <= (path.parent / MANIFEST).stat().st_mtime:
        return f"the file is {fault}"
    command = shlex.join(["resnet-bk", "seal", str(path.parent)])
    return f"the file was changed since it was saved; if that was on purpose, run: {command}; otherwise it is {fault}"


def _read_manifest(manifest: Path) -> dict[str, tuple[int, str]]:
    """Map file names to (bytes, SHA-256). Accept only the exact bytes that `seal` writes, to find any changed bit."""
    size = manifest.stat().st_size
    if size > _LARGEST_MANIFEST:
        raise CheckpointError(f"{manifest}: expected at most {_LARGEST_MANIFEST} bytes, got {size}; refused")
    text = manifest.read_bytes()
    try:
        entries = json.loads(text)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        sealed = files.json_text({name: {"bytes": int(b), "sha256": str(s)} for name, (b, s) in expected.items()})
        written = sealed.encode()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
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


@contextlib.contextmanager
def replacing(folder: Path, required: Sequence[str] = MODEL_FILES) -> Iterator[Path]:
    """Yield a scratch folder. If the block succeeds, seal it and rename it to `folder`; otherwise remove it.

    Raises:
        OSError: the disk is full or fails. `folder` is the old one or the new one.
    """
    partial, old = files.scratch(folder), folder.with_name(f".{folder.name}.old")
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        try:
            partial.mkdir()
            yield partial
            seal(partial, required)
            verify(partial, required)
            if folder.exists():
                files.remove(old)
                folder.rename(old)
            partial.rename(folder)
            files.fsync(folder.parent)
            files.remove(old)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            files.remove(partial)


def saved_steps(folder: Path) -> dict[int, Path]:
    """Map the step of each ``checkpoint-<step>`` in `folder` to its path."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return {int(step): path for path, step in steps.items() if step.isascii() and step.isdecimal()}


def step_of(checkpoint: Path) -> int:
    """Return the step of a folder ``checkpoint-<step>``."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_valid(folder: Path, report: Callable[[str], None], required: Sequence[str] = MODEL_FILES) -> Path | None:
    """Return the newest ``checkpoint-<step>`` in `folder` that verifies, or None. Report each damaged one."""
    for _, path in sorted(saved_steps(folder).items(), reverse=True):
        try:
            verify(path, required)
            return path
        except CheckpointError as error:
            report(f"skipping {path.name}: {error}")
    return None
