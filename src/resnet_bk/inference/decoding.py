"""Decode without a host-device sync per token. On a GPU, each step is one replay of a CUDA graph.

A step launches hundreds of small kernels. At small batch sizes, launching them takes longer than running them. The
state has constant size, so every step does the same work on the same memory and can be captured once as a graph.
Generated tokens stay on the device. The host reads them only to see whether all sequences have ended.

Dimensions: B sequences, N tokens of a prompt, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_bk.engine.decoder import decoder_of
from resnet_bk.engine.state import EngineState
from resnet_bk.layers.feedforward import computed_in
from resnet_bk.model import LanguageModel


class StaticStep:
    """A decoding step whose inputs, state and outputs stay in fixed buffers.

    ``step(ids)`` computes what ``model(ids, state=state)`` does for one token per sequence. It returns the logits and
    updates the state in place. On a GPU, the constructor captures the step as a CUDA graph under the autocast settings
    that are active then, and each call replays it. On a CPU, each call runs the model. Weights may change in place
    between calls.

    Learned length is not supported. Multi-scale, adaptive depth and sparsity need a `bound` in the model's
    configuration; blocks that a token could skip then run, and a mask keeps their result out.

    Attributes:
        state: nested sequence of tensors (B, ...), the state of the sequences so far.
    """

    def __init__(self, model: LanguageModel, state: Sequence[Any]):
        """Copy `state`, which a call of the model has returned. On a GPU, capture the step.

        Raises:
            ValueError: a technique of the model needs a host-device sync; the model has experts and is on a GPU without
                bfloat16; or the state is not one of the model, see :meth:`resnet_bk.LanguageModel.forward`.
            TypeError: a part of the state has another type or dtype.
        """
        if syncs := model.config.host_syncs:
            remedies = ["leave model.length out" if name == "length" else f"set model.{name}.bound" for name in syncs]
            raise ValueError(
                f"model: this way of decoding allows no host-device sync, but {' and '.join(syncs)} would need one; "
                f"{' and '.join(remedies)}, or decode by calling the model"
            )
        self.model = model
        batch = next((len(x) for x in pytree.tree_leaves(state) if isinstance(x, Tensor) and x.dim()), 1)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.embed.weight.device)
        model.check(self.ids, state=state)
        self.state = pytree.tree_map(torch.clone, list(state))
        self.graph = self._capture() if self.ids.is_cuda else None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits (B, V) after ids (B, 1). On a GPU they are in a buffer that the next call overwrites."""
        if ids.shape != self.ids.shape or ids.dtype not in (torch.int64, torch.int32):
            expected = f"int64 or int32 of shape {tuple(self.ids.shape)}"
            raise ValueError(f"ids: expected {expected}, got {ids.dtype} of shape {tuple(ids.shape)}")
        self.ids.copy_(ids)
        if self.graph is None:
            self.logits = self._run()
        else:
            self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        kind = self.ids.device.type
        # Autocast must not cache its copies of the weights: replays of the graph would keep reading old copies.
        dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
            output = self.model(self.ids, state=self.state)
        self._set_state(output.state)
        return output.logits[:, 0]

    def _set_state(self, state: Sequence[Any]) -> None:
        for buffer, new in zip(pytree.tree_leaves(self.state), pytree.tree_leaves(list(state)), strict=True):
            buffer.copy_(new)

    @torch.no_grad()
    def _capture(self) -> torch.cuda.CUDAGraph:
        if self.model.config.num_experts > 1 and computed_in(self.model.embed.weight) != torch.bfloat16:
            raise ValueError(
                "model: on a GPU, this way of decoding needs experts in bfloat16; create the step inside "
                'torch.autocast("cuda", torch.bfloat16), or convert the model to bfloat16'
            )
        start = pytree.tree_map(torch.clone, self.state)  # `capture` runs the step, which changes the state
        graph, self.logits = capture(self._run)
        self._set_state(start)
        return graph


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return `run` as a CUDA graph, and the tensor into which each replay writes the result.

    `run` is executed three times before the capture. The capture records the kernels without executing them.
    """
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):  # compilation and first allocations must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@torch.no_grad()
def generate(
    model: LanguageModel,
    ids: Tensor,
    new: int,
    *,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    stop: int | None = None,
    sync_every: int = 32,
) -> Tensor:
    """Generate the tokens that follow a prompt.

    Args:
        model: a causal model in eval mode. On a GPU :class:`StaticStep` must accept it.
        ids: (B, N) int64 or int32, the prompt.
        new: largest number of tokens to generate.
        mask: (B, N) bool, False for padding, which must not be at the end of a row. Default: no padding.
        temperature: temperature of sampling; 0 takes the most likely token.
        stop: id that ends a sequence. It is kept, and repeated up to the length of the longest sequence. Default: none.
        sync_every: the host checks after every `sync_every` tokens whether all sequences have ended; only with `stop`.

    Returns:
        (B, M) int64 with M <= new, without the prompt.

    Raises:
        ValueError: `new` or `sync_every` is below 1, `temperature` is negative or not finite, `stop` is outside the
            vocabulary, or a row ends with padding; also as :class:`StaticStep` and
            :meth:`resnet_bk.LanguageModel.forward`.
        TypeError: as :meth:`resnet_bk.LanguageModel.forward`.
    """
    if new < 1 or sync_every < 1:
        raise ValueError(f"new, sync_every: expected 1 or more, got {new} and {sync_every}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if stop is not None and not 0 <= stop < model.config.vocab_size:
        raise ValueError(f"stop: got {stop}, allowed a token id from 0 to {model.config.vocab_size - 1}")
    model.check(ids, mask=mask)
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("mask: a row ends with padding, allowed on the left: the next token follows the last position")
    features = model.features(ids, mask)
    logits, step = model.head(features.x[:, -1]), _steps(model, features.state)
    tokens = torch.empty(len(ids), new, dtype=torch.int64, device=ids.device)
    for i in range(new):
        tokens[:, i] = choose(logits, temperature)
        done = i + 1
        if stop is not None and done % sync_every == 0 and bool((tokens[:, :done] == stop).any(1).all()):
            break
        if done < new:
            logits = step(tokens[:, i : i + 1])
    tokens = tokens[:, :done]
    if stop is None:
        return tokens
    ends = tokens == stop
    after = ends.cumsum(1) > ends.long()
    return tokens.masked_fill(after, stop)[:, : int((~after).sum(1).max())]


def _steps(model: LanguageModel, state: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return a function of the next ids (B, 1) that returns their logits (B, V); on a CPU the engine computes them."""
    if model.embed.weight.is_cuda:
        return StaticStep(model, state)
    kept: list[Sequence[Any] | EngineState] = [state]

    def step(ids: Tensor) -> Tensor:
        logits, kept[0] = decoder_of(model).step(ids, kept[0])
        return logits

    return step


def choose(logits: Tensor, temperature: float) -> Tensor:
    """Return the most likely token of logits (B, V), or a sample if the temperature is above 0: (B,) int64.

    The sample is argmax p / e with e exponentially distributed, which has the distribution p. torch.multinomial would
    be a host-device sync.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)
