"""The controller that holds a measured quantity at its target through the loss."""

from torch import Tensor


def price(measured: Tensor, target: float | Tensor, band: float, limit: float = 1.0) -> Tensor:
    """Return the factor of a penalty on a differentiable stand-in for `measured`.

    The factor is 0 at the target and changes by 1 for each `band` of distance, between -limit and limit. A positive
    factor pushes the quantity down, a negative one up, so that it settles where the task's gradient and the penalty
    balance, close to the target.

    Args:
        measured: scalar, what the hard decisions amount to; without a gradient.
        target: the value to hold, in the unit of `measured`.
        band: distance from the target at which the factor is 1.
        limit: the largest absolute value.
    """
    return ((measured - target) / band).clamp(-limit, limit)
