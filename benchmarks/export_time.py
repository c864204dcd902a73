"""How long the two waits around training are: float model -> QAT model, and QAT model -> int8 file.

    python benchmarks/export_time.py

On MobileNetV2 (α 0.35, 96×96), against tfmot's `quantize_model` and TFLiteConverter. Imports and training do not count.
"""

import time

import keras
import numpy as np
from absl import app, flags
from contender import Contender
from nets import NETS
from peer_tfmot import Peer
from printout import default_out, heading, publish

import keras_qat as kq
import tflite_export
from tflite_export.table import table

_REPEATS = flags.DEFINE_integer("repeats", 7, "Calls of ours, the first one included.", lower_bound=2)
_OUT = flags.DEFINE_string("out", default_out(__file__), "File for the results.")
_NO_PEER = flags.DEFINE_bool("no_peer", False, "Leave tfmot out.")

_NET = "mobilenet_v2"
_TRAINING_STEPS = 2  # enough for ranges and moving statistics that are not those of a fresh model
_GOAL = 2.0
_HEADING = ("seconds for", "first", "later", "min", "max", "tfmot", "tfmot / first", "goal", "")


def our_seconds(repeats: int) -> dict[str, list[float]]:
    """Times of each call of ours, in order."""
    contender = Contender(keras, kq.quantize)
    quantizing = [contender.prepare(_NET) for _ in range(repeats)]
    contender.burst("qat", _TRAINING_STEPS)
    exporting = [_export_seconds(contender.models["qat"]) for _ in range(repeats)]
    return {"quantize": quantizing, "freeze and write": exporting}


def _export_seconds(qat: keras.Model) -> float:
    start = time.perf_counter()
    tflite_export.write(kq.freeze(qat))
    return time.perf_counter() - start


def peer_seconds() -> dict[str, float]:
    """Times of the peer's only call each."""
    with Peer() as peer:
        quantizing = peer.prepare(_NET)
        peer.burst("qat", _TRAINING_STEPS)
        return {"quantize": quantizing, "freeze and write": peer.convert()}


def row(what: str, ours: list[float], peer: float | None) -> tuple[str, ...]:
    """A line of the table. The peer is compared with our first call: its only one is a first one, too."""
    first, *later = ours
    times = [f"{value:.2f}" for value in (first, np.median(later), min(later), max(later))]
    compared = ("-", "-") if peer is None else (f"{peer:.2f}", f"{peer / first:.1f}")
    return (what, *times, *compared, f"<= {_GOAL:.0f}", "met" if first <= _GOAL else "missed")


def main(_) -> None:
    ours = our_seconds(_REPEATS.value)
    peer = {} if _NO_PEER.value else peer_seconds()
    rows = [row(what, seconds, peer.get(what)) for what, seconds in ours.items()]
    shape = "×".join(map(str, NETS[_NET].input_shape))
    calls = f"ours called {_REPEATS.value} times" + ("" if _NO_PEER.value else ", tfmot once")
    settings = f"MobileNetV2 α 0.35, {shape}, file after {_TRAINING_STEPS + 1} QAT steps, {calls}"
    title = "Seconds to quantize a model and to write it (our first call; later ones: median, min, max)"
    publish(heading(title, settings, not _NO_PEER.value) + "\n\n" + table(_HEADING, rows), _OUT.value)


if __name__ == "__main__":
    app.run(main)
