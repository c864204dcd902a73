"""What our callbacks cost: time of a training step with a callback / time of one without.

    python benchmarks/callbacks_overhead.py

Each round gives every model a burst of steps. A ratio is taken within a round, so that what else the machine does hits
both of its sides. Pruning is measured with masks that stay and with masks chosen anew in every step; what it costs at its
default of one choice in 100 steps follows from the two.
"""

import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags
from contender import WARM_UP, _dataset
from nets import NETS
from printout import default_out, heading, publish

import keras_qat as kq
from tflite_export.table import table

_ROUNDS = flags.DEFINE_integer("rounds", 25, "Rounds per network.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 15, "Steps of a burst.", lower_bound=1)
_NETS = flags.DEFINE_multi_enum("nets", list(NETS), list(NETS), "Networks to measure; give it once for each.")
_QAT = flags.DEFINE_bool("qat", False, "Measure QAT models instead of float ones.")
_OUT = flags.DEFINE_string("out", default_out(__file__), "File for the results.")

_EVERY = 100  # steps between two choices of masks, by default
_HEADING = ("net", "callback", "ms", "ratio", "25 %", "75 %", "min", "goal", "")
_ALONE, _CHOOSING, _HOLDING = "none", "pruning, masks chosen in every step", "pruning, between two choices"

CALLBACKS: dict[str, Callable[[], list[keras.callbacks.Callback]]] = {
    _ALONE: list,
    "clipping by global norm": lambda: [kq.callbacks.GradientClipping(kq.clipping.ByGlobalNorm(1.0))],
    "clipping by norm": lambda: [kq.callbacks.GradientClipping(kq.clipping.ByNorm(1.0))],
    "clipping, adaptive": lambda: [kq.callbacks.GradientClipping(kq.clipping.Adaptive())],
    _HOLDING: lambda: [kq.callbacks.Pruning(kq.schedules.OneShot(0.5))],
    _CHOOSING: lambda: [kq.callbacks.Pruning(kq.schedules.Constant(0.5, frequency=1))],
}
GOALS = {name: 1.05 for name in CALLBACKS if name.startswith("clipping")} | {_HOLDING: 1.02}


class Trainee:
    """A model in the middle of a `fit` that never ends: bursts of steps, the callbacks traced once."""

    def __init__(self, net_name: str, callbacks: list[keras.callbacks.Callback], quantized: bool):
        net = NETS[net_name]
        model = kq.quantize(net.build(keras)) if quantized else net.build(keras)
        model.compile("adam", "sparse_categorical_crossentropy")
        model.make_train_function()
        self.callbacks = keras.callbacks.CallbackList(callbacks, model=model, epochs=1, steps=None)
        self.callbacks.on_train_begin()
        self.callbacks.on_epoch_begin(0)
        self.model, self.data = model, iter(_dataset(net))
        self.burst(WARM_UP)

    def burst(self, steps: int) -> float:
        """Returns the median milliseconds of a step."""
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            float(self.model.train_function(self.data)["loss"])
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times[1:]))  # the first one pays for caches that the others emptied


def measure(net_name: str, rounds: int, steps: int, quantized: bool) -> dict[str, np.ndarray]:
    """Returns milliseconds of a step, one per round, by callback."""
    trainees = {name: Trainee(net_name, make(), quantized) for name, make in CALLBACKS.items()}
    bursts: dict[str, list[float]] = {name: [] for name in trainees}
    turns = list(trainees)
    for _ in range(rounds):
        for name in turns:
            bursts[name].append(trainees[name].burst(steps))
        turns.reverse()  # a machine that gets slower or faster favours nobody
    return {name: np.array(times) for name, times in bursts.items()}


def rows_of(net_name: str, bursts: dict[str, np.ndarray]) -> list[tuple[str, ...]]:
    """The lines of the table: medians, and the spread of the rounds' ratios."""
    choice = bursts[_CHOOSING] - bursts[_HOLDING]
    shown = {**bursts, f"pruning, masks chosen every {_EVERY} steps": bursts[_HOLDING] + choice / _EVERY}
    goals = {**GOALS, list(shown)[-1]: 1.05}
    return [_row(net_name, name, times, bursts[_ALONE], goals.get(name)) for name, times in shown.items()]


def _row(net_name, name, times, alone, goal) -> tuple[str, ...]:
    ratios = times / alone
    lower, median, upper = np.percentile(ratios, (25, 50, 75))
    spread = [f"{value:.3f}" for value in (median, lower, upper, ratios.min())]
    verdict = ("", "") if goal is None else (f"<= {goal:.2f}", "met" if median <= goal else "missed")
    return (net_name, name, f"{np.median(times):8.1f}", *spread, *verdict)


def main(_) -> None:
    rows = []
    for net_name in _NETS.value:
        rows += rows_of(net_name, measure(net_name, _ROUNDS.value, _STEPS.value, _QAT.value))
    batches = ", ".join(f"{name} batch {NETS[name].batch_size}" for name in _NETS.value)
    kind = "QAT models" if _QAT.value else "float models"
    settings = f"{_ROUNDS.value} rounds of {_STEPS.value} steps, {batches}, {kind}, Adam, default compile"
    title = "Time of a training step with a callback / without (ratio within a round: median, quartiles, smallest)"
    publish(heading(title, settings, with_peer=False) + "\n\n" + table(_HEADING, rows), _OUT.value)


if __name__ == "__main__":
    app.run(main)
