"""The compute ledger: floating-point operations that ran, by layer and by token.

Counted are matrix products, the core and the convolution, from the shapes they were given and the sites and experts
that were computed; a multiply-add is two operations, as torch's FLOP counter has it. Element-wise work is not counted.

Dimensions: B batch, N positions, M packed positions, D model width.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.adaptive.length import LearnedLength
from resnet_bk.adaptive.multiscale import ChunkRecord, MultiScale
from resnet_bk.config import TECHNIQUES, ModelConfig
from resnet_bk.layers.block import Block, place_of, placed
from resnet_bk.layers.feedforward import TILE, Experts, ExpertsRecord
from resnet_bk.layers.mixer import DiagonalMixer, PropagatorMixer, ShortConv
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.model import LanguageModel, ModelOutput
from resnet_bk.ops.packing import capacity, packed_width
from resnet_bk.record import Record

LAYERS = (Block, MultiScale, LearnedLength, AdaptiveDepth)


@dataclasses.dataclass
class _Frame:
    """A layer that is running. evenly: operations shared by all its positions; each: (B, M), those of single ones."""

    name: str
    ids: Tensor
    mask: Tensor | None
    evenly: float = 0.0
    each: Tensor | None = None

    @cached_property
    def real(self) -> int:
        """How many of its positions are no padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


class Ledger:
    """Counts while it is open: ``with Ledger(model) as ledger: model(ids)``. Nothing is left in the model afterwards.

    Counted are calls of the model itself; of its parts alone (features, blocks), as transformers' adapter and
    speculation make them, it raises RuntimeError. Where a technique has several outputs scored in training, the head
    counts once for all of them. What a backward pass runs is not counted.

    total: operations of all calls. stages: the same by layer and part of it, ``"blocks.1.inner.0 mixer"``.
    unused: those of rows that only fill up a batch or a tile.
    by_token: (B, N) float64, of the last call, each token's own: a chunk's for the token that closes it; what runs on
      other rows than a layer's positions, such as routing or pooling, for all of its tokens alike.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.stages = model, defaultdict[str, float](float)
        self.unused, self.by_token = 0.0, torch.zeros(0, 0, dtype=torch.float64)
        self._frames: list[_Frame] = []
        self._hooks: list[Any] = []

    @property
    def total(self) -> int:
        return round(sum(self.stages.values()))

    def __enter__(self) -> Self:
        self._hook(self.model, self._begin, self._end, with_kwargs=True)
        layers: list[str] = []  # names; a module's own innermost one is the last that begins its name
        for name, module in self.model.named_modules():
            if isinstance(module, LAYERS):
                layers.append(name)
                self._hook(module, self._enter(name), self._leave)
            elif name.endswith(".qk_proj"):
                continue  # counted site by site, with the sparse core
            elif (count := _COUNTED.get(type(module))) is not None:
                layer = next((n for n in reversed(layers) if name.startswith(f"{n}.")), "")
                part = name.removeprefix(layer).strip(".").split(".")[0]
                self._hook(module, None, self._counter(count, part))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, module: nn.Module, before: Any, after: Any, with_kwargs: bool = False) -> None:
        if before is not None:
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=with_kwargs))
        self._hooks.append(module.register_forward_hook(after, with_kwargs=with_kwargs))

    # ------------------------------------------------------------------------------------------- hooks

    def _begin(self, model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["ids"]
        self.by_token = torch.zeros(ids.numel(), dtype=torch.float64, device=ids.device)
        self._frames = [_Frame("", placed(ids), kwargs.get("mask"))]

    def _end(self, model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: ModelOutput) -> None:
        ids = args[0] if args else kwargs["ids"]
        if kwargs.get("targets") is not None:  # the head ran inside the loss
            self._add(2.0 * ids.numel() * self.model.head.weight.numel(), "head", ids.shape)
        self._settle(self._frames.pop())
        self.by_token = self.by_token.view(ids.shape)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            _, ids, _, mask = args
            self._running()
            self._frames.append(_Frame(name, ids, mask))

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any, list[Record]]) -> None:
        own = output[2][:2] if isinstance(module, Block) else output[2][:1]
        for record in own:
            if isinstance(record, SparsityRecord) and isinstance(module.mixer, PropagatorMixer):
                self._sparse_core(module.mixer, record)
            elif isinstance(record, ExpertsRecord):
                assert isinstance(module.feed_forward, Experts)
                self._experts(module.feed_forward, record)
            elif isinstance(module, MultiScale) and isinstance(record, ChunkRecord) and record.probability is not None:
                assert record.closes is not None
                self._add(5.0 * int(record.closes.sum()) * module.up.expand.out_features, "smoothing")
        self._settle(self._frames.pop())

    def _counter(self, count: Callable[..., float], part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch._C._current_graph_task_id() >= 0:  # a backward pass computes a block again
                return
            y = output[0] if isinstance(output, tuple) else output
            self._add(count(module, args[0], y), part, y.shape[:-1])

        return hook

    # ------------------------------------------------------------------------------------------ booking

    def _running(self) -> _Frame:
        if not self._frames:
            raise RuntimeError("ledger: a part of the model was called by itself; call the model, as in model(ids)")
        return self._frames[-1]

    def _add(self, flops: float, part: str, shape: torch.Size | None = None) -> None:
        """Book operations for the layer that is running; where they ran on its positions, padding among them has its
        part."""
        frame = self._running()
        self.stages[f"{frame.name} {part}".strip()] += flops
        if frame.mask is not None and shape == frame.ids.shape:
            padding = flops * (1 - frame.real / frame.mask.numel())
            self.unused += padding
            flops -= padding
        frame.evenly += flops

    def _add_each(self, flops: Tensor, part: str) -> None:
        """Book operations (B, M) of single positions; those of padding are its own."""
        frame = self._frames[-1]
        self.stages[f"{frame.name} {part}".strip()] += flops.sum().item()
        if frame.mask is not None:
            self.unused += flops[~frame.mask].sum().item()
            flops = torch.where(frame.mask, flops, 0)
        frame.each = flops if frame.each is None else frame.each + flops

    def _add_filling(self, flops: float, part: str) -> None:
        """Book operations on rows that fill up a tile."""
        self.stages[f"{self._frames[-1].name} {part}"] += flops
        self.unused += flops

    def _sparse_core(self, mixer: PropagatorMixer, record: SparsityRecord) -> None:
        assert mixer.qk_proj is not None
        chains = (1 if mixer.causal else 2) * mixer.heads
        scan, fill = 5.0 * mixer.width**2 * chains, 3.0 * mixer.width * chains
        reads = 2.0 * mixer.qk_proj.weight.numel()
        kept, (batch, length) = record.kept.double(), record.kept.shape
        left_out, tile = (fill, TILE) if length > 1 else (scan, 1)  # single steps are dense
        self._add_each(kept * (reads + scan - left_out) + left_out, "mixer")
        counts, bound = record.kept.sum(1), capacity(mixer.sparse.settings.bound, length)  # type: ignore[union-attr]
        self._add_filling(reads * (batch * packed_width(counts, tile, bound) - int(counts.sum())), "mixer")

    def _experts(self, experts: Experts, record: ExpertsRecord) -> None:
        each = 2.0 * (experts.up[0].numel() + experts.down[0].numel())
        self._add_each(each * record.used.double(), "feed_forward")
        self._add_filling(each * float(((-record.load) % TILE).sum()), "feed_forward")

    def _settle(self, frame: _Frame) -> None:
        """Give what a layer ran to the tokens at its positions."""
        real = torch.ones_like(frame.ids, dtype=torch.bool) if frame.mask is None else frame.mask
        each = real.double() * frame.evenly / max(1, frame.real)
        self.unused += 0.0 if frame.real else frame.evenly
        if frame.each is not None:
            each = each + frame.each
        self.by_token.index_add_(0, torch.where(real, place_of(frame.ids), 0).flatten(), each.flatten())


def _linear(module: nn.Linear, x: Tensor, y: Tensor) -> float:
    return 2.0 * x.numel() * module.out_features


def _convolution(module: ShortConv, x: Tensor, y: Tensor) -> float:
    return 2.0 * module.width * y.numel() if y.shape[1] > 1 else 0.0


def _propagator(module: PropagatorMixer, x: Tensor, y: Tensor) -> float:
    """The Green's function and the dense scan; a sparse one is counted site by site."""
    sites, sweeps = y.shape[0] * y.shape[1] * module.heads, 1 if module.causal else 2
    scan = 5 * module.width**2 if module.sparse is None else 0
    return float(sweeps * sites * (3 + scan))


def _diagonal(module: DiagonalMixer, x: Tensor, y: Tensor) -> float:
    sites, sweeps = y.shape[0] * y.shape[1] * module.energies.potential.out_features, 1 if module.causal else 2
    return float(3 * sweeps * sites)


_COUNTED: dict[type[nn.Module], Callable[..., float]] = {
    nn.Linear: _linear,
    ShortConv: _convolution,
    PropagatorMixer: _propagator,
    DiagonalMixer: _diagonal,
}


def plain_flops(config: ModelConfig) -> float:
    """Operations a token of the plain model: same width, depth and experts, each token through all of them."""
    plain = config.without(*TECHNIQUES)  # and all its experts are one that is as wide as they are together
    plain = dataclasses.replace(plain, num_experts=1, top_k=1, d_ff=config.num_experts * config.d_hidden)
    with torch.device("meta"):
        model = LanguageModel.from_config(plain)
        with Ledger(model) as ledger, torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.int64))
    return ledger.total / 2
