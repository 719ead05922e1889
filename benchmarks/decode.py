"""Decoding: time and memory per token by the length of the context.

Dimensions: B sequences, N tokens.
"""

import resource
import statistics

import torch
from common import arguments, conditions, publish, seconds_of, spread, table
from torch.utils import _pytree as pytree

from resnet_bk.model import LanguageModel

CONTEXTS, PIECE, NEW = (1_000, 10_000, 100_000), 4096, 200


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    model = LanguageModel(259, d_model=128, n_layers=4, n_seq=256, num_experts=1).eval()
    rows = []
    state, done = None, 0
    for context in CONTEXTS:
        ids = torch.randint(259, (1, context - done))
        for piece in ids.split(PIECE, dim=1):
            state = model(piece, state=state, logits=False).state
        done = context
        token, here, times = torch.tensor([[1]]), state, []
        for _ in range(NEW):

            def step() -> None:
                nonlocal here, token
                output = model(token, state=here)
                here, token = output.state, output.logits[:, -1:].argmax(-1)

            times += seconds_of(step, 1, 0)
        size = sum(x.numel() * x.element_size() for x in pytree.tree_leaves(here))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        milliseconds = [1e3 * t for t in sorted(times)[NEW // 20 : -NEW // 20]]
        rows.append([f"{context:,}", spread(milliseconds, 3), f"{1e3 / statistics.median(milliseconds):,.0f}"])
        rows[-1] += [f"{size / 1024:.1f}", f"{memory:,.0f}"]
    text = "# Decoding\n\n" + conditions("python benchmarks/decode.py")
    text += f"\n4 blocks, D = 128, bytes, one sequence, greedy; {NEW} tokens at each context, "
    text += "5% slowest and fastest left out.\n\n"
    header = [
        "context, tokens",
        "ms a token: median (least to greatest)",
        "tokens per second",
        "state, KiB",
        "peak RSS, MiB",
    ]
    publish(text + table(header, rows), options.out)


if __name__ == "__main__":
    main()
