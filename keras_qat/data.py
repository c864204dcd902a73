"""Data as people pass it → the arrays that a model reads."""

from collections.abc import Mapping

import keras
from keras import tree

from keras_qat.graph.walk import input_names


def input_values(model: keras.Model, data) -> list:
    """The values in the order of the model's inputs, whether they come as one array, as a list or by name."""
    if not isinstance(data, Mapping):
        return tree.flatten(data)
    names = input_names(model)
    keys = sorted(model._inputs_struct) if isinstance(model._inputs_struct, dict) else names
    missing = [key for key, name in zip(keys, names, strict=True) if key not in data and name not in data]
    if missing:
        raise ValueError(f"The data lacks {missing}. Expected the inputs {keys}. Received: {list(data)}")
    return [data[key] if key in data else data[name] for key, name in zip(keys, names, strict=True)]


def as_called(model: keras.Model, values: list):
    """Values in the order of the inputs, in the structure that the model was built with (Keras warns of any other)."""
    return tree.pack_sequence_as(model._inputs_struct, values)
