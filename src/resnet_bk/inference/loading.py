"""Load trained models."""

import contextlib
from pathlib import Path

import torch

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.checkpoint import MANIFEST, CheckpointError
from resnet_bk.config import ConfigError
from resnet_bk.folders import CHECKPOINTS, MODEL, model_folder, named_folder
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, load_tokenizer, on_device

ATTEMPTS = 10  # to read a folder that a training keeps replacing


def load(path: str, threshold: float | None = None) -> tuple[ResNetBKForCausalLM, Tokenizer]:
    """Return a trained model, in evaluation mode and on the GPU if there is one, and its tokenizer.

    A training may go on in the same run folder. If it replaces or deletes what is being read, the newest model is read
    instead.

    Args:
        path: folder of a run or of a model, or the name of a bundled model.
        threshold: replaces the threshold of adaptive depth that the model was trained with.

    Raises:
        CheckpointError: the folder has no intact model, or its tokenizer does not fit the model.
        ConfigError: a threshold is given, but the model has no adaptive depth; or the settings are not valid.
    """
    for _ in range(ATTEMPTS):
        before = _sealed(path)
        try:
            folder = model_folder(path).absolute()  # once it is gone, a relative path would count as a name of the hub
            model, tokenizer = _read(folder, threshold)
        except Exception:
            if _sealed(path) == before:
                raise
            continue
        if _sealed(path).get(folder) == before.get(folder):
            return on_device(model).eval(), tokenizer
    raise CheckpointError(
        f"{path}: was replaced {ATTEMPTS} times while it was read; try again when its training has ended"
    )


def _sealed(path: str) -> dict[Path, tuple[int, int]]:
    """Return a value for each sealed folder of a run. It differs if another one takes the place of the folder."""
    folder, found = named_folder(path).absolute(), {}
    for manifest in (folder / MANIFEST, folder / MODEL / MANIFEST, *folder.glob(f"{CHECKPOINTS}/*/{MANIFEST}")):
        with contextlib.suppress(OSError):
            found[manifest.parent] = (manifest.stat().st_ino, manifest.stat().st_mtime_ns)
    return found


def _read(folder: Path, threshold: float | None) -> tuple[ResNetBKForCausalLM, Tokenizer]:
    """Return the model and the tokenizer of a verified folder; errors as for :func:`load`."""
    model = ResNetBKForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if threshold is not None:
        layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
        if not layers:
            raise ConfigError(f"depth_threshold: got {threshold}, but {folder} has no adaptive depth; leave it out")
        for layer in layers:
            layer.threshold = threshold
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer has no end-of-text token; put back that of the training")
    ids, size = max(tokenizer.get_vocab().values(), default=-1) + 1, model.config.vocab_size
    if ids > size:
        raise CheckpointError(f"{folder}: the tokenizer has {ids} ids, the model {size}; put back that of the training")
    return model, tokenizer
