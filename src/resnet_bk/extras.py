"""Optional packages: the error that names the extra which installs a missing one."""

import contextlib
from collections.abc import Iterator


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import the packages of the extra `name` (see pyproject.toml) inside this block.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingExtraError) or (error.name or "").startswith("resnet_bk"):
            raise
        raise MissingExtraError(f"{error.name} is not installed; run: pip install 'resnet-bk[{name}]'") from error
