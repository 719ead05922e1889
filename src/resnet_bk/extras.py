"""Optional packages: the error that names the extra to install when one is missing."""

import contextlib
from collections.abc import Iterator


class MissingExtraError(ImportError):
    """An optional package is not installed, or too old. The message names the extra that installs it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of the extra `name` (see pyproject.toml) in this block.

    Raises:
        MissingExtraError: a package is not installed, or lacks a name that newer versions have.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "resnet_bk") or isinstance(error, MissingExtraError):
            raise
        what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be used ({error})"
        raise MissingExtraError(f"{package} {what}; run: pip install 'resnet-bk[{name}]'") from error
