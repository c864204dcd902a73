"""What quantization-aware training costs: time of a QAT step / time of a float step, ours and tfmot's.

    python benchmarks/step_overhead.py

Ours is measured three times: as `quantize` makes it, with ranges at rest, and with the statistics of batch norms at rest
too, as `kq.callbacks.QuantizationSchedule` leaves it late in training.

Each round gives every model a burst of steps. A ratio is taken within a round and a framework, so that what else the
machine does hits both of its sides. The two frameworks' float steps differ: compare the milliseconds, too.
"""

import contextlib
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from contender import KINDS, Contender
from nets import NETS, Net
from peer_tfmot import Peer
from printout import default_out, heading, publish

import keras_qat as kq
from tflite_export.table import table

_ROUNDS = flags.DEFINE_integer("rounds", 25, "Rounds per network.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 15, "Steps of a burst.", lower_bound=1)
_NETS = flags.DEFINE_multi_enum("nets", list(NETS), list(NETS), "Networks to measure; give it once for each.")
_OUT = flags.DEFINE_string("out", default_out(__file__), "File for the results.")
_NO_PEER = flags.DEFINE_bool("no_peer", False, "Leave tfmot out.")

_HEADING = ("net", "QAT by", "float ms", "QAT ms", "ratio", "25 %", "75 %", "min", "goal", "")

Contenders = dict[str, Contender | Peer]
Bursts = dict[tuple[str, str], list[float]]


def at_rest(batch_norm: bool) -> Callable[[keras.Model, tf.data.Dataset], None]:
    """What trains a QAT model for a step with frozen ranges, and statistics on request; both stay so."""

    def freeze(qat, data):
        kq.calibrate(qat, data, steps=1)
        schedule = kq.callbacks.QuantizationSchedule(freeze_ranges=0, freeze_batch_norm=0 if batch_norm else None)
        qat.fit(data, steps_per_epoch=1, callbacks=[schedule], verbose=0)

    return freeze


VARIANTS = {"ranges frozen": at_rest(batch_norm=False), "ranges and batch norms frozen": at_rest(batch_norm=True)}


def measure(contenders: Contenders, net_name: str, rounds: int, steps: int) -> Bursts:
    """Returns milliseconds of a step, one per round, by contender and kind of model."""
    for contender in contenders.values():
        contender.prepare(net_name)
        contender.warm_up()
    turns = [(name, kind) for name, contender in contenders.items() for kind in contender.kinds]
    bursts: Bursts = {turn: [] for turn in turns}
    for _ in range(rounds):
        for name, kind in turns:
            bursts[name, kind].append(contenders[name].burst(kind, steps))
        turns.reverse()  # a machine that gets slower or faster favours nobody
    return bursts


def rows_of(net_name: str, net: Net, name: str, bursts: Bursts) -> list[tuple[str, ...]]:
    """A contender's lines of the table. Its variants are to take less than its QAT model."""
    float_ms, qat_ms = (np.array(bursts[name, kind]) for kind in KINDS)
    rows = [_row(net_name, name, float_ms, qat_ms, f"<= {net.goal:.2f}", net.goal)]
    for kind in (kind for contender, kind in bursts if contender == name and kind not in KINDS):
        goal = float(np.median(qat_ms / float_ms))
        rows.append(_row(net_name, f"{name}, {kind}", float_ms, np.array(bursts[name, kind]), f"< {goal:.3f}", goal))
    return rows


def _row(net_name: str, name: str, float_ms, qat_ms, goal: str, most: float) -> tuple[str, ...]:
    """Medians, and the spread of the rounds' ratios."""
    ratios = qat_ms / float_ms
    lower, median, upper = np.percentile(ratios, (25, 50, 75))
    times = [f"{np.median(each):8.1f}" for each in (float_ms, qat_ms)]
    spread = [f"{value:.3f}" for value in (median, lower, upper, ratios.min())]
    return (net_name, name, *times, *spread, goal, "met" if median <= most else "missed")


def main(_) -> None:
    rows = []
    with contextlib.ExitStack() as stack:
        contenders: Contenders = {"keras_qat": Contender(keras, kq.quantize, VARIANTS)}
        if not _NO_PEER.value:
            contenders["tfmot"] = stack.enter_context(Peer())
        for net_name in _NETS.value:
            bursts = measure(contenders, net_name, _ROUNDS.value, _STEPS.value)
            for name in contenders:
                rows += rows_of(net_name, NETS[net_name], name, bursts)
    batches = ", ".join(f"{name} batch {NETS[name].batch_size}" for name in _NETS.value)
    settings = f"{_ROUNDS.value} rounds of {_STEPS.value} steps, {batches}, Adam, default compile, model.fit"
    title = "QAT step time / float step time (ratio within a round: median, quartiles, smallest)"
    publish(heading(title, settings, not _NO_PEER.value) + "\n\n" + table(_HEADING, rows), _OUT.value)


if __name__ == "__main__":
    app.run(main)
