"""Compiled models in the user's cache folder, so that `resnet-bk generate` starts without torch.

A file belongs to one state of a model folder and its tokenizer, one width of the CPU's registers, and one version of
the engine.
"""

import contextlib
import functools
import hashlib
import os
import secrets
import time
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from resnet_bk import files
from resnet_bk.checkpoint import MANIFEST, CheckpointError, seal, verify
from resnet_bk.engine import asked
from resnet_bk.engine.code import Code
from resnet_bk.folders import cache_folder

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine

NAME = "engine.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # of a model folder; its manifest does not cover them
LARGEST, KEPT = 2**29, 4  # bytes of a file; number of files in the cache, those that were used last
ABANDONED = 3600  # seconds after which a folder that is still being written is that of a killed process


def place(model: Path, weights: str, threshold: float | None) -> Path | None:
    """Return the folder of an engine in the cache; None if there can be none.

    Args:
        model: the model's folder.
        weights: "float32" or "int8".
        threshold: that of adaptive depth, if it replaces the model's.
    """
    cache = cache_folder()
    if cache is None or asked() is False:
        return None
    try:
        tokenizer = [path.read_bytes() if path.exists() else b"" for path in (model / name for name in TOKENIZER)]
        parts = [(model / MANIFEST).read_bytes(), *tokenizer, f"{weights} {threshold}".encode(), _version()]
    except Exception:  # files cannot be read, or numba is missing or cannot run; it raises many classes then
        return None
    return cache / "engines" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def stored(folder: Path) -> "Engine | None":
    """Return the engine in a folder of the cache; None if there is none."""
    try:
        if not folder.exists():
            return None
        from resnet_bk.engine.engine import Engine

        verify(folder, (NAME,))
        engine = Engine(Code.load(folder / NAME))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # damaged, and soon written again
        return None
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)  # used last
    return engine


def store(engine: "Engine", folder: Path) -> None:
    """Write an engine into the cache, unless it is large or the cache cannot be written. Old files make place."""
    code = engine.code
    if sum(x.nbytes for x in code.arrays) > LARGEST:
        return
    with contextlib.suppress(OSError, CheckpointError, SafetensorError):  # safetensors' own error of a full disk
        scratch = files.scratch(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}"))
        try:
            scratch.mkdir(parents=True)
            code.save(scratch / NAME)
            seal(scratch, (NAME,))
            if folder.exists():  # damaged
                files.remove(folder)
            scratch.rename(folder)
        finally:
            files.remove(scratch)
        paths = list(folder.parent.iterdir())
        used = {path: (path / MANIFEST).stat().st_mtime for path in paths if (path / MANIFEST).exists()}
        old = [path for path in paths if files.is_scratch(path) and time.time() - path.stat().st_mtime > ABANDONED]
        for path in [*sorted(filterfalse(files.is_scratch, used), key=used.__getitem__)[:-KEPT], *old]:
            files.remove(path)


@functools.cache
def _version() -> bytes:
    """Return a hash of what code of the engine means: its files, and the width of registers."""
    from resnet_bk.jit.simd import LANE_BYTES

    package = Path(__file__).parent.parent
    sources = sorted([*package.glob("engine/*.py"), package / "ngram_format.py"])
    content = b"\0".join(path.read_bytes() for path in sources)
    return hashlib.sha256(content + str(LANE_BYTES).encode()).digest()
