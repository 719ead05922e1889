"""Files that are written whole or not at all, and folders that one process at a time may write to."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from resnet_bk.config import ConfigError, visible

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
_TOKEN = secrets.token_hex(4)  # of this process: two containers that share a disk may have processes of the same number
_SCRATCH = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows flushes files only, and through writable handles only."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk within the block into an OSError that names `path`.

    Python names no file when a write fails. safetensors and tokenizers raise classes of their own.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"os error (\d+)", str(error))  # how Rust prints it
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number is None:
            raise
        known = isinstance(error, OSError) or os.name == "nt"  # on Windows, Rust prints codes that are not errnos
        reason = (getattr(error, "strerror", None) or str(error)) if known else os.strerror(number)
        raise OSError(number, reason, str(path)) from error


def scratch(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_TOKEN}.partial")


def is_scratch(path: Path) -> bool:
    """Return True for names that :func:`scratch` returns, of any process."""
    return _SCRATCH.fullmatch(path.name) is not None


def remove(folder: Path) -> None:
    """Remove a folder, if there is one. It gets a scratch name first, so a kill never leaves half of it there."""
    if folder.exists():
        doomed = folder if is_scratch(folder) else folder.rename(scratch(folder))
        shutil.rmtree(doomed, ignore_errors=True)


def remove_scratch(folder: Path) -> None:
    """Remove what killed processes have left in `folder`. No other process may be at work there."""
    for path in filter(is_scratch, list(folder.iterdir()) if folder.is_dir() else []):
        if path.is_dir():
            remove(path)
        else:
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file so that, at any kill or power failure, `path` has the old text or the new one.

    A file that has the text already is not touched.

    Raises:
        OSError: the disk is full or fails. `path` has the old text or the new one.
    """
    data, partial = text.encode(errors="surrogateescape"), scratch(path)
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with writing(path):
        try:
            partial.write_bytes(data)
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def json_text(values: Any) -> str:
    """Return values as JSON on several lines. NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_without_nan(values), indent=1, allow_nan=False) + "\n"


def _without_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_nan(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def append_line(path: Path, line: str) -> None:
    """Append a line to a UTF-8 file and flush it to the disk."""
    with writing(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        fsync(path)


@contextlib.contextmanager
def lock(folder: Path, where: str) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs. No other process can hold it meanwhile.

    The system frees it if this process is killed. A file system without locks gets a warning in place of a lock.

    The folder and its parents are created if they do not exist, and removed again if the block leaves them empty.

    Args:
        folder: the folder.
        where: the setting that names it.

    Raises:
        ConfigError: the lock is held, or `folder` is not a folder.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"{where}: {path} exists and is not a folder; choose another")
    file = _locked(folder, where)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot remove an open file
            (folder / LOCK).unlink()
        with contextlib.suppress(OSError):  # nothing was written to it
            file.close()
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def _locked(folder: Path, where: str) -> BinaryIO:
    """Return the open lock file of `folder`. Open it again if its former owner has removed it in the meantime."""
    path = folder / LOCK
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):  # its former owner has removed the folder
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
            try:
                _lock_file(file)
                if _is_same(file, path):
                    return file
            except BlockingIOError as error:
                file.close()
                raise ConfigError(
                    f"{where}: {folder} is in use by another process; wait until it ends, or choose another folder"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    file.close()
                    raise
                print(
                    f"resnet-bk: {visible(str(folder))}: this file system has no locks; start one process only",
                    file=sys.stderr,
                )
                return file
            file.close()
    raise ConfigError(f"{where}: {folder} cannot be locked, since it vanishes again and again; choose another")


def _lock_file(file: BinaryIO) -> None:
    """Raise BlockingIOError if another process has locked `file`."""
    if sys.platform == "win32":
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same(file: BinaryIO, path: Path) -> bool:
    """Return True if `path` still names the open file."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
