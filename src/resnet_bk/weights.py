"""Checked reading of safetensors files: the expected tensors and no others, of the expected kind and finite."""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from resnet_bk.checkpoint import WEIGHTS, CheckpointError, current_name
from resnet_bk.config import shown

_FLOATS, _INTEGERS = ("F64", "F32", "F16", "BF16"), ("I32",)
_OTHER_MODEL = "the file is of another model"


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a model folder: one, or those that its index lists.

    Raises:
        CheckpointError: the index is damaged, or lists files outside the folder.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).exists() or not index.exists():
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        inside = all(Path(name).name == name for name in names)
        if not names:
            raise ValueError("it is empty")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{index}: expected a weight_map of tensors to files ({reason}); it is damaged"
        ) from error
    if not inside:
        raise CheckpointError(f"{index}: lists a file that is not in its folder; refused")
    return [folder / name for name in names]


def check_headers(
    files: Sequence[Path], expected: Mapping[str, Tensor], required: Collection[str] | None = None
) -> dict[str, Path]:
    """Check which tensors files have, without reading their values.

    Args:
        files: safetensors files, perhaps of an earlier version.
        expected: by current name, a tensor of the shape that each allowed one must have.
        required: the names that must be there. Default: all.

    Returns:
        The file of each tensor.

    Raises:
        CheckpointError: a file cannot be read, or a tensor is missing, unexpected, of another shape or of another kind
            than expected, floating point or integers. The message names the file and the tensor.
    """
    found: dict[str, Path] = {}
    for path in files:
        with _opened(path) as file:
            for key in sorted(file.keys()):
                name, part = current_name(key), file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if name not in expected or name in found:  # twice: in two files, or under an old and a new name
                    raise CheckpointError(f"{path}: unexpected {shown(name)}; {_OTHER_MODEL}")
                if shape != (wanted := tuple(expected[name].shape)):
                    raise CheckpointError(f"{path}: {name!r}: expected shape {wanted}, got {shape}; {_OTHER_MODEL}")
                allowed = _FLOATS if expected[name].is_floating_point() else _INTEGERS
                if dtype not in allowed:
                    kind = "floating point" if allowed == _FLOATS else "32-bit integers"
                    raise CheckpointError(
                        f"{path}: {name!r}: expected {', '.join(allowed)}, got {dtype}; save it as {kind}"
                    )
                found[name] = path
    missing = [name for name in (expected if required is None else required) if name not in found]
    if missing:
        raise CheckpointError(f"{files[0]}: missing {missing[0]!r}; {_OTHER_MODEL}")
    return found


def read_tensors(
    path: Path, expected: Mapping[str, Tensor], required: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a file by their current names, with the dtypes of those expected.

    Arguments as for :func:`check_headers`.

    Raises:
        CheckpointError: as :func:`check_headers`, or a value is NaN or infinite.
    """
    check_headers([path], expected, required)
    tensors = {}
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 - it is not a dict
            name = current_name(key)
            tensors[name] = file.get_tensor(key).to(expected[name].dtype)
            check_finite(path, name, tensors[name])
    return tensors


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path, prefix: str) -> None:
    """Copy the weights of a model folder, whose names there begin with `prefix`, into a module.

    Raises:
        CheckpointError: as :func:`read_tensors`.
    """
    expected = {f"{prefix}{name}": x for name, x in (*module.named_parameters(), *module.named_buffers())}
    files = weight_files(folder)
    found = check_headers(files, expected)
    for path in files:
        own = {name: expected[name] for name, file in found.items() if file == path}
        for name, x in read_tensors(path, own).items():
            own[name].copy_(x)


def check_finite(path: Path, name: str, x: Tensor) -> None:
    """Raise CheckpointError if x, which was read from a file, has a NaN or an infinity."""
    if not bool(torch.isfinite(x).all()):
        raise CheckpointError(f"{path}: {name!r}: has a NaN or an infinity, in {x.dtype}; the file cannot be used")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError) as error:  # the last is torch's, for a file that it cannot open
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # the machine is at fault, not the file
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as safetensors ({reason}); it is missing or damaged") from error
