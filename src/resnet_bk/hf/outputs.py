"""Results of a forward pass in transformers' form: the cache, and the output with logits.

Dimensions: B batch, N positions, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

from resnet_bk.engine.conversion import to_torch
from resnet_bk.engine.state import EngineState

# The name of a cache in outputs and arguments; transformers has renamed it from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecurrentCache:
    """The model's state between calls. Its size does not depend on the length, and it cannot be cropped."""

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # makes generate() pass only the positions that are not in the cache yet

    def __init__(self, state: Sequence[Any] | EngineState, length: int):
        self.kept, self.length = state, length

    @property
    def state(self) -> Sequence[Any]:
        """The state as :meth:`LanguageModel.forward` takes it."""
        return to_torch(self.kept)

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.kept = state

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self.state, "length": self.length}  # a state of the engine cannot be pickled

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions read so far, including padding."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # transformers' value for "no limit"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the state of each row i by that of row ``beam_idx[i]``, for beam search."""
        if isinstance(self.kept, EngineState):
            self.kept = self.kept.rows(beam_idx.numpy())
        else:
            self.kept = pytree.tree_map(lambda x: x.index_select(0, beam_idx.to(x.device)), self.kept)


# For torch.export, and so that a saved program may have a cache among its example inputs.
pytree.register_pytree_node(
    RecurrentCache,
    lambda cache: ([list(cache.state), cache.length], None),
    lambda parts, _: RecurrentCache(*parts),
    serialized_type_name="resnet_bk.RecurrentCache",
    flatten_with_keys_fn=lambda cache: (
        [(pytree.GetAttrKey("state"), list(cache.state)), (pytree.GetAttrKey("length"), cache.length)],
        None,
    ),
)
torch.serialization.add_safe_globals([RecurrentCache])


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """Output of transformers' causal language models, with the weighted sum of the auxiliary losses.

    Attributes:
        loss: (), the cross-entropy plus `aux_loss`; None without targets.
        logits: (B, N or logits_to_keep, V); None with `skip_logits`.
        cache: :class:`RecurrentCache`; called past_key_values in older versions of transformers.
        hidden_states: the embeddings, then the output of each layer of ``model.blocks``, the last one normed; each
            (B, N, D). None if they were not asked for.
        aux_loss: (), weighted sum of the auxiliary losses, a part of `loss`.
    """

    aux_loss: Tensor | None = None
