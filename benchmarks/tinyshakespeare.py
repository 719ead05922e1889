"""Tiny Shakespeare by characters: nanoGPT's CPU recipe against a model of ours in equal wall-clock time.

The flat Transformer (4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 steps, no dropout) trains first. Our model
then trains for exactly as many seconds on the same machine, seed by seed. Split: first 90%, last 10%.

Dimensions: B sequences per step, N tokens.
"""

import math
import statistics
from pathlib import Path

import numpy as np
import torch
from common import SHARED, arguments, batches, conditions, mean_nats, publish, spread, table, train
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.model import LanguageModel

BLOCK, BATCH, STEPS, SEEDS = 64, 12, 2000, (0, 1, 2)
OUR_LENGTH, OUR_BATCH, OUR_RATE, OUR_OPTIMIZER = 256, 6, 5e-3, "muon"
OUR_SHAPE = {"d_model": 96, "n_layers": 3}


class FlatTransformer(nn.Module):
    """GPT-2's block at nanoGPT's CPU size: learned positions, pre-norm, GELU, tied head, no biases, no dropout."""

    def __init__(self, vocab_size: int, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.embed, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(BLOCK, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(layers))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for layer in (*self.out, *self.down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for i, qkv in enumerate(self.qkv):
            q, k, v = qkv(self.norms[2 * i](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out[i](y.transpose(1, 2).flatten(-2))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.norms[-1](x) @ self.embed.weight.T


def load(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Return train ids, validation ids (uint16) and the number of different characters."""
    text = path.read_text()
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([alphabet[character] for character in text], np.uint16)
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(alphabet)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--text", type=Path, default=SHARED / "data/tinyshakespeare/input.txt")
    options = parser.parse_args()
    train_ids, val_ids, vocab_size = load(options.text)
    flat_rows, our_rows = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        flat = FlatTransformer(vocab_size)

        def flat_loss(x: Tensor, y: Tensor, model: nn.Module = flat) -> Tensor:
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

        draw = batches(train_ids, BATCH, BLOCK, seed)
        record = train(flat_loss, flat, draw, steps=STEPS, learning_rate=1e-3, warmup=0.05, final=0.1)
        flat_rows.append({**record, "nats": mean_nats(flat_loss, val_ids, BLOCK)})
        torch.manual_seed(seed)
        ours = LanguageModel(vocab_size, **OUR_SHAPE, n_seq=OUR_LENGTH)

        def our_loss(x: Tensor, y: Tensor, model: LanguageModel = ours) -> Tensor:
            loss = model(x, targets=y, logits=False).loss
            assert loss is not None
            return loss

        draw = batches(train_ids, OUR_BATCH, OUR_LENGTH, seed)
        budget = {"seconds": record["seconds"], "optimizer": OUR_OPTIMIZER}
        record = train(our_loss, ours, draw, learning_rate=OUR_RATE, **budget)
        scores = {f"nats{n}": mean_nats(our_loss, val_ids, n) for n in (BLOCK, OUR_LENGTH)}
        our_rows.append({**record, **scores, "nats": scores[f"nats{OUR_LENGTH}"]})
        print(flat_rows[-1], our_rows[-1], flush=True)
    gaps = [a["nats"] - b["nats"] for a, b in zip(flat_rows, our_rows, strict=True)]
    rows = []
    for name, found, model, tokens, context in (
        ("flat Transformer, nanoGPT's CPU recipe", flat_rows, flat, BATCH * BLOCK, BLOCK),
        (f"ResNet-BK, 3 blocks of 96, {OUR_OPTIMIZER}", our_rows, ours, OUR_BATCH * OUR_LENGTH, OUR_LENGTH),
    ):
        steps = [r["steps"] for r in found]
        row = [name, f"{sum(p.numel() for p in model.parameters()):,}", spread([r["seconds"] for r in found], 1)]
        row += [
            spread(steps, 0),
            f"{statistics.median(steps) * tokens:,.0f}",
            context,
            spread([r["nats"] for r in found], 4),
        ]
        rows.append(row)
    header = ["model", "parameters", "seconds", "steps", "characters seen", "context", "validation nats"]
    text = "# Tiny Shakespeare\n\n" + conditions("python benchmarks/tinyshakespeare.py")
    text += (
        "\nMedian (least to greatest) of three seeds; validation on all of the last 10%, in windows of the context.\n\n"
    )
    text += table(header, rows) + f"\nOurs lower by {spread(gaps, 4)} nats, seed by seed. "
    text += f"Ours in windows of {BLOCK}, the Transformer's own: {spread([r[f'nats{BLOCK}'] for r in our_rows], 4)}.\n"
    publish(text, options.out)


if __name__ == "__main__":
    main()
