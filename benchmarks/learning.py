"""Families of language models with and without our n-gram memory: bits per byte at equal training time.

``python benchmarks/learning.py --seconds 3600 --seeds 0 --out benchmarks/results/...`` runs every cell that is not in
the log yet. ``--search`` runs cells from which shape, optimizer, rate and window of the other families were chosen.

The counting of the memory's tables is part of the training time. Dimensions: B sequences, N tokens, V vocabulary.
"""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import CORPORA, arguments, conditions, mean_nats, publish, run_cells, spread, state_file, table, train
from memory import LARGEST, ORDERS, SCORED, SUCCESSORS, TOKENS, batches
from peers import VOCABULARY, HuggingFace, llama, mamba2, words
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from resnet_bk.config import MemoryConfig, ModelConfig
from resnet_bk.layers.block import Tokens
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams
from resnet_bk.layers.matrices import Matrices
from resnet_bk.model import LanguageModel

SCORES, WATCHED = 8, 2**16  # scores of a curve; bytes of each
RECENT = [2, 3, 4, 6, 8, 12]
MEMORY = {"orders": ORDERS, "rows": LARGEST, "successors": SUCCESSORS, "recent": RECENT}


class Contestant(NamedTuple):
    """A family and how it is trained; window: bytes of a training and scoring window."""

    family: str
    width: int
    layers: int
    optimizer: str
    learning_rate: float
    window: int


SEARCH = [
    Contestant(family, *shape, *recipe)
    for family in ("Llama", "GPT-2", "Mamba-2")
    for shape, recipe in (
        ((96, 4), ("muon", 0.006, 256)),
        ((96, 4), ("muon", 0.012, 256)),
        ((96, 4), ("muon", 0.003, 256)),
        ((96, 4), ("adamw", 0.003, 256)),
        ((96, 4), ("muon", 0.006, 1024)),
        ((64, 3), ("muon", 0.006, 256)),
    )
]
SEARCH_SECONDS = 240
OTHERS = [  # the best of the search, whose updates had entries of one size; rates for those of one spectral norm
    Contestant("Llama", 96, 4, "muon", 0.007, 256),
    Contestant("GPT-2", 96, 4, "muon", 0.014, 256),
    Contestant("Mamba-2", 96, 4, "muon", 0.012, 256),
]
SMALL, WIDE = Contestant("ours", 64, 3, "muon", 0.01, 1024), Contestant("ours", 96, 5, "muon", 0.008, 256)
LONG = 1200  # seconds from which larger models are tried too
LARGE = [WIDE._replace(window=1024), Contestant("Llama", 128, 6, "muon", 0.007, 512)]


def chosen(memory: bool, seconds: float) -> list[Contestant]:
    """Return the contestants: the best of minutes; for long trainings, two sizes of each family that is close."""
    longer = [c._replace(window=1024) for c in OTHERS] if memory else []  # which recent n-grams may want
    return [*(LARGE if seconds >= LONG else []), SMALL if memory or seconds >= LONG else WIDE, *OTHERS, *longer]


FAMILIES = ("ours", "Llama", "GPT-2", "Mamba-2")


class Ours(nn.Module):
    """A LanguageModel with one block on bytes, or without memory two, and the others on words."""

    def __init__(self, contestant: Contestant, memory: bool):
        super().__init__()
        on_bytes = 1 if memory else 2
        shape = words(on_bytes, contestant.layers - on_bytes, 0)
        fields = {"d_model": contestant.width, "n_seq": contestant.window, "num_experts": 1, **shape}
        self.model = LanguageModel(VOCABULARY, **fields, memory=MEMORY if memory else {})
        self.memory = self.model.memory

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(x, targets=y, logits=False).loss


class Peer(nn.Module):
    """A model of transformers, with our memory added to its embeddings; its linear layers are matrices for Muon."""

    def __init__(self, contestant: Contestant, memory: bool):
        super().__init__()
        family, width, layers, _, _, window = contestant
        build = {"Llama": llama, "Mamba-2": mamba2, "GPT-2": partial(gpt2, window)}[family]
        self.model = build(width, layers).model
        config = ModelConfig(
            vocab_size=VOCABULARY, d_model=width, n_seq=window, num_experts=1, memory=MemoryConfig(**MEMORY)
        )
        self.memory = NgramMemory(config) if memory else None
        self.recent = RecentNgrams(config) if memory else None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        vectors = self.model.get_input_embeddings()(x)
        for layer in (self.memory, self.recent):
            if layer is not None:
                vectors, _, _ = layer(vectors, Tokens(x), None, None)
        return F.cross_entropy(self.model(inputs_embeds=vectors, use_cache=False).logits.flatten(0, 1), y.flatten())

    def matrices(self) -> list[Matrices]:
        """Return the weights of linear layers but the head; projections that are stored as one are cut."""
        found = []
        for name, module in self.model.named_modules():
            if name.endswith("c_attn"):
                found.append(Matrices(module.weight, (module.weight.shape[0],) * 3, -1))
            elif name.endswith("in_proj"):  # of Mamba-2: gate, x, B, C and time steps
                inner, rows = self.model.config.num_heads * self.model.config.head_dim, len(module.weight)
                state = self.model.config.state_size
                found.append(Matrices(module.weight, (inner, inner, state, state, rows - 2 * inner - 2 * state), 0))
            elif isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head":
                found.append(Matrices(module.weight))
        return found


def gpt2(window: int, width: int, layers: int) -> HuggingFace:
    """Return a GPT-2 without dropout, with a learned position for each byte of a window."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": "sdpa"}
    return HuggingFace("gpt2", width, layers, num_attention_heads=width // 32, n_positions=window, **off)


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model for seconds of a core, and score it; "curve" has (seconds, bits per byte) while it trains."""
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    contestant = Contestant(*spec["contestant"])
    model = (Ours if contestant.family == "ours" else Peer)(contestant, spec["memory"])
    training, held_out = CORPORA["stdlib"][0]()
    counting: dict[str, float] = {}
    draw = partial(next, batches(model.memory, training, contestant.window, spec["seed"], counting))
    budget = {"seconds": spec["seconds"], "clock": time.process_time}
    recipe = {"learning_rate": contestant.learning_rate, "optimizer": contestant.optimizer}

    def bits(limit: int) -> float:
        model.eval()  # reads the table of the whole training text
        nats = mean_nats(model.loss, held_out, contestant.window, limit)
        model.train()
        return nats / math.log(2)

    watched = {"score": partial(bits, WATCHED), "scored": score_times(spec["seconds"])[:-1]}
    record = train(model.loss, model, draw, **watched, **recipe, **budget, state=state_file(__file__, spec))
    record["curve"].append((spec["seconds"], bits(WATCHED)))
    parameters = sum(p.numel() for p in model.parameters())
    return {"bits_per_byte": bits(SCORED), "parameters": parameters, **counting, **record}


def score_times(seconds: float) -> list[float]:
    """Return when a training of so many seconds is scored: each time after twice as long, the last one at its end."""
    return [seconds / 2**i for i in range(SCORES - 1, -1, -1)]


def page(results: list[dict[str, Any]]) -> str:
    """Return a table: a row for each model and budget."""
    rows = []
    names = ("contestant", "memory", "seconds")
    for wanted in dict.fromkeys(json.dumps([r["cell"][name] for name in names]) for r in results):
        own = [r for r in results if json.dumps([r["cell"][name] for name in names]) == wanted]
        (family, width, layers, optimizer, rate, window), memory, seconds = json.loads(wanted)
        shape = f"{family} {width} x {layers}"
        scores = [spread([r[name] for r in own], digits) for name, digits in (("bits_per_byte", 4), ("steps", 0))]
        with_memory = "yes" if memory else "no"
        rows.append(
            [
                f"{seconds:,}",
                shape,
                with_memory,
                optimizer,
                rate,
                window,
                f"{own[0]['parameters']:,}",
                len(own),
                *scores,
            ]
        )
    header = [
        "core-s",
        "model",
        "memory",
        "optimizer",
        "rate",
        "window",
        "parameters",
        "seeds",
        "bits per byte",
        "steps",
    ]
    return table(header, rows)


def curves(results: list[dict[str, Any]]) -> str:
    """Return a table of held-out bits per byte while each model trains, for the last budget."""
    last = results[-1]["cell"]["seconds"]
    rows = []
    for r in (r for r in results if r["cell"]["seconds"] == last):
        (family, width, layers, *_, window), memory = r["cell"]["contestant"], "yes" if r["cell"]["memory"] else "no"
        found = dict(r["curve"])
        scores = [f"{found[x]:.3f}" if x in found else "" for x in score_times(last)]
        rows.append([f"{family} {width} x {layers}, {window}", memory, r["cell"]["seed"], *scores])
    return table(["model, window", "memory", "seed", *(f"{x:.3g} s" for x in score_times(last))], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/learning.jsonl"))
    parser.add_argument("--seconds", nargs="+", type=int, default=[3600], help="budgets, in seconds of a core")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--memory", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--search", action="store_true", help="run the search instead")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    if options.search:
        cells = [{"contestant": list(c), "memory": False, "seconds": SEARCH_SECONDS, "seed": 0} for c in SEARCH]
    else:
        cells = [
            {"contestant": list(c), "memory": memory == "yes", "seconds": seconds, "seed": seed}
            for seconds in options.seconds
            for seed in options.seeds
            for memory in options.memory
            for c in chosen(memory == "yes", seconds)
            if c.family in options.only
        ]
    results = run_cells(__file__, cells, workers=options.workers, log=options.log)
    text = "# Learning per second\n\n" + conditions(" ".join(["python benchmarks/learning.py", *sys.argv[1:]]))
    text += (
        f"\nDefault corpus, {TOKENS} bytes a step, cosine, one thread a run, {options.workers} runs at a time. Memory: "
        f"n-gram memory of {', '.join(map(str, ORDERS))} bytes, {LARGEST:,} entries, counted within the time, and "
        f"recent n-grams of {', '.join(map(str, RECENT))} bytes, {MemoryConfig().recent_rows:,} entries; added to the "
        f"embeddings. Bits per byte on {SCORED // 1024} KiB of held-out text in windows as long as those of the "
        "training: median (least to greatest).\n\n"
    )
    text += page(results) + f"\nWhile they train, on the first {WATCHED // 1024} KiB:\n\n" + curves(results)
    publish(text, options.out)


if __name__ == "__main__":
    main()
