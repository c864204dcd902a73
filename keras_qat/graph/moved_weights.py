"""Weights that a call transposes, reshapes, cuts or computes with before it uses them.

What keras.ops reads is a plain tensor by then, which would no longer be learned. Moved weights, and the first rows of one,
become weights again. So does what was computed from weights (a standardized kernel, `1 + scale`, a kernel with what an adapter
adds to it): the QAT model learns the result itself.
"""

import contextlib
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import tree


@contextlib.contextmanager
def watched(layer):
    """Keeps track of what becomes of a layer's weights while its `call` runs."""
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        for weight in layer.trainable_variables if isinstance(layer, keras.Layer) else ():
            tape.watch(weight.value)
        yield tape


class MovedWeights:
    """The weights that were made so far, so that what is called twice keeps sharing them."""

    def __init__(self):
        self._made: dict[tuple, tuple] = {}
        self._of_others: list[tuple] = []  # layers, and weights of others that they moved

    def restored(self, layer, tape, arguments):
        """The arguments of an operation that `layer` calls, with weights for the tensors that are moved ones of it.

        Args:
            layer: What is being opened.
            tape: Of `watched`, or None where nobody watched: then the numbers alone have to tell.
            arguments: In any structure.
        """
        if not isinstance(layer, keras.Layer) or not any(isinstance(x, tf.Tensor) for x in tree.flatten(arguments)):
            return arguments
        return tree.map_structure(lambda value: self._restored(layer, tape, value), arguments)

    def _restored(self, layer, tape, value):
        if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
            return value
        sources, is_known = _sources(layer, tape, value), tape is not None
        if not sources or (not is_known and value.shape.num_elements() < 2):
            return value
        alike = [weight for weight in sources if _same_numbers(weight, value) or _is_beginning_of(weight, value)]
        differ = np.ptp(value) > 0  # or else any constant could be it, or two weights become one
        if len(alike) == 1 and (len(sources) == 1 if is_known else differ):
            return self._weight(layer, alike[0], value)
        if is_known:
            return self._computed(layer, sources, value)
        if alike:
            _warn_of_constant(layer, alike)
        return value

    def _weight(self, layer, weight, value):
        key = id(weight), tuple(value.shape)
        if key not in self._made:
            variable = keras.Variable(value, trainable=True, name=weight.name)
            variable.regularizer = weight.regularizer
            self._made[key] = (weight, variable)
            if all(weight is not own for own in layer._trainable_variables):
                self._of_others.append((layer, weight))
        return self._made[key][1]

    def _computed(self, layer, sources, value):
        """The same for what the same weights came to before: a layer that is called twice computes it twice."""
        numbers = np.asarray(value, np.float32)
        key = (*map(id, sources), numbers.shape, numbers.tobytes())
        if key not in self._made:
            self._made[key] = (sources, keras.Variable(numbers, trainable=True, name=sources[0].name))
            _warn_of_options(layer, sources)
        return self._made[key][1]

    def warn_of_doubles(self, read: set[int]) -> None:
        """Tells of the weights, among those whose ids are `read` by their own layers, that others moved."""
        for layer, weight in self._of_others:
            if id(weight) in read:
                warnings.warn(
                    f"Layer {layer.name!r} uses the weight {weight.path!r} of another layer, transposed or reshaped. The "
                    "QAT model trains the two apart. Embeddings that are read both ways stay one weight as a "
                    "keras.layers.ReversibleEmbedding.",
                    stacklevel=2,
                )


def _sources(layer, tape, value) -> list:
    """The weights that a tensor may come from."""
    weights = layer.trainable_variables
    if tape is None:
        return weights
    gradients = tape.gradient(value, [weight.value for weight in weights]) if weights else []
    return [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]


def _same_numbers(weight, value) -> bool:
    if np.size(weight) != np.size(value):
        return False
    return np.array_equal(np.sort(np.ravel(weight)), np.sort(np.ravel(value)))


def _is_beginning_of(weight, value) -> bool:
    """Whether it is the first rows of the weight: of a table of positions, those that there are."""
    return 1 < np.size(value) < np.size(weight) and np.array_equal(np.ravel(weight)[: np.size(value)], np.ravel(value))


def _warn_of_constant(layer, weights) -> None:
    names = [weight.path for weight in weights]
    warnings.warn(
        f"Layer {layer.name!r} seems to transpose or reshape one of its weights {names} before it uses it, but their numbers do "
        "not tell which. It stays as it is and is not learned. Train the model for a step first.",
        stacklevel=2,
    )


def _warn_of_options(layer, weights) -> None:
    options = ("regularizer", "constraint")
    lost = [
        f"{weight.path} ({name})" for weight in weights for name in options if getattr(weight, name, None) is not None
    ]
    if lost:
        warnings.warn(
            f"Layer {layer.name!r} computes with its weights before it uses them. The QAT model learns what comes of it, without "
            f"the regularizer or constraint of the weights themselves: {lost}.",
            stacklevel=2,
        )
