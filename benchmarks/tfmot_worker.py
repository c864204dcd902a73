"""The peer's process: tfmot on tf_keras, obeying the lines of JSON that `peer_tfmot.Peer` writes to its stdin.

A request is `[method, *arguments]`, the answer is what the method returns. Only `Peer` starts this: importing tfmot
switches the `tf.keras` of the whole process to legacy Keras.
"""

import json
import os
import sys
import time
from typing import TextIO

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from contender import Contender


class TfmotContender(Contender):
    """tfmot's QAT and, behind it, TFLiteConverter."""

    def __init__(self):
        super().__init__(tf_keras, tfmot.quantization.keras.quantize_model)

    def convert(self) -> float:
        """Returns the seconds from the QAT model to the bytes of an int8 file."""
        start = time.perf_counter()
        converter = tf.lite.TFLiteConverter.from_keras_model(self.models["qat"])
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.convert()
        return time.perf_counter() - start


def _private_stdout() -> TextIO:
    """Keeps stdout for the answers and sends what libraries print there to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers = _private_stdout()
    contender = TfmotContender()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(contender, method)(*arguments)), file=answers)


if __name__ == "__main__":
    main()
