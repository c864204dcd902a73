"""QAT models on several devices: all replicas end with the same ranges and statistics, and the file is exact."""

import subprocess
import sys
import textwrap

MIRRORED = """
    import tempfile
    import keras, numpy as np, tensorflow as tf
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    import keras_qat as kq
    from keras import layers

    def net():
        inputs = keras.Input((8, 8, 3))
        x = layers.ReLU()(layers.BatchNormalization(name="conv_norm")(layers.Conv2D(6, 3)(inputs)))
        x = layers.BatchNormalization(name="alone")(x)
        x = layers.BatchNormalization(name="in_one_op")(layers.ReLU()(x))
        x = layers.Flatten()(layers.ReLU()(x))
        x = layers.BatchNormalization(name="dense_norm")(layers.Dense(7)(x))
        x = layers.BatchNormalization(name="in_float")(layers.ReLU()(x))
        return keras.Model(inputs, layers.Dense(4)(x))

    rules = [kq.Rule("in_one_op", kq.Scheme(per_channel_norms=True)), kq.Rule("in_float", None)]
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("float32")
    y = x.mean((1, 2))[:, [0, 1, 2, 0]]
    keras.utils.set_random_seed(0)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        qat = kq.quantize(net(), rules=rules)
        qat.compile("adam", "mse")  # (steps_per_execution is something that Keras itself cannot do on two devices)
    qat.fit(x, y, batch_size=16, epochs=2, verbose=0)
    for weight in qat.non_trainable_weights:
        first, second = weight.value.values
        assert np.array_equal(first, second), weight.path
    with tempfile.TemporaryDirectory() as folder:
        report = kq.export(qat, folder + "/model.tflite", x, runtimes=("litert", "xnnpack"))
    assert report.parity.mismatch == 0, report
    print("all agree")
"""


def test_replicas_agree_and_the_file_is_exact():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MIRRORED)],
        check=False,
        capture_output=True,
        text=True,
        cwd=__file__.rsplit("/", 1)[0],
        timeout=600,
    )
    assert "all agree" in done.stdout, done.stderr[-3000:]
