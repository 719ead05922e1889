"""The environment of a process that torchrun has started."""

import os

from resnet_bk.config import ConfigError, shown


def world_size() -> int:
    """Return the number of processes that a launcher started; 1 without a launcher.

    Raises:
        ConfigError: the launcher's environment variables are not numbers.
    """
    found = {}
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, "0" if name == "RANK" else "1")
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise ConfigError(f"{name}: got {shown(text)}, allowed an integer of at least {least}; start with torchrun")
        found[name] = int(text)
    if "RANK" in os.environ and found["RANK"] >= found["WORLD_SIZE"]:
        raise ConfigError(f"RANK: got {found['RANK']}, allowed 0 to {found['WORLD_SIZE'] - 1}; start with torchrun")
    return found["WORLD_SIZE"] if "RANK" in os.environ else 1
