"""One way to do QAT, as the benchmarks drive it: a float model and its QAT copy, trained in bursts."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf
from nets import CLASSES, NETS, Net

KINDS = ("float", "qat")
WARM_UP = 6  # steps: tracing, the first steps after it, and one whole pass over the data, which fills its cache
_BATCHES = 4


class Contender:
    """A Keras and the function that makes its models quantization-aware.

    Args:
        keras: Keras 3 or tf_keras.
        quantize: float model -> QAT model.
        variants: Further QAT models to measure: name -> what to do with a compiled one and the data beforehand.
    """

    def __init__(
        self,
        keras: ModuleType,
        quantize: Callable[[Any], Any],
        variants: dict[str, Callable[[Any, tf.data.Dataset], None]] | None = None,
    ):
        self.keras, self.quantize, self.variants = keras, quantize, variants or {}
        self.models: dict[str, Any] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*KINDS, *self.variants)

    def prepare(self, net_name: str) -> float:
        """Builds and compiles all models. Returns the seconds that `quantize` took."""
        net = NETS[net_name]
        model = net.build(self.keras)
        start = time.perf_counter()
        qat = self.quantize(model)
        seconds = time.perf_counter() - start
        more = [self.quantize(model) for _ in self.variants]
        self.models = dict(zip(self.kinds, (model, qat, *more), strict=True))
        for each in self.models.values():
            each.compile("adam", "sparse_categorical_crossentropy")
        self.data = _dataset(net)
        for kind, make in self.variants.items():
            make(self.models[kind], self.data)
        return seconds

    def burst(self, kind: str, steps: int) -> float:
        """Trains one of the models for some steps. Returns the median milliseconds of a step."""
        ends: list[float] = []
        clock = self.keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
        )
        # One step more than is counted: the first one pays for the start of `fit` and for caches the others emptied.
        self.models[kind].fit(self.data, steps_per_epoch=steps + 1, shuffle=False, callbacks=[clock], verbose=0)
        return 1e3 * float(np.median(np.diff(ends)))

    def warm_up(self) -> None:
        for kind in self.kinds:
            self.burst(kind, WARM_UP)


def _dataset(net: Net) -> tf.data.Dataset:
    """Noise with random labels, held in memory batch by batch: reading it costs next to nothing."""
    generator = np.random.default_rng(0)
    samples = _BATCHES * net.batch_size
    images = generator.uniform(-1.0, 1.0, (samples, *net.input_shape)).astype(np.float32)
    labels = generator.integers(0, CLASSES, samples)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(net.batch_size).cache().repeat()
