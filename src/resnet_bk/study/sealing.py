"""The command ``resnet-bk seal``: write a new manifest for a model folder whose files were changed on purpose."""

from pathlib import Path

from resnet_bk.checkpoint import MANIFEST, reseal
from resnet_bk.config import SealConfig
from resnet_bk.report.tables import Console
from resnet_bk.report.terminal import say


def seal(config: SealConfig, console: Console) -> None:
    """Write the manifest and print its name."""
    folder = Path(config.folder)
    reseal(folder)
    say(console, f"wrote {folder / MANIFEST}")
