"""Optional packages: the error that names the extra to install when one is missing."""

import contextlib
from collections.abc import Iterator


class MissingExtraError(ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of the extra `name` (see pyproject.toml) in this block.

    Raises:
        MissingExtraError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "resnet_bk":
            raise
        raise MissingExtraError(f"{package} is not installed; run: pip install 'resnet-bk[{name}]'") from error
