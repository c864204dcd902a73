"""Models as people write them: every style that quantize has to take."""

import keras
import tensorflow as tf
from keras import layers, ops

import keras_qat as kq


def sequential():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(5, activation="softmax", name="classes"),
        ]
    )


def functional():
    inputs = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    y = layers.Conv2D(8, 1)(x)
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax", name="classes")(x))


def nested():
    backbone_input = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2)(backbone_input)
    backbone = keras.Model(backbone_input, layers.ReLU()(layers.BatchNormalization()(x)), name="backbone")
    head = keras.Sequential([layers.Flatten(), layers.Dense(5)], name="head")
    inputs = keras.Input((16, 16, 3))
    return keras.Model(inputs, head(backbone(inputs, training=False)))


def shared():
    """A siamese net: one backbone, called twice."""
    block = keras.Sequential([layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU(), layers.Flatten()])
    left, right = keras.Input((12, 12, 3), name="left"), keras.Input((12, 12, 3), name="right")
    difference = layers.Subtract()([block(left), block(right)])
    return keras.Model({"left": left, "right": right}, layers.Dense(4)(difference))


def shared_dense():
    """One layer, called twice, its results concatenated and subtracted."""
    left, right = keras.Input((8,), name="left"), keras.Input((8,), name="right")
    layer = layers.Dense(4, name="shared")
    both = layers.Concatenate()([layer(left), layer(right)])
    return keras.Model([left, right], layers.Dense(3)(layers.Concatenate()([both, layer(left) - layer(right)])))


def two_outputs():
    inputs = keras.Input((16, 16, 3), name="image")
    x = layers.Flatten()(layers.MaxPooling2D(4)(layers.Conv2D(8, 3, activation="relu")(inputs)))
    label = layers.Dense(5, activation="softmax", name="label")(x)
    size = layers.Dense(1, name="size")(x)
    return keras.Model(inputs, {"label": label, "size": size})


@keras.saving.register_keras_serializable("keras_qat_tests")
class Residual(keras.layers.Layer):
    """A composite layer of other people's making."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.convs = [layers.Conv2D(filters, 3, padding="same", use_bias=False) for _ in range(2)]
        self.norms = [layers.BatchNormalization() for _ in range(2)]

    def call(self, x, training=None):
        y = x
        for conv, norm in zip(self.convs, self.norms):
            y = ops.relu(norm(conv(y), training=training))
        return x + y

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


@keras.saving.register_keras_serializable("keras_qat_tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stem = layers.Conv2D(8, 3, padding="same")
        self.blocks = [Residual(8), Residual(8)]
        self.pool = layers.AveragePooling2D(2)
        self.head = layers.Dense(5, activation="softmax")

    def call(self, inputs, training=None):
        x = self.stem(inputs)
        for block in self.blocks:
            x = block(x, training=training)
        x = self.pool(x)[:, 1:]
        return self.head(ops.reshape(x, (-1, 7 * 8 * 8)))


def subclassed():
    model = Subclassed()
    model(ops.zeros((2, 16, 16, 3)))
    return model


STYLES = {f.__name__: f for f in (sequential, functional, nested, shared, shared_dense, two_outputs, subclassed)}


def exported_after_loading(qat, folder, inputs):
    """Saves and loads a QAT model and exports it. Gives the report, in which every runtime has said something."""
    qat.save(folder / "qat.keras")
    loaded = keras.saving.load_model(folder / "qat.keras")
    report = kq.export(loaded, folder / "model.tflite", inputs, portable=True)
    assert report.summary.is_full_int8
    assert len(report.parity.results) + len(report.parity.skipped) == 3
    return report


def converted(model, images, samples=8):
    """TFLiteConverter's PTQ of the float model, calibrated with the first images."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images[:samples])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()
