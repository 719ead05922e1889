"""Muon: AdamW, except that the update of a matrix is its momentum made orthogonal.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). An update has the spectral norm that keeps its effect on
features the same at every width (Yang et al. 2023, arXiv:2310.17813), so that one learning rate can serve all widths.
At a width of 64 an entry moves about as far as with AdamW, which updates other parameters at the same rate.

``torch.optim.Muon`` is not used: it iterates in bfloat16 on every device, it takes one matrix at a time, and it does
not know that one parameter may hold several matrices.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_bk.layers.matrices import Matrices
from resnet_bk.training.states import MUON_ENTRIES, full_tensor, place_like

MOMENTUM, STEPS = 0.95, 5
# a, b, c of the polynomial a x + b x^3 + c x^5. Five steps take singular values of 0.002 to 1 to about 0.7 to 1.2, and
# make smaller ones up to 485 times as large.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # added to norms, so that the update of a gradient of zeros is zero
NORM = 1.6  # spectral norm of an update of a square matrix; entries of one 64 wide have 0.2, about as with AdamW
BATCH = 2**24  # numbers that are gathered and made orthogonal at a time; it bounds the memory of sharded training

Group = dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Orthogonal updates for matrices, AdamW for other parameters.

    The first group of parameters holds the matrices, the others are those of AdamW. Sharded parameters keep a sharded
    momentum; each process gathers the update of a whole matrix and applies its own shard of the result.
    """

    def __init__(
        self,
        matrices: Sequence[Matrices],
        others: Sequence[Group],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ):
        """Create the optimizer.

        Args:
            matrices: the parameters that hold matrices, each once.
            others: groups of parameters for AdamW, each with its weight decay.
            lr: learning rate of all groups.
            weight_decay: decoupled weight decay of the matrices.
            betas: of AdamW.
        """
        self._adamw = torch.optim.AdamW(list(others), lr=lr, betas=betas, fused=True)
        group = {
            "params": [m.parameter for m in matrices],
            "cuts": [(m.sizes, m.dim) for m in matrices],
            "entries": MUON_ENTRIES,
        }
        super().__init__([group, *self._adamw.param_groups], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if "cuts" in group:
                for some in _in_batches(group):
                    self._update(some, group["lr"], group["weight_decay"])
        # Set each time: load_state_dict replaces the groups and the state.
        self._adamw.param_groups = [group for group in self.param_groups if "cuts" not in group]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _update(self, matrices: Sequence[Matrices], lr: float, weight_decay: float) -> None:
        updates: list[Tensor] = []
        parts: list[Tensor] = []
        for parameter, sizes, dim in matrices:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = full_tensor(parameter.grad.lerp(momentum, MOMENTUM))  # Nesterov's
            updates.append(update)
            parts += update.split(sizes, dim) if sizes else [update]
        orthogonalize_(parts)
        for (parameter, _, _), update in zip(matrices, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(place_like(update, parameter), alpha=-lr)


def _in_batches(group: Group) -> Iterator[list[Matrices]]:
    """Yield the matrices of a group that have a gradient, about BATCH numbers at a time."""
    some: list[Matrices] = []
    for parameter, (sizes, dim) in zip(group["params"], group["cuts"], strict=True):
        if parameter.grad is None:
            continue
        if some and sum(m.parameter.numel() for m in some) + parameter.numel() > BATCH:
            yield some
            some = []
        some.append(Matrices(parameter, sizes, dim))
    if some:
        yield some


def orthogonalize_(parts: Sequence[Tensor]) -> None:
    """Replace each matrix by the nearest semi-orthogonal one, about, times ``NORM sqrt(max(1, outputs / inputs))``.

    parts: (outputs, inputs), or (number, inputs, outputs) as experts have them; changed in place. Those of one shape,
    or of its transpose, are computed together.
    """
    by_shape: dict[torch.Size, list[tuple[Tensor, float]]] = defaultdict(list)
    for x in parts:
        inputs, outputs = x.shape[-2:] if x.dim() == 3 else reversed(x.shape)
        wide = x if x.shape[-2] <= x.shape[-1] else x.mT
        norm = NORM * math.sqrt(max(1, outputs / inputs))
        by_shape[wide.shape[-2:]].append((wide if wide.dim() == 3 else wide.unsqueeze(0), norm))
    for stacks in by_shape.values():
        results = newton_schulz(torch.cat([x for x, _ in stacks])).split([len(x) for x, _ in stacks])
        for (x, norm), y in zip(stacks, results, strict=True):
            x.copy_(y.mul_(norm))


def newton_schulz(x: Tensor) -> Tensor:
    """Take the singular values of matrices x (B, R, C), R <= C, towards 1 by STEPS steps of Newton and Schulz.

    The products are computed in bfloat16 on a GPU and in float32 on a CPU, which often has no fast bfloat16; matrices
    in float64 stay in float64. The result has the dtype of x.
    """
    a, b, c = COEFFICIENTS
    exact = torch.promote_types(x.dtype, torch.float32)
    dtype = torch.bfloat16 if x.is_cuda and exact == torch.float32 else exact
    y = x.to(exact)
    y = (y / (torch.linalg.matrix_norm(y, keepdim=True) + EPSILON)).to(dtype)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.to(x.dtype)
