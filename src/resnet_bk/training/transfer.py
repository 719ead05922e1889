"""Start from a trained model: copy its weights into one with other techniques, and learn from its predictions.

Dimensions: B sequences, N tokens, V vocabulary.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.adaptive.length import LearnedLength
from resnet_bk.adaptive.multiscale import MultiScale
from resnet_bk.layers.block import Block
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams
from resnet_bk.model import LanguageModel

# The layers whose parameters have a role of their own. Where they are nested does not matter: block 3 is block 3,
# whether adaptive depth drives it or not. All layers register the blocks in them in the order in which they run.
UNITS = (LanguageModel, Block, MultiScale, AdaptiveDepth, LearnedLength, NgramMemory, RecentNgrams)
Role = tuple[str, int, str]  # type of the unit, its number among those of the type, name of the parameter in it


def roles(model: LanguageModel) -> dict[Role, nn.Parameter]:
    """Return the parameters of a model by their roles."""
    found: dict[Role, nn.Parameter] = {}
    counts: Counter[str] = Counter()

    def visit(module: nn.Module, unit: tuple[str, int], path: str) -> None:
        if isinstance(module, UNITS):
            kind = "LanguageModel" if isinstance(module, LanguageModel) else type(module).__name__
            unit, path = (kind, counts[kind]), ""
            counts[kind] += 1
        for name, parameter in module.named_parameters(recurse=False):
            found[*unit, path + name] = parameter
        for name, child in module.named_children():
            visit(child, unit, f"{path}{name}.")

    visit(model, ("", 0), "")
    return found


@torch.no_grad()
def transfer(base: LanguageModel, model: LanguageModel) -> list[nn.Parameter]:
    """Copy the parameters of a trained model to those with the same roles; return the others of the new model.

    What only a technique of the base has, such as its exits, is left out.

    Raises:
        ValueError: the new model has no place for a parameter of the base's embedding, blocks, levels or head. The
            message names it.
    """
    theirs, ours = roles(base), roles(model)
    for role, parameter in theirs.items():
        partner = ours.get(role)
        if partner is not None and partner.shape == parameter.shape:
            partner.copy_(parameter)
        elif role[0] in ("LanguageModel", "Block", "MultiScale"):
            there = "none" if partner is None else f"one of shape {tuple(partner.shape)}"
            name = f"{role[2]} of {role[0]} {role[1]}"
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the new model has {there}")
    copied = {id(ours[role]) for role in theirs if role in ours and ours[role].shape == theirs[role].shape}
    return [parameter for parameter in model.parameters() if id(parameter) not in copied]


class Teacher:
    """The predictions of a trained model for the training text of another one."""

    def __init__(self, base: LanguageModel, model: LanguageModel):
        """Create it. base: in evaluation mode; its n-gram memory, if it has one, gets the tables of the new model's."""
        self._base, self._model = base.requires_grad_(False), model

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return log-probabilities (B, N, V) of the token after each of ids (B, N)."""
        theirs, ours = self._base.memory, self._model.memory
        if theirs is not None and ours is not None:  # not its own table, which was counted from this text too
            theirs.entries, theirs.held_back = ours.entries, ours.held_back
            theirs.train()
        logits = self._base(ids).logits
        assert logits is not None
        return logits.log_softmax(-1)
