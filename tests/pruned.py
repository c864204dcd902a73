"""Nets, data and a short training for the tests of pruning."""

import keras
import numpy as np
from keras import layers, ops

from keras_qat.callbacks import Pruning
from keras_qat.pruning.targets import find_targets


def small():
    """Of every kind of layer one."""
    keras.utils.set_random_seed(0)
    stack = [
        keras.Input((8, 8, 4)),
        layers.Conv2D(8, 3, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.SeparableConv2D(8, 3, name="separable"),
        layers.Flatten(),
        layers.Dense(12, name="dense"),
        layers.LayerNormalization(name="layer_norm"),
        layers.Dense(3, name="classes"),
    ]
    return keras.Sequential(stack)


X = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")
Y = X[:, :3, 0, 0].argmax(1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
STEPS = 4  # batches of an epoch


def train(model, callbacks, epochs=3, optimizer="adam", x=X, y=Y, **options):
    model.compile(optimizer, LOSS, **options)
    fit(model, callbacks, epochs, x, y)
    return model


def fit(model, callbacks, epochs=3, x=X, y=Y, **options):
    return model.fit(
        x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **options
    ).history


def zeros(variable):
    return float(np.mean(ops.convert_to_numpy(variable) == 0))


def sparsities(model):
    return {v.path.split("/", 1)[-1]: zeros(v) for v in model.trainable_variables if zeros(v) not in (0, 1)}


def tiny():
    keras.utils.set_random_seed(0)
    convolved = [layers.Conv2D(8, 3, name="conv"), layers.BatchNormalization(name="norm"), layers.Flatten()]
    dense = [layers.Dense(12, name="dense"), layers.Dense(3, name="classes")]
    return keras.Sequential([keras.Input((8, 8, 4)), *convolved, *dense])


def targets_of(model, rules=(), **options):
    pruning = Pruning(0.5, rules, **options)
    found = find_targets(model, pruning.policy, pruning.rules)
    return {f"{target.path}/{target.variable.name}": target for target in found}


def best(values, count):
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values.ravel(), kind="stable")[:count]] = True
    return mask.reshape(values.shape)


def n_of_m(scores, n, m, axis):
    """Row by row, group by group."""
    rows = np.moveaxis(scores, axis, -1)
    mask = np.zeros(rows.shape, bool)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            mask[index][start : start + m] = best(rows[index][start : start + m], n)
    return np.moveaxis(mask, -1, axis)


def float_net():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, name="conv", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.ReLU()(layers.Conv2D(16, 3, name="conv_2")(x))
    x = layers.Dense(12, name="dense")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(3, name="classes")(x))


class Deep(keras.Model):
    """Defined by its `call`, built by its first batch."""

    def __init__(self):
        super().__init__()
        self.first, self.block = layers.Dense(16), [layers.Dense(8), layers.Dense(3)]

    def call(self, x):
        x = ops.relu(self.first(ops.reshape(x, (-1, 256))))
        return self.block[1](ops.relu(self.block[0](x)))
