"""What `kq.callbacks.Int8Evaluation` costs at the end of an epoch: its time / that of a `predict` of the same data.

    python benchmarks/int8_evaluation.py

It freezes the model, writes the file, runs it on LiteRT and computes the model's metrics. The two take turns.
"""

import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags
from nets import CLASSES, NETS
from printout import default_out, heading, publish

import keras_qat as kq
from tflite_export.table import table

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds for each case.", lower_bound=3)
_OUT = flags.DEFINE_string("out", default_out(__file__), "File for the results.")

_CASES = (("cifar", 1000), ("cifar", 4000), ("mobilenet_v2", 1000))
_GOAL = 2.0
_HEADING = ("net", "samples", "predict s", "evaluation s", "ratio", "25 %", "75 %", "max", "goal", "")


def measure(net_name: str, samples: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of `predict` and of the callback, a number each per round."""
    net = NETS[net_name]
    x = np.random.default_rng(0).normal(size=(samples, *net.input_shape)).astype("float32")
    y = np.arange(samples) % CLASSES
    qat = kq.quantize(net.build(keras))
    qat.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    qat.fit(x[:64], y[:64], verbose=0)
    callback = kq.callbacks.Int8Evaluation(x, y)
    callback.set_model(qat)
    callback.on_train_begin()
    turns = (lambda: qat.predict(x, verbose=0), lambda: callback.on_epoch_end(0, {}))
    for turn in turns:
        turn()  # tracing, and LiteRT's process
    seconds = np.array([[_seconds(turn) for turn in turns] for _ in range(rounds)])
    return seconds[:, 0], seconds[:, 1]


def _seconds(turn: Callable) -> float:
    start = time.perf_counter()
    turn()
    return time.perf_counter() - start


def row(net_name: str, samples: int, rounds: int) -> tuple:
    predict, evaluation = measure(net_name, samples, rounds)
    ratios = evaluation / predict
    lower, median, upper = np.percentile(ratios, (25, 50, 75))
    figures = [
        f"{value:.2f}" for value in (np.median(predict), np.median(evaluation), median, lower, upper, ratios.max())
    ]
    return (net_name, samples, *figures, f"<= {_GOAL:.0f}", "met" if median <= _GOAL else "missed")


def main(_) -> None:
    rows = [row(net_name, samples, _ROUNDS.value) for net_name, samples in _CASES]
    title = "Int8Evaluation / predict of the same data (ratio within a round: median, quartiles, largest)"
    settings = f"{_ROUNDS.value} rounds, batches of 32 in predict, accuracy as the metric"
    publish(heading(title, settings, with_peer=False) + "\n\n" + table(_HEADING, rows), _OUT.value)


if __name__ == "__main__":
    app.run(main)
