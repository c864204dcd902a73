"""The networks that are measured, the same in Keras 3 and in tf_keras."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Net:
    """A network and what it is trained on.

    Args:
        build: Makes it out of the layers of the Keras that is handed in.
        input_shape: Of one sample.
        batch_size: Of a training step.
        goal: The most that a QAT step may take, in float steps.
    """

    build: Callable[[ModuleType], Any]
    input_shape: tuple[int, int, int]
    batch_size: int
    goal: float


def _cifar(keras: ModuleType) -> Any:
    """Three blocks of convolution, batch norm, relu and pooling."""
    layers = keras.layers
    inputs = x = keras.Input((32, 32, 3))
    for filters in (32, 64, 128):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
        x = layers.MaxPooling2D()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))


def _mobilenet_v2(keras: ModuleType) -> Any:
    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=CLASSES)


def u_net(keras: ModuleType, shape, is_bilinear: bool = False) -> Any:
    """Three levels; made larger by transposed convolutions, or by interpolation."""
    layers = keras.layers

    def block(x, filters):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization()(x))

    inputs, skipped = keras.Input(shape), []
    x = inputs
    for filters in (16, 32, 64):
        x = block(block(x, filters), filters)
        skipped.append(x)
        x = layers.MaxPooling2D()(x)
    x = block(x, 128)
    for filters in (64, 32, 16):
        enlarged = layers.UpSampling2D(2, interpolation="bilinear") if is_bilinear else None
        x = (enlarged or layers.Conv2DTranspose(filters, 2, strides=2))(x)
        x = block(layers.Concatenate()([x, skipped.pop()]), filters)
    return keras.Model(inputs, layers.Conv2D(CLASSES, 1, activation="softmax")(x))


NETS = {
    "cifar": Net(_cifar, (32, 32, 3), batch_size=32, goal=1.10),
    "mobilenet_v2": Net(_mobilenet_v2, (96, 96, 3), batch_size=16, goal=1.25),
}
