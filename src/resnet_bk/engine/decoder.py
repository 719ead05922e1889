"""Decoding that uses the engine wherever it can and is faster, and the model itself elsewhere.

Dimensions: B rows, V vocabulary.
"""

import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.boundaries import AfterWords, FixedStride, Router, WordRouter
from resnet_bk.adaptive.depth import AdaptiveDepth, Halting, Skipping
from resnet_bk.adaptive.early_exit import EarlyExit
from resnet_bk.adaptive.length import LearnedLength
from resnet_bk.adaptive.length_predictor import SequenceLengthPredictor
from resnet_bk.adaptive.multiscale import LearnedDownsampling, LearnedUpsampling, MultiScale
from resnet_bk.checkpoint import CheckpointError
from resnet_bk.engine import asked
from resnet_bk.engine.conversion import from_torch, to_torch
from resnet_bk.engine.state import EngineState
from resnet_bk.layers.attention import Attention
from resnet_bk.layers.block import Block, Stack
from resnet_bk.layers.embedding import NgramMemory, NgramVectors, RecentNgrams
from resnet_bk.layers.feedforward import Experts, SwiGLU
from resnet_bk.layers.mixer import DiagonalMixer, Energies, PropagatorMixer, ShortConv
from resnet_bk.layers.norm import Norm
from resnet_bk.layers.score import Score
from resnet_bk.layers.sparse import SparseBKCore
from resnet_bk.model import LanguageModel
from resnet_bk.ops.kernels import preferred_backend

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine

# What the engine can compile. A subclass, or another module in the place of one, such as an adapter, is not in it.
KNOWN = {
    *(LanguageModel, Stack, Block, nn.ModuleList, nn.Linear, nn.Embedding, Norm, Score),
    *(PropagatorMixer, DiagonalMixer, Attention, ShortConv, Energies, SparseBKCore),
    *(SwiGLU, Experts, NgramMemory, NgramVectors, RecentNgrams, Halting, Skipping, EarlyExit),
    *(MultiScale, LearnedDownsampling, LearnedUpsampling, FixedStride, AfterWords, Router, WordRouter),
    *(LearnedLength, SequenceLengthPredictor),
}
COLUMNS = 512  # of the sums that compare weights
ALWAYS_ENGINE = 2  # rows up to which nothing is measured: torch calls take longer than the engine's step


_decoders: "weakref.WeakKeyDictionary[LanguageModel, Decoder]" = weakref.WeakKeyDictionary()


def decoder_of(model: LanguageModel) -> "Decoder":
    """Return the decoder of a model, the same one as long as the model lives."""
    decoder = _decoders.get(model)
    if decoder is None:
        decoder = _decoders[model] = Decoder(model)
    return decoder


class Decoder:
    """Steps of a model in evaluation mode: each reads one token of every row.

    The engine is compiled at the first step, and again when the model has changed. It is not used with gradients, in
    training mode, with autocast, on a GPU, in half precision, with hooks or modules that it does not know, or without
    numba. For more rows than a few, one step of each way is timed, once for each number of rows up to the next power of
    two.

    Changes are looked for thoroughly where a text goes on from a state of the model, as after a prompt. Between the
    steps of a text only changes of the weights in place are seen.

    ``RESNET_BK_ENGINE=1`` uses the engine wherever it can be used, ``RESNET_BK_ENGINE=0`` never.
    """

    def __init__(self, model: LanguageModel):
        """Create the decoder of a model."""
        self.asked = asked()
        self._model = weakref.ref(model)  # so that the model can be freed
        self.engine: Engine | None = None
        self._tensors: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []
        self._content: list[Any] = []
        self._faster: dict[int, bool] = {}

    @property
    def model(self) -> LanguageModel:
        model = self._model()
        assert model is not None
        return model

    def step(self, ids: Tensor, state: Sequence[Any] | EngineState) -> tuple[Tensor, Sequence[Any] | EngineState]:
        """Read one token of each row.

        Args:
            ids: (B, 1) int64 or int32.
            state: of the rows; a state of the engine changes in place.

        Returns:
            The logits (B, V), and the state after the tokens.

        Raises:
            ValueError: ids are not one token for each row of the state, or the state is one of another model.
            IndexError: a token is outside the vocabulary.
        """
        if ids.dim() != 2 or ids.shape[1] != 1:
            raise ValueError(f"ids: expected shape (B, 1), got {tuple(ids.shape)}")
        rows = 1 << (len(ids) - 1).bit_length()
        if self._faster.get(rows, True) and self._allowed() and (engine := self._fresh(state)) is not None:
            fits = not isinstance(state, EngineState) or engine.fits(state)
            if fits and self._is_faster(rows, engine, ids, state):
                state = state if isinstance(state, EngineState) else from_torch(engine, state)
                return torch.from_numpy(engine.step(ids[:, 0].numpy(), state).copy()), state
        output = self.model(ids, state=to_torch(state))
        return output.logits[:, 0], output.state

    @torch.no_grad()
    def uses_engine(self) -> bool:
        """Return whether single rows are decoded by the engine."""
        return self._allowed() and _known(self.model)

    def _allowed(self) -> bool:
        weight = self.model.embed.weight
        return not (
            self.asked is False
            or self.model.training
            or torch.is_grad_enabled()
            or weight.device.type != "cpu"
            or weight.dtype not in (torch.float32, torch.float64)
            or weight.is_inference()  # has no version
            or torch.is_autocast_enabled("cpu")
            or torch._C._len_torch_dispatch_stack()
            or not self.model.config.causal
            or preferred_backend("cpu") != "numba"
        )

    def _fresh(self, state: Any) -> "Engine | None":
        """Return the engine of the model as it is now; None if it cannot be compiled."""
        if isinstance(state, EngineState) and self.engine is not None and self._versions == _versions(self._tensors):
            return self.engine
        if not _known(self.model):
            return None
        tensors = [*self.model.parameters(), *self.model.buffers()]
        versions, content = _versions(tensors), _content(self.model, tensors)
        if self.engine is None or versions != self._versions or content != self._content:
            from resnet_bk.engine.compiler import engine_of  # numba is imported with the first step

            try:
                self.engine = engine_of(self.model)
            except (ValueError, CheckpointError):  # its modules do not fit its configuration
                return None
        self._tensors, self._versions, self._content = tensors, versions, content
        return self.engine

    def _is_faster(self, rows: int, engine: "Engine", ids: Tensor, state: Any) -> bool:
        """Return whether the engine is to decode up to `rows` rows; measure it at the first time."""
        if self.asked or rows <= ALWAYS_ENGINE:
            return True
        if rows not in self._faster:
            ours = state.copy() if isinstance(state, EngineState) else from_torch(engine, state)
            theirs, seconds = to_torch(state), []
            for run in (lambda: engine.step(ids[:, 0].numpy(), ours), lambda: self.model(ids, state=theirs)):
                run()
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            self._faster[rows] = seconds[0] < seconds[1]
        return self._faster[rows]


def _known(model: LanguageModel) -> bool:
    """Return whether the engine computes what the model's modules do, hooks and replaced methods included."""
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    return all(
        type(m) in KNOWN and not (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
        for m in model.modules()
    )


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return what changes with most changes of tensors: their versions and their places in memory."""
    return [(x._version, x.data_ptr()) for x in tensors]


def _content(model: LanguageModel, tensors: Sequence[Tensor]) -> list[Any]:
    """Return what the engine keeps of a model: which tensors, sums that changes past the versions show, thresholds."""
    found: list[Any] = [id(x) for x in tensors]
    for x in tensors:
        flat = x.detach().flatten() if x.is_floating_point() else x[:: 1 + len(x) // 4096].flatten()
        whole = flat[: len(flat) // COLUMNS * COLUMNS].view(-1, COLUMNS)  # sums by row and column tell places apart
        sums = whole.sum(1, dtype=torch.float64), whole.sum(0, dtype=torch.float64), flat[whole.numel() :].double()
        found += [(y * torch.arange(1, len(y) + 1)).sum().numpy().tobytes() for y in sums]
    return [*found, [m.threshold for m in model.modules() if isinstance(m, AdaptiveDepth)]]
