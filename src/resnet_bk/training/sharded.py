"""One model over several processes: parameters sharded by FSDP2, activation checkpointing, one sequence in pieces."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from resnet_bk.adaptive.early_exit import EarlyExit
from resnet_bk.adaptive.multiscale import MultiScale
from resnet_bk.config import ConfigError
from resnet_bk.layers.block import Block, Stack
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams
from resnet_bk.layers.mixer import Mixer
from resnet_bk.model import LanguageModel
from resnet_bk.ops.sequence_parallel import Pieces


def fsdp_units(stack: Stack) -> Iterator[nn.Module]:
    """Yield the layers that run exactly once in each forward pass, inner layers first.

    A block inside learned length or adaptive depth is not among them: it runs once for each group of rows, so how often
    depends on the data. If processes gathered its parameters a different number of times, they would wait forever.
    """
    for layer in stack:
        if isinstance(layer, MultiScale) and isinstance(layer.inner, Stack):
            yield from fsdp_units(layer.inner)
        yield layer


def shard(model: nn.Module, mesh: dist.DeviceMesh | None = None) -> nn.Module:
    """Shard every parameter over the processes of `mesh` (default: all); a layer's are gathered while it runs.

    Parameters of dimension 0 cannot be sharded: each process holds them, and the training loop must average their
    gradients. :func:`resnet_bk.training.states.gather_weights` returns the full weights.

    Args:
        model: a LanguageModel, or a ResNetBKForCausalLM; the latter must then be called itself, not its inner model.
            Changed in place.
        mesh: the processes that share the model.
    """
    scalars = {p for p in model.parameters() if p.dim() == 0}
    # The state of a block holds views, and FSDP2 warns against in-place operations on them; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    core: Any = model if isinstance(model, LanguageModel) else model.model
    for layer in fsdp_units(core.blocks):
        reshard = not isinstance(layer, EarlyExit)  # the loss uses its exit predictors after its forward pass
        fully_shard(layer, mesh=mesh, ignored_params=scalars, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    return model


def recompute(model: nn.Module) -> nn.Module:
    """Turn on activation checkpointing in every block. Changes `model` in place.

    A block then keeps its input only and computes the rest again in the backward pass. The gradients are the same; the
    cost is one more forward pass, the gain a fraction of the memory.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputes = True
    return model


def split_sequences(model: LanguageModel, group: dist.ProcessGroup | None = None) -> LanguageModel:
    """Make the processes of `group` (default: all) compute consecutive pieces of the same sequences.

    Each process passes its piece to `model` and gets the logits and the gradients of that piece; see
    :class:`resnet_bk.ops.sequence_parallel.Pieces`. The gradient of a parameter is the sum over processes. Where losses
    are means over pieces of equal length it is their mean, which is what DistributedDataParallel computes. Balancing of
    experts counts each piece separately.

    Raises:
        ConfigError: the model is bidirectional, or a technique is on whose decisions would cross pieces.
        ValueError: no group was given and none is initialised.
    """
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("group: got none; call torch.distributed.init_process_group first")
    config = model.config
    on = [name for name in config.techniques if name not in ("memory", "experts")]
    if on:
        raise ConfigError(
            f"model.{on[0]}: is on, allowed in sequences that one process holds; turn it off to split them"
        )
    if not config.causal:
        raise ConfigError("model.causal: got False, allowed True for sequences that are split over processes")
    for module in model.modules():
        if isinstance(module, Mixer | NgramMemory | RecentNgrams):
            module.pieces = Pieces(group)
    return model
