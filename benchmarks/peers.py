"""Families of language models on the same bytes and machine: quality after equal training time, and costs.

``python benchmarks/peers.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B sequences, N tokens, V vocabulary.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import transformers
from common import arguments, batches, conditions, interleaved, publish, run_cells, spread, stdlib_ids, table, train
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trained import HELD_OUT, bits, held_out
from transformers import AutoConfig, AutoModelForCausalLM

from resnet_bk.model import LanguageModel
from resnet_bk.study.ledger import Ledger

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SECONDS, BATCH, LENGTH, SEEDS = 240, 12, 256, (0,)
WINDOWS = (LENGTH, 1_024)  # bytes per scored window
AT_ONCE = 16_384  # bytes of a prefill; one sequence if that is longer
PREFILLS = {512: 7, 2_048: 7, 8_192: 3, 32_768: 3}  # N -> timed runs
QUALITY_AT = 2_048  # N of the prefill and the FLOPs that quality is compared with
PROMPT, NEW, REPEATS = 64, 128, 7
VOCABULARY = 259
Times = dict[str, dict[str, list[float]]]  # measurement -> name -> milliseconds
MODELS_AT = Path("runs/benchmarks/peers")


# ------------------------------------------------------------------------------------------------ families


class Peer:
    """A model of any family, with the methods that this benchmark needs.

    Subclasses have three more:

    - ``logits(ids)``: logits (B, N, V) of ids (B, N).
    - ``flops(ids)``: operations of a forward pass.
    - ``read(ids, state=None)``: logits (B, 1, V) after the last of ids, and the state there, to continue from.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten())


class Ours(Peer):
    """A LanguageModel; its ledger counts the operations."""

    def __init__(self, **fields: Any):
        super().__init__(LanguageModel(VOCABULARY, n_seq=LENGTH, num_experts=1, **fields))

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits

    def read(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features = self.model.features(ids, state=state)
        return self.model.head(features.x[:, -1:]), features.state

    def flops(self, ids: Tensor) -> float:
        with Ledger(self.model) as ledger:
            self.model(ids)
        return ledger.total

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(x, targets=y, logits=False).loss


class HuggingFace(Peer):
    """A model of transformers, named by its `model_type`."""

    def __init__(self, kind: str, width: int, layers: int, **fields: Any):
        shape = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
        special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        config = AutoConfig.for_model(kind, tie_word_embeddings=True, **shape, **special, **fields)
        super().__init__(AutoModelForCausalLM.from_config(config))

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def read(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output = self.model(ids, use_cache=True, logits_to_keep=1, cache=state)
        return output.logits, output.cache

    def flops(self, ids: Tensor) -> float:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's counter leaves it out
        with FlopCounterMode(display=False, custom_mapping={attention: causal_attention_flops}) as counter:
            self.model(ids, use_cache=False)
        return counter.get_total_flops()


def causal_attention_flops(query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of both matrix products, without the part above the diagonal."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * (key[2] + 1) * width


def llama(width: int, layers: int) -> Peer:
    """Return a Llama (RoPE, SwiGLU) with heads and feed-forwards as wide as ours."""
    shape = {"num_attention_heads": width // 32, "intermediate_size": -(-width // 3) * 8}
    return HuggingFace(
        "llama", width, layers, max_position_embeddings=max(PREFILLS), attn_implementation="sdpa", **shape
    )


def nano_gpt(width: int, layers: int) -> Peer:
    """Return a GPT-2 without dropout.

    It has as many learned positions as the training length. Beyond, they start again, so longer texts can be timed.
    """
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": "sdpa"}
    peer = HuggingFace("gpt2", width, layers, num_attention_heads=width // 32, n_positions=LENGTH, **off)
    positions = peer.model.transformer.wpe
    positions.register_forward_pre_hook(lambda module, args: (args[0] % LENGTH,))
    return peer


def mamba2(width: int, layers: int) -> Peer:
    """Return a Mamba-2 in plain torch (its kernels need CUDA), with inner width 2 D and heads 64 wide."""
    shape = {"num_heads": width // 32, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 64}
    return HuggingFace("mamba2", width, layers, rescale_prenorm_residual=True, **shape)


ADAPTIVE = "ResNet-BK adaptive"
FAMILIES: dict[str, Callable[..., Peer]] = {
    "Llama": llama,
    "nanoGPT": nano_gpt,
    "Mamba-2": mamba2,
    "ResNet-BK plain": Ours,
    ADAPTIVE: Ours,
}


class Entry(NamedTuple):
    family: str
    fields: dict[str, Any]
    learning_rate: float


def words(*layers: int, **fields: Any) -> dict[str, Any]:
    """Return the model field for blocks on bytes, on words, and on bytes again."""
    return {"multiscale": {"factors": [4], "layers": list(layers), "boundaries": "whitespace", **fields}}


SIZES = ((64, 3), (96, 4), (128, 6))  # width, layers
# For the smallest width. Tried by hand, 150 s of one core of an AMD EPYC, one seed, bits per byte in better windows:
# Llama 1.724, 1.752, 1.748 at 3e-3, 6e-3, 1e-2; nanoGPT 2.512, 2.371 at 3e-3, 6e-3; Mamba-2 1.679, 1.672 at 6e-3, 1e-2;
# plain 1.584, 1.511, 1.481 and adaptive 1.551, 1.482, 1.486 at 3e-3, 6e-3, 1e-2.
RATES = {"Llama": 3e-3, "nanoGPT": 6e-3, "Mamba-2": 1e-2, "ResNet-BK plain": 1e-2, ADAPTIVE: 1e-2}


def entries() -> dict[str, Entry]:
    """Return every model by name. Learning rates are in inverse proportion to the width."""

    def entry(family: str, fields: dict[str, Any], width: int) -> Entry:
        return Entry(family, fields, round(RATES[family] * SIZES[0][0] / width, 5))

    found = {}
    for family in ("Llama", "nanoGPT", "Mamba-2"):
        for width, layers in SIZES:
            found[f"{family} {width} x {layers}"] = entry(family, {"width": width, "layers": layers}, width)
    for width, layers in SIZES:
        found[f"plain {width} x {layers}"] = entry("ResNet-BK plain", {"d_model": width, "n_layers": layers}, width)
    for name, fields in {
        "adaptive 64, 2-2-0": {"d_model": 64, **words(2, 2, 0)},
        "adaptive 64, words 128, 3-3-0": {"d_model": 64, **words(3, 3, 0, widths=[128])},
        "adaptive 96, 2-3-0": {"d_model": 96, **words(2, 3, 0)},
        "adaptive 128, 2-6-0": {"d_model": 128, **words(2, 6, 0)},
    }.items():
        found[name] = entry(ADAPTIVE, fields, fields["d_model"])
    return found


MODELS = entries()


# ------------------------------------------------------------------------------------------------ training


def planned(kind: str, seed: int) -> list[dict[str, Any]]:
    """Return a cell per model. kind: "training", or "memory" (of one step of the trained model)."""
    common = {"batch": BATCH, "length": LENGTH, "seconds": SECONDS, "seed": seed}
    return [{"kind": kind, "model": name, **entry._asdict(), **common} for name, entry in MODELS.items()]


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    if spec["kind"] == "memory":
        return {"peak_MiB": peak_of_step(load(spec["model"], spec["seed"]))}
    torch.manual_seed(spec["seed"])
    peer = FAMILIES[spec["family"]](**spec["fields"])
    peer.model.train()
    draw = batches(stdlib_ids()[0], spec["batch"], spec["length"], spec["seed"])
    rate = spec["learning_rate"]
    budget = {"seconds": spec["seconds"], "clock": time.process_time}
    result: dict[str, Any] = dict(train(peer.loss, peer.model, draw, learning_rate=rate, **budget))
    path = weights(spec["model"], spec["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(peer.model, str(path))
    peer.model.eval()
    result |= {f"bits_{window}": bits_per_byte(peer.logits, held_out(), window) for window in WINDOWS}
    return result | {"parameters": sum(p.numel() for p in peer.model.parameters())}


@torch.no_grad()
def bits_per_byte(logits: Callable[[Tensor], Tensor], rows: Tensor, window: int) -> float:
    """Return the bits per byte of rows (B, N + 1), cut into windows that do not see each other.

    Args:
        logits: returns logits (B, N, V) of ids (B, N).
        rows: held-out ids.
        window: bytes per window.
    """
    x, y = (part.reshape(-1, window).split(AT_ONCE // window) for part in (rows[:, :-1], rows[:, 1:]))
    pairs = zip(x, y, strict=True)
    return bits(torch.cat([F.cross_entropy(logits(a).transpose(1, 2), b, reduction="none") for a, b in pairs]))


def peak_of_step(peer: Peer) -> float:
    """Return by how many MiB resident memory rises at most during a training step. Linux only.

    getrusage's ru_maxrss does not serve: it starts at the peak of the parent process.
    """

    def resident(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what))

    rows = held_out()
    training_step(rows[:1, :17], peer)  # compiles kernels
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    training_step(rows[:BATCH, : LENGTH + 1], peer)
    return (resident("VmHWM") - before) / 1024


def weights(name: str, seed: int) -> Path:
    return MODELS_AT / f"{name.replace(',', '').replace(' ', '-')}-{seed}.safetensors"


def load(name: str, seed: int) -> Peer:
    peer = FAMILIES[MODELS[name].family](**MODELS[name].fields)
    load_model(peer.model, str(weights(name, seed)))
    peer.model.eval()
    return peer


# ------------------------------------------------------------------------------------------------- clocks


def in_turn(peers: dict[str, Peer], run: Callable[[Peer], Any], per: float, repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of each timed run divided by `per`, by name; models run in turn."""
    times = interleaved({name: partial(run, peer) for name, peer in peers.items()}, repeats)
    return {name: [1000 * s / per for s in seconds] for name, seconds in times.items()}


@torch.no_grad()
def decode(ids: Tensor, peer: Peer) -> None:
    """Generate NEW bytes greedily, one at a time, after ids (B, N)."""
    logits, state = peer.read(ids)
    for _ in range(NEW):
        logits, state = peer.read(logits.argmax(-1), state)


def training_step(rows: Tensor, peer: Peer) -> None:
    """Run forward and backward of rows (B, N + 1)."""
    peer.model.train()
    peer.loss(rows[:, :-1], rows[:, 1:]).backward()
    peer.model.zero_grad()
    peer.model.eval()


def clocks(peers: dict[str, Peer], rows: Tensor) -> Times:
    """Return milliseconds of prefill per byte at each N, of decoding per byte, and of a training step."""
    text = rows[:, :-1].flatten()
    found = {}
    for length, repeats in PREFILLS.items():
        ids = text[: max(AT_ONCE, length)].view(-1, length)
        read = torch.no_grad()(lambda peer, ids=ids: peer.read(ids))
        found[f"prefill {length}"] = in_turn(peers, read, ids.numel(), repeats)
    found["decode"] = in_turn(peers, partial(decode, text[:PROMPT].unsqueeze(0)), NEW, REPEATS)
    step = partial(training_step, rows[:BATCH, : LENGTH + 1])
    return found | {"step": in_turn(peers, step, 1, REPEATS)}


# --------------------------------------------------------------------------------------------------- page

PREFILL = f"prefill {QUALITY_AT}"
COSTS = {
    PREFILL: f"prefill at N = {QUALITY_AT:,}, ms a byte",
    "decode": "decoding, ms a byte",
    "step": "training step, ms",
    "flops": f"MFLOPs a byte, N = {QUALITY_AT:,}",
    "memory": "peak memory of a training step, MiB",
}
Found = dict[str, dict[str, float]]  # name -> "bits" and each cost of COSTS


def quality(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, found in runs.items():
        scores = [spread([r[f"bits_{window}"] for r in found], 3) for window in WINDOWS]
        seen = statistics.median(r["steps"] for r in found) * BATCH * LENGTH / 1e6
        row = [name, f"{found[0]['parameters']:,}", MODELS[name].learning_rate, spread([r["steps"] for r in found], 0)]
        rows.append([*row, f"{seen:.2f}", *scores])
    header = ["model", "parameters", "learning rate", "steps", "million bytes seen"]
    return table([*header, *(f"bits per byte, windows of {window:,}" for window in WINDOWS)], rows)


def beside_the_best(found: Found) -> str:
    """Return the table of each other family's best model against the fastest adaptive one of at least its quality."""
    rows = []
    for family in [f for f in FAMILIES if f != ADAPTIVE]:
        best = min((n for n in found if MODELS[n].family == family), key=lambda n: found[n]["bits"])
        reach = [n for n in found if MODELS[n].family == ADAPTIVE and found[n]["bits"] <= found[best]["bits"]]
        own = min(reach, key=lambda n: found[n][PREFILL], default=None)
        row = [f"{best}: {found[best]['bits']:.3f}", "none" if own is None else f"{own}: {found[own]['bits']:.3f}"]
        rows.append([*row, *("" if own is None else f"{found[best][c] / found[own][c]:.2f}" for c in COSTS)])
    return table(["best of its family: bits per byte", "ours", *(f"{c}, x ours" for c in COSTS.values())], rows)


def plot(found: Found, out: Path) -> None:
    """Plot bits per byte against each cost, with the best of each family up to that cost; an SVG next to the page."""
    figure, panels = plt.subplots(1, len(COSTS), figsize=(22, 4.5), sharey=True)
    for axes, cost in zip(panels, COSTS, strict=True):
        for number, family in enumerate(FAMILIES):
            points = sorted((f[cost], f["bits"]) for name, f in found.items() if MODELS[name].family == family)
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, color=f"C{number}", s=20)
            axes.step(x, list(accumulate(y, min)), where="post", color=f"C{number}", label=family)
        axes.set(xlabel=COSTS[cost], xscale="log")
    panels[0].set_ylabel(f"held-out bits per byte after {SECONDS} s")
    panels[0].legend(frameon=False)
    figure.savefig(out.with_suffix(".svg"), bbox_inches="tight")


def page(results: list[dict[str, Any]], memory: dict[str, float], out: Path | None) -> str:
    runs = {name: [r for r in results if r["cell"]["model"] == name] for name in MODELS}
    rows, peers = held_out(), {name: load(name, SEEDS[0]) for name in MODELS}
    text = rows[: 8 * QUALITY_AT // 1024, :-1].reshape(8, QUALITY_AT)
    times = clocks(peers, rows)
    found: Found = {}
    for name, peer in peers.items():
        with torch.no_grad():
            flops = peer.flops(text) / text.numel() / 1e6
        found[name] = {cost: statistics.median(times[cost][name]) for cost in (PREFILL, "decode", "step")}
        found[name] |= {"flops": flops, "memory": memory[name]}
        found[name]["bits"] = statistics.median(min(r[f"bits_{w}"] for w in WINDOWS) for r in runs[name])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot(found, out)
    prefill = [[name, *(spread(times[f"prefill {n}"][name], 4) for n in PREFILLS)] for name in MODELS]
    others = []
    for name, f in found.items():
        clocked = [spread(times[cost][name], 2) for cost in ("decode", "step")]
        others.append([name, *clocked, f"{f['flops']:.2f}", f"{f['memory']:.0f}"])
    return (
        f"\nBytes of the default corpus. {SECONDS} s of one core's time for each model, two at a time, batches of "
        f"{BATCH} x {LENGTH}, AdamW, cosine, at the learning rate given: in inverse proportion to the width, and at "
        "the least width the best, or as good, of two or three tried by hand (benchmarks/peers.py has what they gave). "
        f"Llama, GPT-2 (nanoGPT: no dropout) and Mamba-2 are transformers {transformers.__version__}'s, attention by "
        "torch's SDPA, Mamba-2 in plain torch (its fast kernels need CUDA); ours with numba. Width x layers; adaptive: "
        "width, blocks on bytes - on words - on bytes. Median (least to greatest).\n"
        f"\n## Quality in equal time\n\n{HELD_OUT:,} held-out bytes; runs of each model: {len(SEEDS)}. Learned "
        "positions and RoPE do not reach beyond the length of training: below, each model counts by the better of its "
        "two scores, whatever the length that its cost is taken at.\n\n"
        f"{quality(runs)}"
        f"\n## Prefill, ms a byte\n\nBoth cores, all models in turn, {', '.join(map(str, PREFILLS.values()))} times; "
        f"{AT_ONCE:,} bytes, or one sequence; caches and states are kept, logits of the last position alone. nanoGPT's "
        f"positions start again after {LENGTH}.\n\n{table(['model', *(f'N = {n:,}' for n in PREFILLS)], prefill)}"
        f"\n## Decoding, training, operations, memory\n\nDecoding: one sequence, {NEW} bytes after {PROMPT}, greedy, "
        "through caches and states, the prompt's prefill included. Training: forward and backward of "
        f"{BATCH} x {LENGTH}, both cores. FLOPs: matrix products, convolutions, causal attention, scans of a forward "
        "pass, Mamba-2's chunk products in full; ours by the ledger. Memory: resident, at its highest in forward and "
        "backward, above that before, in a process of its own with one thread.\n\n"
        f"{table(['model', *list(COSTS.values())[1:]], others)}"
        "\n## Beside the best of each family\n\nThe best model of each other family, and the adaptive one fastest in "
        f"prefill that is as good. More than 1: ours is cheaper.\n\n{beside_the_best(found)}"
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/peers.jsonl"))
    parser.add_argument("--train-only", action="store_true", help="fill the log and stop before the clocks")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    training = [spec for seed in SEEDS for spec in planned("training", seed)]
    results = run_cells(__file__, training, workers=2, log=options.log)
    memory = run_cells(__file__, planned("memory", SEEDS[0]), workers=2, log=options.log)
    if not options.train_only:
        head = "# Families of language models\n\n" + conditions("python benchmarks/peers.py")
        peaks = {r["cell"]["model"]: r["peak_MiB"] for r in memory}
        publish(head + page(results, peaks, options.out), options.out)


if __name__ == "__main__":
    main()
