"""How the techniques nest: learned length around multi-scale around adaptive depth around blocks.

N-gram memory comes before all of them.
"""

from collections.abc import Callable

from torch import Tensor, nn

from resnet_bk.adaptive.depth import Halting, Skipping
from resnet_bk.adaptive.early_exit import EarlyExit
from resnet_bk.adaptive.length import LearnedLength
from resnet_bk.adaptive.multiscale import MultiScale
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import Block, Stack
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams

Read = Callable[[Tensor], Tensor]  # the model's map from features (..., D) to logits (..., V)


def build(config: ModelConfig, read: Read) -> Stack:
    """Return all layers of a model, from the embedding to the norm before the head."""
    memory: list[nn.Module] = [NgramMemory(config)] if config.memory.orders else []
    if config.memory.recent:
        memory.append(RecentNgrams(config))
    return learned_length(config, Stack([*memory, *build_stack(config, read)]), read)


def build_stack(config: ModelConfig, read: Read) -> Stack:
    """Return the blocks of a model without n-gram memory and learned length.

    With multi-scale this is a recursion, level by level inward: blocks before and after a stack on chunks.
    """
    before, after = config.around
    blocks = [Block(config, config.attention.at(i)) for i in range(before + after)]
    if not config.multiscale.factors:
        return Stack(blocks)
    inside = driven(config.inside, build_stack(config.inside, read), read)
    return Stack([*blocks[:before], MultiScale(config, inside), *blocks[before:]])


def learned_length(config: ModelConfig, stack: Stack, read: Read) -> Stack:
    """Wrap the layers after n-gram memory in learned length if it is on; adaptive depth then drives the deep blocks."""
    first = len(stack) - config.outer_layers
    memory, stack = stack.part(0, first), stack.part(first)
    if config.length.bins:
        deep = driven(config, stack.part(config.trunk), read)
        stack = Stack([LearnedLength(config, stack.part(0, config.trunk), deep)])
    else:
        stack = driven(config, stack, read)
    return Stack([*memory, *stack])


def driven(config: ModelConfig, stack: Stack, read: Read) -> Stack:
    """Let adaptive depth drive the blocks of the stack, if it is on and the stack holds no coarser one."""
    if config.multiscale.factors or config.depth.policy == "none":
        return stack
    if config.depth.policy == "exit":
        return Stack([EarlyExit(config, stack, read)])
    return Stack([{"act": Halting, "skip": Skipping}[config.depth.policy](config, stack)])
