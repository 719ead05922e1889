"""Decoding that uses the engine wherever it can and is faster, and the model itself elsewhere.

Dimensions: B rows, V vocabulary.
"""

import os
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
from resnet_bk.config import ConfigError
from resnet_bk.engine.state import EngineState
from resnet_bk.layers.attention import Attention
from resnet_bk.layers.block import Block, Stack
from resnet_bk.layers.embedding import NgramMemory, NgramVectors
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
    *(SwiGLU, Experts, NgramMemory, NgramVectors, Halting, Skipping, EarlyExit),
    *(MultiScale, LearnedDownsampling, LearnedUpsampling, FixedStride, AfterWords, Router, WordRouter),
    *(LearnedLength, SequenceLengthPredictor),
}
ALWAYS_ENGINE = 2  # rows up to which nothing is measured: torch calls take longer than the engine's step


def _asked() -> bool | None:
    """Return what the environment asks for: the engine, the model, or None for the faster one."""
    name = os.environ.get("RESNET_BK_ENGINE") or None
    if name not in (None, "0", "1"):
        raise ConfigError(f"RESNET_BK_ENGINE: got {name!r}, allowed 1 for always and 0 for never; or unset it")
    return None if name is None else name == "1"


def to_torch(state: Sequence[Any] | EngineState) -> Sequence[Any]:
    """Return a state as the model takes it."""
    return state.to_torch() if isinstance(state, EngineState) else state


_decoders: "weakref.WeakKeyDictionary[LanguageModel, Decoder]" = weakref.WeakKeyDictionary()


def decoder_of(model: LanguageModel) -> "Decoder":
    """Return the decoder of a model, the same one as long as the model lives."""
    decoder = _decoders.get(model)
    if decoder is None:
        decoder = _decoders[model] = Decoder(model)
    return decoder


class Decoder:
    """Steps of a model in evaluation mode: each reads one token of every row.

    The engine is compiled at the first step, and again when weights have changed. It is not used with gradients,
    training mode, autocast, a GPU, half precision, hooks, modules that it does not know, or without numba. For more
    rows than a few, one step of each way is timed, once for each number of rows up to the next power of two.

    ``RESNET_BK_ENGINE=1`` uses it wherever it can be used, ``RESNET_BK_ENGINE=0`` never.
    """

    def __init__(self, model: LanguageModel, int8: bool = False):
        """Create the decoder of a model. int8: its engine stores matrices as int8 numbers."""
        self.int8 = int8
        self._model = weakref.ref(model)  # so that the model can be freed
        self.engine: Engine | None = None
        self.asked = _asked()
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._checksum: Tensor | None = None
        self._thresholds: list[float] = []
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
        """
        if self._allowed() and (engine := self._fresh(state)) is not None and self._is_faster(engine, ids, state):
            if not isinstance(state, EngineState):
                state = engine.from_torch(state)
            return torch.from_numpy(engine.step(ids[:, 0].numpy(), state).copy()), state
        output = self.model(ids, state=to_torch(state))
        return output.logits[:, 0], output.state

    def _allowed(self) -> bool:
        weight = self.model.embed.weight
        return not (
            self.asked is False
            or self.model.training
            or weight.device.type != "cpu"
            or weight.dtype not in (torch.float32, torch.float64)
            or (torch.is_grad_enabled() and weight.requires_grad)
            or torch.is_autocast_enabled("cpu")
            or torch._C._len_torch_dispatch_stack()
            or not self.model.config.causal
            or preferred_backend("cpu") != "numba"
        )

    def _fresh(self, state: Any) -> "Engine | None":
        """Return the engine with the weights of now; None if the model cannot be compiled.

        A text that goes on with a state of the engine is checked by the versions of the weights, another one by a sum.
        """
        engine = self.engine
        if (
            engine is not None
            and isinstance(state, EngineState)
            and [x._version for x in self._tensors] == self._versions
        ):
            return engine
        modules = list(self.model.modules())
        if any(type(m) not in KNOWN or m._forward_hooks or m._forward_pre_hooks for m in modules):
            return None
        tensors = [*self.model.parameters(), *self.model.buffers()]
        checksum = torch.stack([x.detach().double().sum() for x in tensors])
        thresholds = [m.threshold for m in modules if isinstance(m, AdaptiveDepth)]
        same = len(tensors) == len(self._tensors) and all(map(lambda x, y: x is y, tensors, self._tensors))
        if engine is None or not same or thresholds != self._thresholds or not torch.equal(checksum, self._checksum):  # type: ignore[arg-type]
            from resnet_bk.engine.engine import Engine  # numba is imported with the first step

            engine = self.engine = Engine(self.model, self.int8)
        self._tensors, self._versions = tensors, [x._version for x in tensors]
        self._checksum, self._thresholds = checksum, thresholds
        return engine

    def _is_faster(self, engine: "Engine", ids: Tensor, state: Any) -> bool:
        """Return whether the engine is to decode so many rows; measure it at the first time."""
        rows = len(ids)
        if self.asked or rows <= ALWAYS_ENGINE:
            return True
        size = 1 << (rows - 1).bit_length()
        if size not in self._faster:
            ours = state.copy() if isinstance(state, EngineState) else engine.from_torch(state)
            theirs = to_torch(state)
            seconds = []
            for run in (lambda: engine.step(ids[:, 0].numpy(), ours), lambda: self.model(ids, state=theirs)):
                run()
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            self._faster[size] = seconds[0] < seconds[1]
        return self._faster[size]
