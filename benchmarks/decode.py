"""Decoding one sequence: the engine beside torch, other families, a plain read of weights; what techniques save.

``python benchmarks/decode.py --out benchmarks/results/...`` times everything in one process, in turn, one thread.
``--llama2c FOLDER`` adds llama2.c: FOLDER has its program, built by ``gcc -Ofast -march=native run.c -o run -lm``, and
its tokenizer.bin. Models have random weights and read held-out text, so what they decide is set, not learned.

Dimensions: V vocabulary, D width.
"""

import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, conditions, publish, spread, stdlib_ids, table
from peers import PROMPT, llama, mamba2, nano_gpt, words

from resnet_bk.engine.compiler import engine_of
from resnet_bk.engine.conversion import from_torch
from resnet_bk.engine.engine import Engine
from resnet_bk.jit import jit_on_one_thread
from resnet_bk.jit.simd import LANE_BYTES, load, splat, store
from resnet_bk.layers.feedforward import Experts
from resnet_bk.layers.sparse import SparseBKCore
from resnet_bk.model import LanguageModel

BYTES, REPEATS, STEPS, FEW_STEPS = 259, 7, 400, 12
CONTEXTS, PIECE = (1_000, 10_000, 100_000), 4096
LARGE = {"d_model": 512, "n_layers": 12}  # of the original's example, with a vocabulary of 50,000
EIGHT = {"d_model": 128, "n_layers": 8}
EVERYTHING = {
    "d_model": 128,
    "num_experts": 4,
    "d_ff": 176,
    "experts": {"policy": "top_p"},
    "sparsity": {"target": 0.5},
    "depth": {"policy": "act"},
    "memory": {"orders": [2, 3, 4, 6], "rows": 100_000},
    **words(2, 6, 0),
}
Read = Callable[[list[int]], Any]  # reads tokens one by one


@jit_on_one_thread
def _read(x, out):
    lanes = LANE_BYTES // x.itemsize
    a = b = c = d = splat(x.dtype.type(0))
    for i in range(0, x.size - 4 * lanes, 4 * lanes):
        a += load(x, i)
        b += load(x, i + lanes)
        c += load(x, i + 2 * lanes)
        d += load(x, i + 3 * lanes)
    store(out, 0, a + b + c + d)


def made(vocabulary: int = BYTES, **fields: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocabulary, **{"n_seq": 256, "num_experts": 1, **fields}).eval()


def counted(model: LanguageModel) -> LanguageModel:
    assert model.memory is not None
    model.memory.count(stdlib_ids()[0])
    return model.eval()


def by_engine(engine: Engine) -> Read:
    """Return what reads as `resnet-bk generate` does, all tokens in one call."""
    state, logits = engine.start(), np.zeros(engine.code.vocabulary, engine.code.weights.dtype)
    return lambda tokens: engine.write(tokens, state, logits)


def by_torch(model: LanguageModel) -> Read:
    state: Any = None

    def read(tokens: list[int]) -> None:
        nonlocal state
        for token in tokens:
            state = model(torch.tensor([[token]]), state=state).state

    return read


def by_peer(make: Callable[..., Any]) -> Read:
    torch.manual_seed(0)
    peer = make(128, 4)
    peer.model.eval()
    state = peer.read(torch.ones(1, PROMPT, dtype=torch.long))[1]

    def read(tokens: list[int]) -> None:
        nonlocal state
        for token in tokens:
            state = peer.read(torch.tensor([[token]]), state)[1]

    return read


def timed(ways: dict[str, Read], text: np.ndarray, number: dict[str, int]) -> dict[str, list[float]]:
    """Return milliseconds a token of each repeat, by name. The ways take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, read in ways.items():
            tokens = text[: number.get(name, STEPS)].tolist()
            started = time.perf_counter()
            read(tokens)
            if repeat:  # the first compiles
                times[name].append(1e3 * (time.perf_counter() - started) / len(tokens))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
    return spread([a / b for a, b in zip(times[slow], times[fast], strict=True)], 1)


def of_models(text: np.ndarray) -> str:
    """Compare the engine with torch, and with other families."""
    models = {
        "plain, 4 blocks of 128": made(d_model=128, n_layers=4),
        "`fast`": counted(LanguageModel.from_preset("fast", BYTES)),
        "`fast` without memory": LanguageModel.from_preset("fast", BYTES, memory={}).eval(),
        "all techniques": made(**EVERYTHING),
    }
    ways: dict[str, Read] = {}
    for name, model in models.items():
        ways[name] = by_engine(engine_of(model))
        ways[f"{name}, int8"] = by_engine(engine_of(model, int8=True))
        ways[f"{name}, torch"] = by_torch(model)
    peers = {"Llama": llama, "GPT-2": nano_gpt, "Mamba-2": mamba2}
    ways |= {name: by_peer(make) for name, make in peers.items()}
    slow = {name: 40 for name in ways if name.endswith("torch") or name in peers}
    times = timed(ways, text, slow)
    rows = []
    for name in models:
        speeds = [1e3 / statistics.median(times[way]) for way in (name, f"{name}, int8", f"{name}, torch")]
        rows.append([name, *(f"{x:,.0f}" for x in speeds), ratio(times, f"{name}, torch", name)])
    found = table(["model", "engine, bytes/s", "int8", "torch", "engine / torch"], rows)
    first = next(iter(models))
    rows = [[n, f"{1e3 / statistics.median(times[n]):,.0f}", ratio(times, n, first)] for n in peers]
    return (
        f"\n## Models of bytes\n\n{found}\nOther families, 4 layers of width 128, by transformers in torch:\n\n"
        + table(["family", "bytes/s", f"engine ({first}) / it"], rows)
    )


def of_large_models(text: np.ndarray, folder: Path | None) -> str:
    """Compare the weights that the engine reads a second with a plain read, and with llama2.c."""
    model = made(50_000, **LARGE)
    engine, small = engine_of(model), engine_of(model, int8=True)
    out = np.zeros(64, np.float32)
    ways: dict[str, Read] = {
        "engine": by_engine(engine),
        "int8": by_engine(small),
        "torch": by_torch(model),
        "read": lambda tokens: [_read(engine.code.weights, out) for _ in tokens],
    }
    times = timed(ways, text, dict.fromkeys(ways, FEW_STEPS))
    size = {
        "engine": engine.code.weights.nbytes,
        "torch": engine.code.weights.nbytes,
        "read": engine.code.weights.nbytes,
    }
    size["int8"] = small.code.weights.nbytes + small.code.bytes.nbytes
    rows = []
    for name in ways:
        speed = [size[name] / 1e6 / t for t in times[name]]
        rows.append([name, f"{size[name] / 1e6:,.0f}", spread(times[name], 2), spread(speed, 1)])
    found = table(["way", "MB of weights", "ms a token", "GB/s of weights"], rows)
    text_ = f"\n## 12 blocks of 512, vocabulary 50,000\n\n{found}\n"
    text_ += f"The engine reads {ratio(times, 'read', 'engine')} as many weights a second as a plain read of them; "
    text_ += f"int8 is {ratio(times, 'engine', 'int8')} times as fast as float32.\n"
    return text_ if folder is None else text_ + llama2c(folder, statistics.median(times["engine"]), size["engine"])


def llama2c(folder: Path, milliseconds: float, size: int) -> str:
    """Run llama2.c with random weights: 12 layers of 512, a vocabulary of 32,000."""
    width, hidden, layers, heads, vocabulary, length = 512, 1376, 12, 8, 32_000, 512
    a_layer = 2 * width + 4 * width * width + 3 * width * hidden
    numbers = vocabulary * width + layers * a_layer + width + length * width // heads
    file = folder / "random.bin"
    with file.open("wb") as target:
        target.write(struct.pack("7i", width, hidden, layers, heads, heads, vocabulary, length))
        target.write((0.02 * np.random.default_rng(0).standard_normal(numbers, np.float32)).tobytes())
    speeds = []
    for _ in range(REPEATS):
        command = ["./run", "random.bin", "-t", "0", "-n", "128"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True, errors="replace")
        speeds.append(4 * numbers / 1e9 * float(done.stderr.split("achieved tok/s:")[1].split()[0]))
    ours = size / 1e6 / milliseconds
    return (
        f"\nllama2.c (-Ofast, one thread, {4 * numbers / 1e6:,.0f} MB of random weights, 128 tokens) reads "
        f"{spread(speeds, 1)} GB/s, the engine {ours / statistics.median(speeds):.2f} times as much.\n"
    )


def halfway(model: LanguageModel, text: np.ndarray, blocks: float) -> float:
    """Give exits random weights, and a bias at which positions run `blocks` blocks in the mean; return that mean."""
    layer, low, high, mean = model.blocks[-1], -1.0, 1.0, 0.0
    layer.threshold = 0.9
    for unit in layer.units:
        unit.weight.data.normal_()
    for _ in range(16):
        for unit in layer.units:
            unit.bias.data.fill_((low + high) / 2)
        engine = engine_of(model)
        state, total = engine.start(), 0
        for token in text.tolist():
            engine.step([token], state)
            total += int(engine.blocks(state)[0])
        mean = total / len(text)
        low, high = ((low + high) / 2, high) if mean < blocks else (low, (low + high) / 2)
    return mean


def decide(model: LanguageModel, top_p: float) -> LanguageModel:
    """Let the sites of a model be kept by a random half, and its tokens use few experts."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SparseBKCore):
                module.importance.bias.zero_()
            if isinstance(module, Experts):
                module.settings = type(module.settings)(**{**vars(module.settings), "top_p": top_p})
                module.router.weight.mul_(4)
    return model


def of_techniques(text: np.ndarray) -> str:
    """Compare each technique with the same model without its savings."""
    exits = made(**EIGHT, depth={"policy": "exit"})
    mean = halfway(exits, text, 4.5)
    few = engine_of(exits)
    exits.blocks[-1].threshold = 1.0
    experts = {"num_experts": 4, "d_ff": 176, "experts": {"policy": "top_p"}, "sparsity": {"target": 0.5}}
    ways = {
        f"exit, {mean:.2f} of 8 blocks": by_engine(few),
        "exit, all blocks": by_engine(engine_of(exits)),
        "words, 2-6-0": by_engine(engine_of(made(d_model=128, **words(2, 6, 0)))),
        "8 blocks": by_engine(engine_of(made(**EIGHT))),
        "few experts, half of the sites": by_engine(engine_of(decide(made(**EIGHT, **experts), 0.5))),
        "all experts, all sites": by_engine(engine_of(_all(made(**EIGHT, **experts)))),
    }
    times, names = timed(ways, text, {}), list(ways)
    rows = [
        [a, b, f"{1e3 / statistics.median(times[a]):,.0f}", ratio(times, b, a)]
        for a, b in zip(names[::2], names[1::2], strict=True)
    ]
    note = "\nBlocks are 128 wide. Decisions are random.\n"
    return "\n## What a technique saves\n\n" + table(["model", "beside", "bytes/s", "times as fast"], rows) + note


def _all(model: LanguageModel) -> LanguageModel:
    """Let a model keep all sites and use all experts."""
    model = decide(model, 1.0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SparseBKCore):
                module.importance.bias.fill_(1e3)
            if isinstance(module, Experts):
                module.router.weight.mul_(1e-3)
    return model


def of_contexts() -> str:
    """Show that a token takes as long after a long text as after a short one."""
    model, rows, state, done = made(d_model=128, n_layers=4), [], None, 0
    engine = engine_of(model)
    for context in CONTEXTS:
        for piece in torch.randint(BYTES, (1, context - done)).split(PIECE, dim=1):
            state = model(piece, state=state, logits=False).state
        done = context
        here, logits = from_torch(engine, state), np.zeros(BYTES, np.float32)
        tokens, times = np.random.default_rng(0).integers(3, BYTES, STEPS).tolist(), []
        for _ in range(REPEATS):
            started = time.perf_counter()
            engine.write(tokens, here, logits)
            times.append(1e6 * (time.perf_counter() - started) / STEPS)
        rows.append([f"{context:,}", spread(times, 1), f"{here.numbers.nbytes / 1024:.1f}"])
    return "\n## Long texts\n\n4 blocks of 128.\n\n" + table(["tokens before", "µs a token", "state, KiB"], rows)


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--llama2c", type=Path, help="folder with llama2.c's program `run` and tokenizer.bin")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = np.resize(stdlib_ids()[1], STEPS).astype(np.int64)
    page = "# Decoding\n\n" + conditions(
        "python benchmarks/decode.py" + (" --llama2c FOLDER" if options.llama2c else "")
    )
    page += "\nOne sequence, one thread. Medians (least to greatest) of seven repeats in turn; ratios are of repeats.\n"
    parts = (partial(of_models, text), partial(of_large_models, text, options.llama2c), partial(of_techniques, text))
    publish(page + "".join(part() for part in (*parts, of_contexts)), options.out)


if __name__ == "__main__":
    main()
