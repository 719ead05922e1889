"""Compile a model into a program."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from resnet_bk.adaptive.depth import Halting, Skipping
from resnet_bk.adaptive.early_exit import EarlyExit
from resnet_bk.adaptive.length import LearnedLength
from resnet_bk.adaptive.multiscale import MultiScale
from resnet_bk.engine.adaptive import depth, length, memory, multiscale, recent
from resnet_bk.engine.blocks import block
from resnet_bk.engine.code import Place
from resnet_bk.engine.engine import Engine
from resnet_bk.engine.instructions import Op
from resnet_bk.engine.program import Program
from resnet_bk.layers.block import Block, Stack
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams
from resnet_bk.model import LanguageModel

COMPILERS: dict[type[nn.Module], Callable[[Program, Any, int], Any]] = {
    Block: block,
    NgramMemory: memory,
    RecentNgrams: recent,
    MultiScale: multiscale,
    LearnedLength: length,
    EarlyExit: depth,
    Halting: depth,
    Skipping: depth,
}


def engine_of(model: LanguageModel, int8: bool = False) -> Engine:
    """Return the engine of a causal model. Later changes of the model's weights do not reach it.

    Args:
        model: on a CPU, in float32 or float64.
        int8: store matrices as int8 numbers, with a scale for each output.

    Raises:
        ValueError: the model's modules do not fit its configuration, so it could not be compiled as it is.
    """
    rows = len(model.embed.weight), len(model.head.weight), model.config.vocab_size
    if len(set(rows)) > 1 or model.head.bias is not None or model.embed.max_norm is not None:
        raise ValueError(f"model: has {rows[0]} embeddings and {rows[1]} logits, or a head with a bias")
    p = Program(model.embed.weight.dtype, int8)
    d, embedding = model.config.d_model, p.matrix(model.embed.weight)
    head = embedding if model.head.weight is model.embed.weight else p.matrix(model.head.weight)
    p.vocabulary = model.config.vocab_size
    x, p.logits = p.vector(d), p.vector(p.vocabulary)
    p.emit(Op.EMBED, x, embedding[0], d, embedding[1])

    def read(x: int) -> None:
        with p.scope():
            normed = p.vector(d)
            p.norm(normed, x, model.norm)
            p.product(p.logits, normed, (p.vocabulary, d), head)

    def layer(module: nn.Module, x: int) -> Any:
        with p.scope():
            return COMPILERS[type(module)](p, module, x)

    def stack(layers: Stack, x: int) -> list[Any]:
        return [layer(module, x) for module in layers]

    p.read, p.stack = read, stack
    places = stack(model.blocks, x)
    read(x)
    flat = pytree.tree_leaves(places, is_leaf=lambda x: isinstance(x, Place))
    return Engine(p.finished(flat), places)
