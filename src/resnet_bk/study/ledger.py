"""The compute ledger: count the FLOPs actually executed, per layer and per token.

It counts matrix products, the core's recurrences and the convolution, from the shapes of their inputs or outputs, and
from the numbers of sites and experts that were computed. A multiply-add is two operations, as in torch's FLOP counter.
Element-wise work is not counted. :mod:`resnet_bk.adaptive.flops` has the formulas.

Dimensions: B batch, N positions, M packed length.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.flops import expert_flops, flops_per_position, own_flops, scan_flops, sweeps
from resnet_bk.adaptive.multiscale import ChunkRecord, MultiScale
from resnet_bk.config import TECHNIQUES, ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Block, Tokens
from resnet_bk.layers.feedforward import Experts, ExpertsRecord
from resnet_bk.layers.mixer import PropagatorMixer, ShortConv
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.model import LanguageModel, ModelOutput
from resnet_bk.ops.flops import FILL, SCAN
from resnet_bk.ops.packing import TILE, Packing, capacity, packed_width
from resnet_bk.record import Record


@dataclasses.dataclass
class _Frame:
    """A layer that is running.

    Attributes:
        name: its name in the model, "" for the model itself.
        place: (B, M) int64, for each of its positions, the index of its token in the flattened batch.
        mask: (B, M) bool, False for padding; None without padding.
        evenly: FLOPs to divide evenly among its tokens.
        each: (B, M), FLOPs booked to single positions; None if nothing was.
    """

    name: str
    place: Tensor
    mask: Tensor | None
    evenly: float = 0.0
    each: Tensor | None = None

    @cached_property
    def count(self) -> int:
        """Number of non-padding positions."""
        return self.place.numel() if self.mask is None else int(self.mask.sum())


class Ledger:
    """Count FLOPs while the context is open: ``with Ledger(model) as ledger: model(ids)``.

    Only calls of the model itself are counted. The transformers adapter and speculative decoding call parts of the
    model; such a call raises RuntimeError. With targets, the head inside the loss counts once, even where a technique
    scores several outputs; logits count in addition. Backward passes are not counted. The model is unchanged
    afterwards.

    Attributes:
        total: FLOPs of all calls.
        stages: the same by layer and its part, such as ``"blocks.1.inner.0 mixer"``.
        unused: FLOPs, over all calls, of padding and of rows that only fill up a batch or a tile.
        by_token: (B, N) float64, FLOPs of each token in the last call. The FLOPs of a chunk are booked to the token
            that closes it. Within a layer, FLOPs are shared evenly by its tokens, except those of kept sites and of
            experts.
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
        self._hooks.append(self.model.blocks.register_forward_pre_hook(self._add_place))
        # Names of the layers found so far. The innermost layer that holds a module is the last one whose name is a
        # prefix of the module's.
        layers: list[str] = []
        for name, module in self.model.named_modules():
            if isinstance(module, Block | AdaptiveLayer):
                layers.append(name)
                self._hook(module, self._enter_layer(name), self._leave_layer)
            elif name.endswith(".qk_proj"):
                continue  # counted per kept site, with the sparse core
            elif own_flops(module):
                layer = next((n for n in reversed(layers) if name.startswith(f"{n}.")), "")
                part = name.removeprefix(layer).strip(".").split(".")[0]
                self._hook(module, None, self._counter(part))
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
        place = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        self._frames = [_Frame("", place, kwargs.get("mask"))]

    def _add_place(self, blocks: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add each token's place in the batch to the layers' input; techniques pack it together with the token."""
        x, tokens, state, mask = args
        frame = self._running()
        place = frame.place if frame.mask is None else Packing(frame.mask).pack(frame.place)
        return x, Tokens(tokens.ids, place), state, mask

    def _end(self, model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: ModelOutput) -> None:
        ids = args[0] if args else kwargs["ids"]
        if kwargs.get("targets") is not None:  # the head ran inside the loss
            self._add(2.0 * ids.numel() * self.model.head.weight.numel(), "head", ids.shape)
        self._settle(self._frames.pop())
        self.by_token = self.by_token.view(ids.shape)

    def _enter_layer(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            _, tokens, _, mask = args
            self._running()  # raises RuntimeError if the layer was called without the model
            self._frames.append(_Frame(name, tokens.place, mask))

        return hook

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any, list[Record]]) -> None:
        # The first record of an adaptive layer is its own; the others come from the layers inside it.
        for record in output[2] if isinstance(module, Block) else output[2][:1]:
            if isinstance(record, SparsityRecord) and isinstance(module.mixer, PropagatorMixer):
                self._sparse_core(module.mixer, record)
            elif isinstance(record, ExpertsRecord):
                assert isinstance(module.feed_forward, Experts)
                self._experts(module.feed_forward, record)
            elif isinstance(module, MultiScale) and isinstance(record, ChunkRecord) and record.probability is not None:
                self._add(float(SCAN) * int(record.closes.sum()) * module.up.expand.out_features, "smoothing")
        self._settle(self._frames.pop())

    def _counter(self, part: str) -> Callable[..., None]:
        """Return a hook that books a module's FLOPs."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch._C._current_graph_task_id() >= 0:  # activation checkpointing: a backward pass recomputes a block
                return
            rows = (output[0] if isinstance(output, tuple) else output).shape[:-1]
            if isinstance(module, ShortConv) and rows[1] == 1:  # one position: an element-wise product, not counted
                return
            flops = own_flops(module, rows[-1])
            if isinstance(module, PropagatorMixer) and module.convolves and rows[1] > 1:
                flops += own_flops(module.conv)
            self._add(flops * rows.numel(), part, rows)

        return hook

    # ------------------------------------------------------------------------------------------ booking

    def _running(self) -> _Frame:
        if not self._frames:
            raise RuntimeError("ledger: a part of the model was called by itself; call the model, as in model(ids)")
        return self._frames[-1]

    def _count(self, flops: float, part: str) -> _Frame:
        """Add FLOPs to a stage of the layer that is running. Return the layer's frame."""
        frame = self._running()
        self.stages[f"{frame.name} {part}".strip()] += flops
        return frame

    def _add(self, flops: float, part: str, shape: torch.Size | None = None) -> None:
        """Book FLOPs for the layer that is running.

        shape: the shape (B, M) of the rows that ran. If these are the layer's positions, the share of padding is booked
            as `unused`.
        """
        frame = self._count(flops, part)
        if frame.mask is not None and shape == frame.place.shape:
            padding = flops * (1 - frame.count / frame.mask.numel())
            self.unused += padding
            flops -= padding
        frame.evenly += flops

    def _add_each(self, flops: Tensor, part: str) -> None:
        """Book FLOPs (B, M) of single positions; those of padding are `unused`."""
        frame = self._count(flops.sum().item(), part)
        if frame.mask is not None:
            self.unused += flops[~frame.mask].sum().item()
            flops = torch.where(frame.mask, flops, 0)
        frame.each = flops if frame.each is None else frame.each + flops

    def _add_filling(self, flops: float, part: str) -> None:
        """Book FLOPs of rows that only fill up a packed tensor."""
        self._count(flops, part)
        self.unused += flops

    def _sparse_core(self, mixer: PropagatorMixer, record: SparsityRecord) -> None:
        """Book what depends on the kept sites: the scan, and the projection to queries and keys."""
        assert mixer.qk_proj is not None
        scan, fill = sweeps(mixer) * scan_flops(mixer), float(sweeps(mixer) * FILL) * mixer.heads * mixer.width
        reads = own_flops(mixer.qk_proj)
        kept, (batch, length) = record.kept.double(), record.kept.shape
        left_out, tile = (fill, TILE) if length > 1 else (scan, 1)  # a single step scans every site
        self._add_each(kept * (reads + scan - left_out) + left_out, "mixer")
        counts, bound = record.kept.sum(1), capacity(mixer.sparse.settings.bound, length)  # type: ignore[union-attr]
        width, total = packed_width(counts, tile, bound), int(counts.sum())
        self._add_filling(reads * (batch * width - total), "mixer")

    def _experts(self, experts: Experts, record: ExpertsRecord) -> None:
        """Book the experts that each token used, and the rows that fill up their tiles.

        Grouped products (bfloat16 on a GPU, or compiled) fill no tiles; these rows are counted there all the same.
        """
        each = expert_flops(experts)
        self._add_each(each * record.used.double(), "feed_forward")
        self._add_filling(each * float(((-record.load) % TILE).sum()), "feed_forward")

    def _settle(self, frame: _Frame) -> None:
        """Give the FLOPs of a layer to the tokens at its positions."""
        mask = torch.ones_like(frame.place, dtype=torch.bool) if frame.mask is None else frame.mask
        each = mask.double() * frame.evenly / max(1, frame.count)
        if frame.count == 0:
            self.unused += frame.evenly
        if frame.each is not None:
            each = each + frame.each
        self.by_token.index_add_(0, torch.where(mask, frame.place, 0).flatten(), each.flatten())


def plain_flops(config: ModelConfig) -> float:
    """Return the FLOPs per token of the plain model: same width and depth, without techniques and without a router.

    Its feed-forward is as wide as all experts together.
    """
    plain = config.without(*TECHNIQUES)
    plain = dataclasses.replace(plain, num_experts=1, top_k=1, d_ff=config.num_experts * config.d_hidden)
    with torch.device("meta"):
        return flops_per_position(LanguageModel.from_config(plain))
