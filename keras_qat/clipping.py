"""What is done to gradients before the optimizer sees them: first the maths, then the policies callbacks take.

A policy sees the gradients of a group of layers, a list of layers with a list of gradients each, and the weights in the
same order. Like an optax transformation it holds no state: `init` returns the state it starts from, `update` takes the
state and returns the next one.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from keras import ops, tree


def squared_norm(gradients):
    """`Σ g²` over a list of tensors."""
    return 2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients])


def norm(gradients):
    """`√Σ g²` over a list of tensors."""
    return ops.sqrt(squared_norm(gradients))


def scale_to_norm(gradients, size, max_norm):
    """`g · max_norm / max(size, max_norm)`: what has a norm of `size` gets one of `max_norm` at the most."""
    factor = max_norm / ops.maximum(size, max_norm)
    return [gradient * factor for gradient in gradients]


def unit_norms(values, channel_axes=(-1,)):
    """The norm of each output unit, shaped to multiply `values`."""
    rank = len(values.shape)
    units = {axis % rank for axis in channel_axes}
    return ops.sqrt(ops.sum(ops.square(values), [axis for axis in range(rank) if axis not in units], keepdims=True))


def adaptive_factor(gradient_norm, weight_norm, factor, eps):
    """What adaptive clipping multiplies a unit by: `max_norm / max(|G|, max_norm)`, `max_norm = factor·max(|W|, eps)`."""
    max_norm = factor * ops.maximum(weight_norm, eps)
    return max_norm / ops.maximum(gradient_norm, max_norm)


def percentile(values, count, p):
    """The p-th percentile of the first `count` values, between two of them on a straight line as numpy does it."""
    ordered = ops.sort(ops.where(ops.arange(values.shape[0]) < count, values, np.inf))
    position = (p / 100.0) * ops.cast(count - 1, "float32")
    below = ops.cast(ops.floor(position), "int32")
    low, high = ops.take(ordered, below), ops.take(ordered, ops.minimum(below + 1, count - 1))
    return low + (high - low) * (position - ops.floor(position))


def largest(values, count: int):
    """A mask over the `count` largest magnitudes; of equal ones the first."""
    flat = ops.abs(ops.reshape(values, (-1,)))
    indices = tf.math.top_k(flat, count, sorted=False).indices[:, None]
    return ops.reshape(tf.scatter_nd(indices, tf.ones(count, flat.dtype), flat.shape), values.shape)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight as policies see it.

    Args:
        value: The tensor.
        channel_axes: The axes that together number the output units.
    """

    value: object
    channel_axes: tuple[int, ...] = (-1,)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What all policies share: no state, and each layer is treated like the others."""

    def init(self, weights: list[list[Weight]]):
        """The state before the first step, arrays in a structure of tuples."""
        return ()

    def update(self, gradients: list[list], weights: list[list[Weight]], state):
        """Returns the new gradients, whether any was clipped, and the new state."""
        raise TypeError(f"{type(self).__name__} has to say what it does to gradients: define update.")


def _require_positive(policy, name) -> None:
    value = getattr(policy, name)
    if not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
        raise ValueError(f"{type(policy).__name__}.{name} is a number above 0. Received: {name}={value!r}")


@dataclasses.dataclass(frozen=True)
class ByValue(Policy):
    """Clips every single entry. Formula: `min(max(g, -limit), limit)`, as Keras's `clipvalue`."""

    limit: float

    def __post_init__(self):
        _require_positive(self, "limit")

    def update(self, gradients, weights, state):
        new = tree.map_structure(lambda g: ops.clip(g, -self.limit, self.limit), gradients)
        highest = ops.max(ops.stack([ops.max(ops.abs(g)) for g in tree.flatten(gradients)]))
        return new, highest > self.limit, state


@dataclasses.dataclass(frozen=True)
class ByNorm(Policy):
    """Limits the norm of each layer, all of its weights together.

    Formula: `g · max_norm / max(|g|, max_norm)`, as Keras's `clipnorm`, which takes each weight alone.
    """

    max_norm: float

    def __post_init__(self):
        _require_positive(self, "max_norm")

    def update(self, gradients, weights, state):
        sizes = [norm(layer) for layer in gradients]
        new = [scale_to_norm(layer, size, self.max_norm) for layer, size in zip(gradients, sizes, strict=True)]
        return new, ops.max(ops.stack(sizes)) > self.max_norm, state


@dataclasses.dataclass(frozen=True)
class ByGlobalNorm(Policy):
    """Limits the norm of all layers of the group together, as Keras's `global_clipnorm`."""

    max_norm: float

    def __post_init__(self):
        _require_positive(self, "max_norm")

    def update(self, gradients, weights, state):
        size = norm(tree.flatten(gradients))
        return [scale_to_norm(layer, size, self.max_norm) for layer in gradients], size > self.max_norm, state


@dataclasses.dataclass(frozen=True)
class Adaptive(Policy):
    """Limits the norm of each output unit's gradient to a share of the norm of its weights (AGC).

    Formula: `G · m / max(|G|, m)` with `m = factor · max(|W|, eps)`, the norms over all that feeds one output unit; a
    bias is one unit.

    Paper: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021).
    """

    factor: float = 0.01
    eps: float = 1e-3

    def __post_init__(self):
        _require_positive(self, "factor")
        _require_positive(self, "eps")

    def update(self, gradients, weights, state):
        pairs = list(zip(tree.flatten(gradients), [weight for layer in weights for weight in layer], strict=True))
        factors = [self._of_units(*pair) if len(pair[0].shape) > 1 else None for pair in pairs]
        smallest = [ops.min(factor) for factor in factors if factor is not None]
        single = [index for index, factor in enumerate(factors) if factor is None]  # vectors and numbers: one unit each
        if single:
            together = self._of_tensors([pairs[index] for index in single])
            smallest.append(ops.min(together))
            for index, factor in zip(single, ops.unstack(together), strict=True):
                factors[index] = factor
        new = [g * factor for (g, _), factor in zip(pairs, factors, strict=True)]
        return tree.pack_sequence_as(gradients, new), ops.min(ops.stack(smallest)) < 1.0, state

    def _of_units(self, gradient, weight):
        norms = [unit_norms(tensor, weight.channel_axes) for tensor in (gradient, weight.value)]
        return adaptive_factor(*norms, self.factor, self.eps)

    def _of_tensors(self, pairs):
        """The factors of many small tensors in a few ops: there is one such pair for every norm and bias of a model."""
        norms = [
            ops.sqrt(ops.stack([squared_norm([tensor]) for tensor in tensors]))
            for tensors in ([gradient for gradient, _ in pairs], [weight.value for _, weight in pairs])
        ]
        return adaptive_factor(*norms, self.factor, self.eps)


@dataclasses.dataclass(frozen=True)
class Percentile(Policy):
    """Limits the group's norm to the p-th percentile of the norms of the last `window` steps, this one included (AutoClip).

    Paper: Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks" (2020).
    """

    p: float = 10.0
    window: int = 1000

    def __post_init__(self):
        if not isinstance(self.p, (int, float)) or not 0 < self.p <= 100:
            raise ValueError(f"Percentile.p is above 0 and at most 100. Received: p={self.p!r}")
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"Percentile.window is a number of steps, at least 1. Received: window={self.window!r}")

    def init(self, weights):
        return np.zeros(self.window, "float32"), np.int32(0)

    def update(self, gradients, weights, state):
        norms, steps = state
        size = norm(tree.flatten(gradients))
        norms = ops.where(ops.arange(self.window) == steps % self.window, size, norms)
        limit = percentile(norms, ops.minimum(steps + 1, self.window), self.p)
        # A limit of zero (nothing but zeros so far) must not become a division by zero.
        new = [scale_to_norm(layer, size, ops.maximum(limit, 1e-30)) for layer in gradients]
        return new, size > limit, (norms, steps + 1)


@dataclasses.dataclass(frozen=True)
class Scale(Policy):
    """Multiplies the gradient: below 1 a penalty on a layer's learning, above 1 a boost. (Under Adam, which divides by the
    gradient's size, little of it is left; SGD takes it as it is.)"""

    factor: float

    def __post_init__(self):
        _require_positive(self, "factor")

    def update(self, gradients, weights, state):
        new = tree.map_structure(lambda g: g * self.factor, gradients)
        return new, ops.convert_to_tensor(self.factor != 1.0), state


@dataclasses.dataclass(frozen=True)
class TopK(Policy):
    """Keeps the largest entries of each weight's gradient and drops the others.

    Args:
        keep: The share that is kept, at least one entry.
        error_feedback: What is dropped is kept in memory and added to the next gradient, so that nothing is lost for
            good: `a = g + e`, `g' = a · mask`, `e' = a - g'`.

    Paper: Aji and Heafield, "Sparse Communication for Distributed Gradient Descent" (2017).
    """

    keep: float
    error_feedback: bool = False

    def __post_init__(self):
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(
                f"TopK.keep is the share that survives, above 0 and at most 1. Received: keep={self.keep!r}"
            )

    def init(self, weights):
        if not self.error_feedback:
            return ()
        return tuple(np.zeros(weight.value.shape, "float32") for layer in weights for weight in layer)

    def update(self, gradients, weights, state):
        flat = tree.flatten(gradients)
        if self.error_feedback:
            flat = [g + error for g, error in zip(flat, state, strict=True)]
        new = [g * largest(g, max(round(self.keep * math.prod(g.shape)), 1)) for g in flat]
        if self.error_feedback:
            state = tuple(g - kept for g, kept in zip(flat, new, strict=True))
        return tree.pack_sequence_as(gradients, new), ops.convert_to_tensor(self.keep < 1), state


@dataclasses.dataclass(frozen=True)
class Sign(Policy):
    """Only the direction of each entry: -1, 0 or 1.

    Paper: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems" (2018).
    """

    def update(self, gradients, weights, state):
        return tree.map_structure(ops.sign, gradients), ops.convert_to_tensor(True), state


@dataclasses.dataclass(frozen=True)
class Chain(Policy):
    """One policy after the other. A list of policies means the same.

    Example:
        `Chain([ByValue(1.0), ByGlobalNorm(5.0)])`
    """

    policies: tuple[Policy, ...]

    def __post_init__(self):
        policies = tuple(self.policies)
        if not policies or not all(isinstance(policy, Policy) for policy in policies):
            raise ValueError(f"A chain is made of policies of kq.clipping. Received: {self.policies!r}")
        object.__setattr__(self, "policies", policies)

    def init(self, weights):
        return tuple(policy.init(weights) for policy in self.policies)

    def update(self, gradients, weights, state):
        flags, states = [], []
        for policy, own in zip(self.policies, state, strict=True):
            gradients, clipped, own = policy.update(gradients, weights, own)
            flags.append(clipped)
            states.append(own)
        return gradients, ops.any(ops.stack(flags)), tuple(states)


def resolve(policy: Policy | Sequence[Policy] | None) -> Policy | None:
    """A policy, a list of them, or None (leave the gradients alone)."""
    if policy is None or isinstance(policy, Policy):
        return policy
    if isinstance(policy, (list, tuple)):
        return Chain(tuple(policy))
    raise ValueError(f"Expected a policy of kq.clipping, a list of them, or None. Received: {policy!r}")
