"""How much a weight matters: the lower its score, the sooner it is removed."""

import dataclasses
from collections.abc import Callable

from keras import ops


def magnitude(weight):
    """`|w|`"""
    return ops.abs(weight)


def taylor(gradient, weight):
    """`|g · w|`, summed over the steps since the last choice: about how much the loss would change without the weight.

    Paper: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019).
    """
    return ops.abs(gradient * weight)


def movement(gradient, weight):
    """`-g · w`, summed over all steps: whether training moves the weight away from zero.

    Paper: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020).
    """
    return -gradient * weight


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A score by name.

    Args:
        of_weight: `weight -> scores`, where weights are all it takes.
        of_step: `(gradient, weight) -> scores`, summed up from step to step.
        forgets: Whether the sum starts anew whenever masks are chosen.
    """

    of_weight: Callable | None = None
    of_step: Callable | None = None
    forgets: bool = False


CRITERIA = {
    "magnitude": Criterion(of_weight=magnitude),
    "taylor": Criterion(of_step=taylor, forgets=True),
    "movement": Criterion(of_step=movement),
}


def resolve(name: str) -> Criterion:
    if name not in CRITERIA:
        raise ValueError(f"Unknown criterion. Expected one of {sorted(CRITERIA)}. Received: {name!r}")
    return CRITERIA[name]
