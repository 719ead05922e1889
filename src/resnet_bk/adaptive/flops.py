"""The FLOPs of a layer per position: the one place where its matrix products and recurrences are counted.

A multiply-add is two operations, as in torch's FLOP counter. Element-wise work is not counted. The compute ledger
multiplies :func:`own_flops` with the positions that a module really computed; learned length and
``count_flops_multi_scale`` read :func:`flops_per_position`.
"""

from torch import nn

from resnet_bk.adaptive.multiscale import MultiScale
from resnet_bk.layers.attention import Attention
from resnet_bk.layers.embedding import NgramVectors
from resnet_bk.layers.feedforward import Experts
from resnet_bk.layers.mixer import DiagonalMixer, PropagatorMixer, ShortConv
from resnet_bk.ops.flops import DELTA, GREEN, SCAN


def own_flops(module: nn.Module, length: int | None = None) -> float:
    """Return the FLOPs per position of a module without its submodules; 0 for those that only compose others.

    length: number of positions of each row; None for rows that are long.
    """
    if isinstance(module, nn.Linear):
        return 2.0 * module.in_features * module.out_features
    if isinstance(module, NgramVectors):
        return module.flops
    if isinstance(module, Attention):
        length = length or module.fold
        return 4.0 * module.heads * module.width * module.scores(length) / length
    if isinstance(module, ShortConv):
        return 2.0 * module.width * module.channels
    if isinstance(module, PropagatorMixer):
        green = 0 if module.energies.kind == "bonds" else GREEN * module.heads
        scan = scan_flops(module) if module.sparse is None else 0  # a sparse scan is counted per kept site
        return float(sweeps(module) * (green + scan))
    if isinstance(module, DiagonalMixer):
        return float(sweeps(module) * module.energies.potential.out_features * GREEN)
    return 0.0


def scan_flops(mixer: PropagatorMixer) -> float:
    """Return the FLOPs of one scan along all chains of a mixer, per site."""
    return float(DELTA if mixer.delta else SCAN) * mixer.heads * mixer.width**2


def sweeps(mixer: PropagatorMixer | DiagonalMixer) -> int:
    """Return how often a mixer runs along its chain: from the left, and in bidirectional models from the right too."""
    return 1 if mixer.causal else 2


def expert_flops(experts: Experts) -> float:
    """Return the FLOPs of one expert for one token."""
    return 2.0 * (experts.up[0].numel() + experts.down[0].numel())


def flops_per_position(module: nn.Module) -> float:
    """Return the FLOPs per position of a module and its submodules when nothing is skipped.

    Every site is computed, every token uses as many experts as it may, and chunks have the length of their factor.
    """
    if isinstance(module, Experts):
        return flops_per_position(module.router) + module.most * expert_flops(module)
    scan = 0.0
    if isinstance(module, PropagatorMixer) and module.sparse is not None:
        scan = sweeps(module) * scan_flops(module)
    if isinstance(module, MultiScale):
        per_position = sum(map(flops_per_position, (module.boundaries, module.down.weigh, module.gate)))
        per_chunk = sum(map(flops_per_position, (module.down.refine, module.inner, module.up.expand)))
        return per_position + per_chunk / module.factor
    return own_flops(module) + scan + sum(map(flops_per_position, module.children()))
