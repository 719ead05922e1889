"""Models compiled for decoding on CPUs: a program that numba runs, one call a token of each row.

``compiler.py`` turns a model's layers into the rows of a program, ``interpreter.py`` runs it, ``engine.py`` makes
states and steps, ``conversion.py`` takes states from the model and back, and ``decoder.py`` decides where the engine is
used. Only the compiler, the conversion and the decoder import torch.
"""

import os

from resnet_bk.config import ConfigError


def asked() -> bool | None:
    """Return what the environment asks for: the engine, the model, or None for the faster one."""
    name = os.environ.get("RESNET_BK_ENGINE") or None
    if name not in (None, "0", "1"):
        raise ConfigError(f"RESNET_BK_ENGINE: got {name!r}, allowed 1 for always and 0 for never; or unset it")
    return None if name is None else name == "1"
