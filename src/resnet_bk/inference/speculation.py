"""Self-speculative greedy decoding: the first blocks draft, all verify (Elhoushi et al. 2024, arXiv:2404.16710).

States are never changed in place, so going back to an earlier one is free. The later blocks read all drafted positions
at once; where a draft was wrong, they read the right ones again together with the next draft.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_bk.adaptive.early_exit import EarlyExit, confidence
from resnet_bk.layers.block import Stack
from resnet_bk.model import LanguageModel


@dataclass(frozen=True)
class Drafts:
    """tokens: (1, new) int64. drafted, accepted: tokens that the first blocks proposed, and that all of them confirmed.
    rounds: times that the later blocks ran."""

    tokens: Tensor
    drafted: int
    accepted: int
    rounds: int


@torch.no_grad()
def speculate(model: LanguageModel, ids: Tensor, new: int, draft: int = 8, sure: float = 0.5) -> Drafts:
    """Continue ids (1, N) by `new` tokens: those that greedy decoding through all blocks gives, in fewer runs of most.

    A draft ends after `draft` tokens, or where its confidence falls below `sure`. Rounding differs between one position
    at a time and several at once, so where two tokens are within rounding of each other the choice may differ.

    Raises:
        ValueError: the model has no exits (model.depth.policy 'exit'), or ids are not of one sequence.
    """
    layer = model.blocks[0]
    if not isinstance(layer, EarlyExit) or not len(layer.segments):
        raise ValueError("model: has no early exit to draft with; train it with model.depth.policy 'exit'")
    model.check(ids, None, None)
    if len(ids) != 1:
        raise ValueError(f"ids: expected one sequence, got {len(ids)}; sequences accept different numbers of drafts")
    if new < 1 or draft < 1:
        raise ValueError(f"new, draft: expected 1 or more tokens, got {new} and {draft}")
    first, later = layer.first, Stack(block for segment in layer.stacks for block in segment)
    x, early, _ = first(model.embed(ids), ids, None, None)
    x, late, _ = later(x, ids, None, None)
    tokens = [model.read(x[:, -1:]).argmax(-1)]
    pending: list[Tensor] = []  # right positions that the later blocks' state does not know yet, (1, 1, D) each
    drafted = accepted = rounds = 0
    while len(tokens) < new:
        token, features, states, guesses = tokens[-1], [], [], []
        for _ in range(min(draft, new - len(tokens))):
            x, early, _ = first(model.embed(token), token, early, None)
            logits = model.read(x)
            token = logits.argmax(-1)
            features.append(x)
            states.append(early)
            guesses.append(token)
            if sure > 0 and confidence(logits, "probability").item() < sure:
                break
        y, after, _ = later(torch.cat([*pending, *features], dim=1), None, late, None)
        truth = model.read(y[:, len(pending) :]).argmax(-1)
        wrong = (torch.cat(guesses, dim=1) != truth)[0].nonzero()
        right = len(guesses) if len(wrong) == 0 else int(wrong[0])
        used = min(right + 1, len(guesses))  # positions read that stand: the last one's guess may be wrong
        tokens += truth[:, :used].split(1, dim=1)
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
