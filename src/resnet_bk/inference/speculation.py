"""Self-speculative greedy decoding (Elhoushi et al. 2024, arXiv:2404.16710).

The first blocks of a model with early exit draft tokens, and all blocks verify them. States are never changed in place,
so returning to an earlier state is free. The later blocks read all positions of a draft in parallel. After a wrong
draft, they read its accepted positions again, together with the next draft.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_bk.adaptive.early_exit import EarlyExit, confidence
from resnet_bk.layers.block import Stack, Tokens
from resnet_bk.model import LanguageModel


@dataclass(frozen=True)
class Drafts:
    """Result of speculative decoding.

    Attributes:
        tokens: (1, new) int64, the generated tokens.
        drafted: number of tokens that the first blocks have drafted.
        accepted: number of drafted tokens that the later blocks have confirmed.
        rounds: number of drafts verified.
    """

    tokens: Tensor
    drafted: int
    accepted: int
    rounds: int


def exits(model: LanguageModel) -> EarlyExit:
    """Return the layer with the early exits of a model.

    Raises:
        ValueError: the model has none.
    """
    layer = model.blocks[-1]
    if not isinstance(layer, EarlyExit) or not len(layer.segments):
        raise ValueError("model: has no early exit to draft with; train it with model.depth.policy 'exit'")
    return layer


@torch.no_grad()
def speculate(model: LanguageModel, ids: Tensor, new: int, draft: int = 8, sure: float = 0.5) -> Drafts:
    """Generate the tokens of greedy decoding through all blocks, with fewer runs of the later blocks.

    One position and several positions in parallel round differently. So the result may differ from greedy decoding
    where the logits of two tokens are equal up to rounding.

    Args:
        model: trained with model.depth.policy 'exit'.
        ids: (1, N) int64 or int32, the prompt.
        new: number of tokens to generate.
        draft: largest number of tokens in a draft.
        sure: end a draft after a token whose probability is below this.

    Raises:
        ValueError: the model has no early exits, `ids` has more than one sequence, or `new` or `draft` is below 1.
    """
    layer = exits(model)
    model.check(ids)
    ids = ids.long()
    if len(ids) != 1:
        raise ValueError(f"ids: expected one sequence, got {len(ids)}; each would accept a different number of drafts")
    if new < 1 or draft < 1:
        raise ValueError(f"new, draft: expected 1 or more tokens, got {new} and {draft}")
    first = Stack([*model.blocks.part(0, -1), *layer.first])  # with n-gram memory, if the model has one
    later = Stack(block for segment in layer.stacks for block in segment)
    x, early, _ = first(model.embed(ids), Tokens(ids), None, None)
    x, late, _ = later(x, None, None, None)
    tokens = [model.read(x[:, -1:]).argmax(-1)]
    pending: list[Tensor] = []  # accepted positions that are not in the later blocks' state yet, (1, 1, D) each
    drafted = accepted = rounds = 0
    while len(tokens) < new:
        token, features, states, guesses = tokens[-1], [], [], []
        for _ in range(min(draft, new - len(tokens))):
            x, early, _ = first(model.embed(token), Tokens(token), early, None)
            logits = model.read(x)
            token = logits.argmax(-1)
            features.append(x)
            states.append(early)
            guesses.append(token)
            if sure > 0 and confidence(logits, "probability").item() < sure:
                break
        y, after, _ = later(torch.cat([*pending, *features], dim=1), None, late, None)
        verified = model.read(y[:, len(pending) :]).argmax(-1)
        wrong = (torch.cat(guesses, dim=1) != verified)[0].nonzero()
        right = len(guesses) if len(wrong) == 0 else int(wrong[0])
        used = min(right + 1, len(guesses))  # after the right guesses, the verified token replaces the first wrong one
        tokens += verified[:, :used].split(1, dim=1)
        early = states[used - 1]
        drafted, accepted, rounds = drafted + len(guesses), accepted + right, rounds + 1
        if used == len(guesses):
            late, pending = after, []
        else:
            pending += features[:used]
            if len(pending) >= draft:
                _, late, _ = later(torch.cat(pending, dim=1), None, late, None)
                pending = []
    return Drafts(torch.cat(tokens, dim=1), drafted, accepted, rounds)
