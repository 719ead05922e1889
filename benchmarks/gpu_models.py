"""Models on a GPU: training in equal time, decoding, and a million tokens in one sequence.

Dimensions: B sequences, N tokens.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import batches, stdlib_ids, table, table_row, train
from gpu_page import Machine
from peers import VOCABULARY, HuggingFace, Ours, Peer, bits_per_byte
from torch import Tensor
from torch.utils import _pytree as pytree
from trained import held_out
from transformers import StaticCache

from resnet_bk.inference.decoding import StaticStep, capture
from resnet_bk.layers.block import Block
from resnet_bk.model import LanguageModel
from resnet_bk.training.sharded import recompute

WORDS = 5 / 16  # bound on words per byte: no window of 1,024 bytes of the corpus has more than 0.27
WINDOW = 1_024  # bytes per scored window
PIECE = 4_096  # tokens of a long prompt read per call


def sizes(machine: Machine) -> tuple[int, int, int]:
    """Return width, blocks and heads; about 50 million parameters unless quick."""
    return (32, 3, 1) if machine.quick else (512, 16, 8)


def plain(machine: Machine) -> Peer:
    width, layers, heads = sizes(machine)
    return Ours(d_model=width, n_layers=layers, n_heads=heads)


def adaptive(machine: Machine) -> Peer:
    """Return a model with two blocks on bytes and the others on words; its shapes do not depend on the text."""
    width, layers, heads = sizes(machine)
    scales = {"factors": [4], "layers": [2, layers - 2, 0], "boundaries": "whitespace", "bound": WORDS}
    return Ours(d_model=width, n_heads=heads, multiscale=scales)


def transformer(machine: Machine) -> Peer:
    width, layers, heads = sizes(machine)
    shape = {"num_attention_heads": heads, "intermediate_size": -(-width // 3) * 8}
    return HuggingFace("llama", width, layers, max_position_embeddings=2**17, attn_implementation="sdpa", **shape)


MODELS: dict[str, tuple[Callable[[Machine], Peer], float]] = {  # name -> function that makes it, learning rate
    "plain": (plain, 1e-3),
    "adaptive, 2 blocks on bytes, the others on words": (adaptive, 1e-3),
    "Transformer (Llama)": (transformer, 6e-4),
}


def compile_blocks(machine: Machine, model: torch.nn.Module) -> None:
    """Compile each block; blocks of one kind share the result."""
    for module in model.modules():
        if isinstance(module, Block) or type(module).__name__ == "LlamaDecoderLayer":
            machine.compile(module)


def training(machine: Machine, seconds: float) -> Iterator[str]:
    """Train each model for `seconds` on the default corpus; report tokens/s, utilization, held-out bits per byte."""
    batch, length = (2, WINDOW) if machine.quick else (32, 2_048)
    ids, _ = stdlib_ids()
    rows = held_out()[: 2 if machine.quick else None]
    torch._dynamo.config.recompile_limit = 64  # blocks meet several widths, masks and modes
    yield (
        f"Default corpus, {len(ids):,} bytes. {seconds:.0f} s of training each, compilation not counted; "
        f"{batch} x {length:,} bytes per step, AdamW, cosine, bfloat16 by autocast, blocks compiled. MFU: three times "
        "the FLOPs of a forward pass (ours by the ledger, as executed; the Transformer's with causal attention), as a "
        f"share of the dense bfloat16 peak of {machine.name}. {rows.numel():,} held-out bytes in windows of "
        f"{WINDOW:,}.\n\n"
    )
    header = ["model", "parameters", "learning rate", "steps", "passes over the corpus", "thousand tokens/s", "MFU, %"]
    yield table([*header, "MFLOPs per byte, forward", "peak GiB", "bits per byte"], [])
    for name, (make, rate) in MODELS.items():
        if machine.late:
            yield table_row([name, "left out: out of time", *[""] * 8])
            continue
        torch.manual_seed(0)
        peer = make(machine)
        with torch.no_grad():
            sample = rows[:2, :-1].reshape(1, -1)
            flops = peer.flops(sample) / sample.numel()
        peer.model.to(machine.device).train()
        compile_blocks(machine, peer.model)

        def loss_of(x: Tensor, y: Tensor, peer: Peer = peer) -> Tensor:
            with machine.autocast():
                return peer.loss(x.to(machine.device), y.to(machine.device))

        found: dict[str, float] = {}

        def run(found: dict[str, float] = found, loss_of: Any = loss_of, peer: Peer = peer, rate: float = rate) -> None:
            draw = batches(ids, batch, length, seed=0)
            found |= train(loss_of, peer.model, draw, seconds=seconds, learning_rate=rate, first=(batch, length))

        peak = machine.peak_gib(run)
        score = bits_per_byte(functools.partial(_logits, machine, peer), rows, WINDOW)
        seen = found["steps"] * batch * length
        speed = seen / found["seconds"]
        used = f"{300 * flops * speed / machine.peak_flops:.1f}" if machine.peak_flops else "peak unknown"
        count = sum(p.numel() for p in peer.model.parameters())
        cells = [f"{count:,}", rate, found["steps"], f"{seen / len(ids):.2f}", f"{speed / 1e3:,.1f}", used]
        yield table_row([name, *cells, f"{flops / 1e6:.1f}", f"{peak:.1f}", f"{score:.3f}"])


@torch.compiler.set_stance("force_eager")  # scoring has other shapes; compiling them would cost more than it saves
def _logits(machine: Machine, peer: Peer, ids: Tensor) -> Tensor:
    peer.model.eval()
    with machine.autocast():
        return peer.logits(ids.to(machine.device)).float().cpu()


# --------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def decoding(machine: Machine) -> Iterator[str]:
    """Time decoding steps of the plain and the adaptive model; their cost does not depend on the context."""
    contexts, many = _contexts(machine)
    yield (
        "Untrained weights in bfloat16; greedy, tokens stay on the device. Graph: the step is replayed as a CUDA graph "
        f"(on a CPU it is called); called: kernel by kernel. Mean of {_steps_of(machine)} steps, median of 3 runs.\n\n"
    )
    yield table(STEP_HEADER, [])
    for name, make in (("plain", plain), ("adaptive", adaptive)):
        model = make(machine).model.to(machine.device, torch.bfloat16).eval()
        state, done = None, 0
        for context in contexts:
            for piece in torch.randint(VOCABULARY, (1, context - done), device=machine.device).split(PIECE, dim=1):
                state = model(piece, state=state, logits=False).state
            done = context
            for batch in (1, many):
                start = pytree.tree_map(lambda s, b=batch: s.expand(b, *s.shape[1:]).clone(), state)
                held = sum(x.numel() * x.element_size() for x in pytree.tree_leaves(start))
                for way, kind in (("called", Called), ("graph", StaticStep)):
                    yield _measured(machine, f"{name}, {way}", context, batch, kind(model, start), held)


def _contexts(machine: Machine) -> tuple[tuple[int, int], int]:
    """Return the context lengths in tokens, and the larger batch size (the smaller is 1)."""
    return ((16, 64), 2) if machine.quick else ((1_000, 100_000), 64)


def _steps_of(machine: Machine) -> int:
    return 4 if machine.quick else 100


class Called:
    """A decoding step that calls the model, kernel by kernel."""

    def __init__(self, model: LanguageModel, state: Any):
        self.model, self.state = model, state

    def __call__(self, ids: Tensor) -> Tensor:
        output = self.model(ids, state=self.state)
        self.state = output.state
        return output.logits[:, 0]


class CachedStep:
    """A decoding step of a transformers model, with a static cache that is full up to `context`."""

    def __init__(self, model: torch.nn.Module, batch: int, context: int, capacity: int, graph: bool):
        """Fill the cache with random keys and values.

        Args:
            model: a causal language model of transformers.
            batch: sequences.
            context: positions in the cache before the first step.
            capacity: positions that the cache can hold.
            graph: capture the step as a CUDA graph and replay it.
        """
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=capacity)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._run()  # allocates the buffers
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self._at(context - 4)
        self.graph, self.logits = capture(self._run) if graph else (None, None)
        self._at(context)

    def _at(self, position: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(position)

    def _run(self) -> Tensor:
        return self.model(self.ids, use_cache=True, cache=self.cache, logits_to_keep=1).logits[:, 0]

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.logits


@torch.no_grad()
def cached_decoding(machine: Machine) -> Iterator[str]:
    """Time decoding steps of a Transformer with its cache of keys and values."""
    model = transformer(machine).model.to(machine.device, torch.bfloat16).eval()
    contexts, many = _contexts(machine)
    width, layers, _ = sizes(machine)
    yield "As above, with a static cache that random keys and values fill up to the context.\n\n"
    yield table(STEP_HEADER, [])
    for way in ("called", "graph"):
        for context in contexts:
            for batch in (1, many):
                capacity = context + 5 * _steps_of(machine)
                held = 2 * 2 * layers * batch * capacity * width
                if machine.on_gpu and held > 0.8 * torch.cuda.mem_get_info(machine.device)[0]:
                    why = f"does not fit: {held / 2**30:,.0f} GiB"
                    yield table_row([f"Transformer, {way}", f"{context:,}", batch, why, "", f"{held / 2**20:,.1f}"])
                    continue
                step = CachedStep(model, batch, context, capacity, way == "graph" and machine.on_gpu)
                yield _measured(machine, f"Transformer, {way}", context, batch, step, held)
                del step
                machine.forget()


STEP_HEADER = ["model", "context", "sequences", "ms per step", "tokens/s", "state or cache, MiB"]


def _measured(
    machine: Machine, name: str, context: int, batch: int, step: Callable[[Tensor], Tensor], held: int
) -> str:
    """Return a table row: steps run one after the other, with one host-device sync at their end."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=machine.device)
    steps = _steps_of(machine)

    def run() -> None:
        for _ in range(steps):
            token.copy_(step(token).argmax(-1, keepdim=True))

    seconds = machine.seconds(run, repeats=3, warmup=1) / steps
    return table_row(
        [name, f"{context:,}", batch, f"{1e3 * seconds:.3f}", f"{batch / seconds:,.0f}", f"{held / 2**20:,.1f}"]
    )


# ----------------------------------------------------------------------------------------------- memory


def memory(machine: Machine) -> Iterator[str]:
    """Time forward and backward of a million bytes in one sequence, and their peak memory."""
    width, tokens = (32, 1_000) if machine.quick else (256, 2**20)
    yield (
        f"One sequence of {tokens:,} random bytes, D = {width}, bfloat16 by autocast, forward and backward. "
        "Recomputed: only each block's input is kept; its forward pass runs again during the backward pass.\n\n"
    )
    yield table(["blocks", "recomputed", "parameters", "seconds", "thousand tokens/s", "peak GiB"], [])
    ids = torch.randint(VOCABULARY, (1, tokens + 1), device=machine.device)
    for blocks, again in ((8, True), (2, False)):
        model = LanguageModel(VOCABULARY, d_model=width, n_layers=blocks, num_experts=1, n_heads=max(1, width // 64))
        model.to(machine.device).train()
        if again:
            recompute(model)

        def step(model: LanguageModel = model) -> None:
            with machine.autocast():
                loss = model(ids[:, :-1], targets=ids[:, 1:], logits=False).loss
            loss.backward()
            model.zero_grad()

        step()
        times: list[float] = []
        peak = machine.peak_gib(lambda step=step, times=times: times.append(machine.seconds(step, 1, 0)))
        count = sum(p.numel() for p in model.parameters())
        cells = [f"{count:,}", f"{times[0]:.2f}", f"{tokens / times[0] / 1e3:,.0f}", f"{peak:.2f}"]
        yield table_row([blocks, "yes" if again else "no", *cells])
