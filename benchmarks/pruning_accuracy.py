"""Accuracy of pruned nets, ours beside tfmot's: the same float weights, batches, optimizer, schedule and layers.

    python benchmarks/pruning_accuracy.py --data_dir=path/to/data

Reads fashion_mnist.npz and har.npz. First Keras 3 trains the float nets and our callback prunes copies of them; then tfmot, in
a process of its own, prunes copies of the same nets on tf_keras. Last come whole channels, which tfmot cannot remove: they
stand beside a net as small from the start that was trained for as many steps as both trainings took together.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import pruning_task as task
from absl import app, flags
from printout import default_out, heading, publish

import keras_qat as kq
from tflite_export.table import table

_DATA = flags.DEFINE_string("data_dir", None, "Folder with fashion_mnist.npz and har.npz.", required=True)
_TASKS = flags.DEFINE_multi_enum("tasks", list(task.TASKS), list(task.TASKS), "What to learn; once for each.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds: of the float net, and of the order of the samples.", lower_bound=2)
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the tables go.")

_FEWER = (2, 4)  # times fewer MACs
_WORKER = pathlib.Path(__file__).with_name("tfmot_pruning_worker.py")
_WEIGHTS = ("data", "sparsity", "float %", "keras_qat %", "tfmot %", "ours - tfmot", "zeros, ours", "tfmot's", "goal")
_CHANNELS = ("data", "MACs", "fewer", "parameters", "fewer", "float %", "shrunk %", "shrunk - float", "from scratch %")
_ABOUT_WEIGHTS = """\
Means ± standard deviation over the seeds; of the difference, taken seed by seed, ± standard error of the mean. Goal: ours
at least tfmot's, or below by two standard errors at the most. Zeros: in the kernels that are pruned, all but the last."""
_ABOUT_CHANNELS = """\
Whole channels, which tfmot cannot remove: pruned, then taken out by kq.pruning.shrink. From scratch: a net as small, trained
for as many steps as the large one and its pruning together."""


def train_float(name: str, seed: int, data, folder: pathlib.Path) -> float:
    """Leaves the weights in the folder. Returns the accuracy."""
    keras.utils.set_random_seed(seed)
    model = task.build(keras, task.TASKS[name])
    task.fit(keras, model, *data[:2], task.FLOAT_STEPS, task.FLOAT_RATE, seed)
    task.save_weights(model, _weights(folder, name, seed))
    return task.accuracy(model, *data[2:])


def prune(name: str, seed: int, data, folder: pathlib.Path, sparsity: float, pattern) -> keras.Model:
    """What our callback makes of the float net."""
    keras.utils.set_random_seed(seed)
    model = task.load_weights(task.build(keras, task.TASKS[name]), _weights(folder, name, seed))
    schedule = kq.schedules.Polynomial(0.0, sparsity, begin=0, end=task.PRUNE_UNTIL, frequency=task.PRUNE_EVERY)
    callbacks = [kq.callbacks.Pruning(schedule, pattern=pattern)]
    task.fit(keras, model, *data[:2], task.TUNE_STEPS, task.TUNE_RATE, seed, callbacks)
    return model


def ours(name: str, seed: int, data, folder: pathlib.Path, before: float) -> list[list]:
    """[task, seed, level, float accuracy, accuracy, share of zeros] for each level."""
    rows = []
    for level, sparsity in task.LEVELS.items():
        pattern = kq.pruning.NofM(2, 4) if level == "2:4" else kq.pruning.Weights()
        model = prune(name, seed, data, folder, sparsity, pattern)
        rows.append([name, seed, level, before, task.accuracy(model, *data[2:]), task.sparsity(model)])
        _tell("keras_qat", *rows[-1])
    return rows


def tfmots(folder: pathlib.Path) -> list[list]:
    """The same from tfmot, out of a process of its own; nothing else computes meanwhile."""
    answers = folder / "tfmot.json"
    request = {
        "folder": str(folder),
        "answers": str(answers),
        "data_dir": os.path.abspath(_DATA.value),
        "tasks": _TASKS.value,
        "seeds": _SEEDS.value,
    }
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    subprocess.run([sys.executable, str(_WORKER)], input=json.dumps(request), text=True, env=environment, check=True)
    return json.loads(answers.read_text())


def channels(name: str, seed: int, data, folder: pathlib.Path, before: float, fewer: int) -> list:
    """[task, fewer, MACs, before / after, parameters, before / after, float, shrunk and from scratch accuracy]"""
    model = prune(name, seed, data, folder, sparsity_for(name, fewer), kq.pruning.Channels())
    small = kq.pruning.shrink(model)
    cost = kq.pruning.compare(model, small)
    keras.utils.set_random_seed(seed)
    scratch = task.build(keras, task.TASKS[name], [small.get_layer(layer).kernel.shape[-1] for layer in task.PRUNED])
    task.fit(keras, scratch, *data[:2], task.FLOAT_STEPS + task.TUNE_STEPS, task.FLOAT_RATE, seed)
    accuracies = [before, *(task.accuracy(each, *data[2:]) for each in (small, scratch))]
    macs, parameters = ((getattr(cost.before, of), getattr(cost.after, of)) for of in ("macs", "parameters"))
    row = [name, fewer, macs[1], macs[0] / macs[1], parameters[1], parameters[0] / parameters[1], *accuracies]
    _tell("channels", *row)
    return row


def sparsity_for(name: str, fewer: int) -> float:
    """The share of channels without which a net has as nearly as can be so many times fewer MACs."""

    def macs(sparsity):
        widths = [max(round(width * (1 - sparsity)), 1) for width in task.WIDTHS]
        return kq.pruning.report(task.build(keras, task.TASKS[name], widths)).total.macs

    return min(np.arange(0.02, 0.9, 0.02), key=lambda sparsity: abs(macs(sparsity) - macs(0) / fewer))


def weight_rows(our_rows: list[list], their_rows: list[list]) -> list[tuple]:
    """A row for each task and level: means and standard deviations over the seeds, the difference seed by seed."""
    theirs = {tuple(row[:3]): row[3:] for row in their_rows}
    rows = []
    for name in _TASKS.value:
        for level in task.LEVELS:
            pairs = [(row[3:], theirs[tuple(row[:3])]) for row in our_rows if (row[0], row[2]) == (name, level)]
            (before, found, zeros), (their_before, their_found, their_zeros) = np.array(pairs).transpose(1, 2, 0)
            assert np.allclose(before, their_before, atol=2e-3), "both begin with the same float nets"
            difference = 100 * (found - their_found)
            error = difference.std(ddof=1) / len(difference) ** 0.5
            verdict = "met" if difference.mean() >= -2 * error else "missed"
            shares = (f"{100 * share.mean():.2f} %" for share in (zeros, their_zeros))
            means = (_mean(before), _mean(found), _mean(their_found), f"{difference.mean():+.2f} ± {error:.2f}")
            rows.append((name, level, *means, *shares, verdict))
    return rows


def channel_rows(found: list[list]) -> list[tuple]:
    rows = []
    for name in _TASKS.value:
        for fewer in _FEWER:
            columns = list(zip(*(row[2:] for row in found if row[:2] == [name, fewer]), strict=True))
            macs, times, parameters, parameter_times = (float(np.mean(column)) for column in columns[:4])
            before, shrunk, scratch = map(np.array, columns[4:])
            lost = 100 * (shrunk - before)
            error = lost.std(ddof=1) / len(lost) ** 0.5
            cost = (round(macs), f"{times:.2f} ×", round(parameters), f"{parameter_times:.2f} ×")
            accuracies = (_mean(before), _mean(shrunk), f"{lost.mean():+.2f} ± {error:.2f}", _mean(scratch))
            rows.append((name, *cost, *accuracies))
    return rows


def _mean(shares: np.ndarray) -> str:
    return f"{100 * shares.mean():.2f} ± {100 * shares.std(ddof=1):.2f}"


def _weights(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return folder / f"{name}-{seed}.npz"


def _tell(*values) -> None:
    print(*values, file=sys.stderr, flush=True)


def main(_) -> None:
    start = time.monotonic()
    our_rows, channel_results = [], []
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = pathlib.Path(name_of_folder)
        for name in _TASKS.value:
            data = task.load(_DATA.value, name)
            for seed in range(_SEEDS.value):
                before = train_float(name, seed, data, folder)
                our_rows += ours(name, seed, data, folder, before)
                channel_results += [channels(name, seed, data, folder, before, fewer) for fewer in _FEWER]
        their_rows = tfmots(folder)
    settings = (
        f"{_SEEDS.value} seeds, {task.FLOAT_STEPS} steps in float, {task.TUNE_STEPS} pruning, batch {task.BATCH}, Adam "
        f"with cosine decay, polynomial schedule, masks every {task.PRUNE_EVERY} steps up to step {task.PRUNE_UNTIL}; "
        f"{(time.monotonic() - start) / 60:.0f} minutes"
    )
    sections = [
        heading("Accuracy of pruned nets on the test split", settings, with_peer=True),
        table(_WEIGHTS, weight_rows(our_rows, their_rows)),
        _ABOUT_WEIGHTS,
        table(_CHANNELS, channel_rows(channel_results)),
        _ABOUT_CHANNELS,
    ]
    publish("\n\n".join(sections), _OUT.value)


if __name__ == "__main__":
    app.run(main)
