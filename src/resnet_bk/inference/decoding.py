"""Decoding that does not wait: a step in buffers that stay in place, replayed on a GPU as one CUDA graph.

A step launches hundreds of small kernels, and at small batches launching them takes longer than running them. The
state has constant size, so a step is the same work on the same memory every time: captured once, replayed by one call.
Tokens stay on the device; the host looks at them now and then.

Dimensions: B sequences, N tokens of a prompt, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_bk.config import TECHNIQUES
from resnet_bk.layers.feedforward import computed_in
from resnet_bk.model import LanguageModel

REMEDIES = {name: f"set model.{name}.bound" for name in TECHNIQUES} | {"length": "leave model.length out"}


class StaticStep:
    """``step(ids)``, ids (B, 1), is ``model(ids, state=state)``: the logits (B, V) after it, and the state moves on.

    On a GPU it is captured when made, in the autocast that is on there, and replayed by each call; elsewhere a call
    runs the model. Weights may change in place in between. Techniques that decide something about the token need a
    `bound` in the model's configuration, and then run masked where they would have skipped.

    state: of the same sequences so far, (B, ...) each; moved on by each call.
    """

    def __init__(self, model: LanguageModel, state: Sequence[Any]):
        """state: as a call of the model returned it; it is copied.

        Raises:
            ValueError: the model decides something that the host must wait for.
        """
        if waiting := model.config.host_syncs:
            raise ValueError(
                f"model: the host waits for what {', '.join(waiting)} decides, so steps are not all the same work; "
                f"{' and '.join(REMEDIES[name] for name in waiting)}, or decode by calling the model"
            )
        self.model = model
        self.state = pytree.tree_map(torch.clone, list(state))
        like = pytree.tree_leaves(self.state)[0]
        self.ids = torch.zeros(len(like), 1, dtype=torch.int64, device=like.device)
        self.graph = self._captured() if like.is_cuda else None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids: (B, 1). The logits are a buffer: the next call writes over it."""
        self.ids.copy_(ids)
        if self.graph is None:
            self.logits = self._run()
        else:
            self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        kind = self.ids.device.type
        # Autocast's copies of weights must not outlive it: a graph would go on reading them.
        dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
            output = self.model(self.ids, state=self.state)
        self._move_to(output.state)
        return output.logits[:, 0]

    def _move_to(self, state: Sequence[Any]) -> None:
        for buffer, new in zip(pytree.tree_leaves(self.state), pytree.tree_leaves(list(state)), strict=True):
            buffer.copy_(new)

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        if self.model.config.num_experts > 1 and computed_in(self.model.embed.weight) != torch.bfloat16:
            raise ValueError("model: experts without a host that waits are bfloat16's; make the step inside autocast")
        start = pytree.tree_map(torch.clone, self.state)
        graph, self.logits = captured(self._run)
        self._move_to(start)
        return graph


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`run` as a CUDA graph, and the tensor that each replay writes what it returns to. It is called three times first,
    and not once more: capturing runs nothing."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is compiled or allocated at first must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
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
    look_every: int = 32,
) -> Tensor:
    """Tokens that follow ids (B, N): (B, M) int64, M <= new.

    Args:
        mask: (B, N) bool, False for padding, which must stand on the left.
        temperature: of sampling; 0 takes the likeliest token.
        stop: a token at which a sequence ends; it is kept, and repeated to the end of the longest one.
        look_every: steps after which the host looks whether all have ended.

    Raises:
        ValueError: `new` or `look_every` below 1, a negative temperature, or as :class:`StaticStep` and the model.
    """
    if new < 1 or look_every < 1:
        raise ValueError(f"new, look_every: expected 1 or more, got {new} and {look_every}")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    model.check(ids, None, mask)
    features = model.features(ids, mask)
    logits, step = model.head(features.x[:, -1]), StaticStep(model, features.state)
    tokens = torch.empty(len(ids), new, dtype=torch.int64, device=ids.device)
    for i in range(new):
        tokens[:, i] = choose(logits, temperature)
        done = i + 1
        if stop is not None and done % look_every == 0 and bool((tokens[:, :done] == stop).any(1).all()):
            break
        if done < new:
            logits = step(tokens[:, i : i + 1])
    tokens = tokens[:, :done]
    if stop is None:
        return tokens
    ends = tokens == stop
    after = ends.cumsum(1) > ends.long()
    return tokens.masked_fill(after, stop)[:, : int((~after).sum(1).max())]


def choose(logits: Tensor, temperature: float) -> Tensor:
    """(B, V) -> (B,) the likeliest token, or a sample: the least of exponential waiting times, which needs none of the
    checks for which torch.multinomial has the host wait."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)
