"""A model over several processes: parameters sharded by FSDP2, activations recomputed, one sequence in pieces."""

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
from resnet_bk.layers.mixer import Mixer
from resnet_bk.model import LanguageModel
from resnet_bk.ops.sequence_parallel import Pieces


def units(stack: Stack) -> Iterator[nn.Module]:
    """The layers of a model that run exactly once in each forward pass, inner ones first. A block inside learned length
    or adaptive depth runs once for each group of rows, as often as the data say, so it is no unit: processes that
    gather its parameters would wait for each other in vain."""
    for layer in stack:
        if isinstance(layer, MultiScale) and isinstance(layer.inner, Stack):
            yield from units(layer.inner)
        yield layer


def shard(model: nn.Module, mesh: dist.DeviceMesh | None = None) -> nn.Module:
    """Each process of `mesh` (default: all) keeps a part of every parameter, and gathers a layer's when it runs.

    model: a LanguageModel, or a ResNetBKForCausalLM, which is the one that must be called then. Changed in place. Its
    state is gathered by :func:`resnet_bk.training.states.whole_weights`.
    """
    numbers = {p for p in model.parameters() if p.dim() == 0}  # has no parts; whoever trains averages its gradient
    # a block's state holds views, and FSDP2 warns of work in place on them; there is none
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    core: Any = model if isinstance(model, LanguageModel) else model.model
    for layer in units(core.blocks):
        passing = not isinstance(layer, EarlyExit)  # whose units work in the loss too, once the layer has run
        fully_shard(layer, mesh=mesh, ignored_params=numbers, reshard_after_forward=passing)
    fully_shard(model, mesh=mesh, ignored_params=numbers)
    return model


def recompute(model: nn.Module) -> nn.Module:
    """Have every block keep its input alone and compute the rest again in backward: the same gradients for another
    forward pass and a fraction of the memory. Changed in place."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputes = True
    return model


def split_sequences(model: LanguageModel, group: dist.ProcessGroup | None = None) -> LanguageModel:
    """From now on the processes of `group` (default: all) give `model` consecutive pieces of the same sequences, and
    each gets the logits and the gradients of its own piece; see :class:`resnet_bk.ops.sequence_parallel.Pieces`.

    A parameter's gradient is the sum of those of all processes. Where losses are means over pieces of equal length, it
    is their mean, which is what DistributedDataParallel makes. Balancing of experts looks at a piece at a time.

    Raises:
        ConfigError: the model is bidirectional, or a technique decides about positions, which would cross pieces.
        ValueError: no group, and none was initialised.
    """
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("group: got none; call torch.distributed.init_process_group first")
    config = model.config
    techniques = {
        "multiscale": bool(config.multiscale.factors),
        "length": bool(config.length.bins),
        "depth": config.depth.policy != "none",
        "sparsity": bool(config.sparsity.target),
    }
    if on := [name for name, is_on in techniques.items() if is_on]:
        raise ConfigError(
            f"model.{on[0]}: is on, allowed in sequences that one process holds; turn it off to split them"
        )
    if not config.causal:
        raise ConfigError("model.causal: got False, allowed True for sequences that are split over processes")
    for module in model.modules():
        if isinstance(module, Mixer):
            module.pieces = Pieces(group)
    return model
