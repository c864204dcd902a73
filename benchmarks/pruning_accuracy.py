"""Accuracy of pruned nets, ours beside tfmot's: the same float weights, batches, optimizer, schedule and layers.

    python benchmarks/pruning_accuracy.py --data_dir=path/to/data

Reads fashion_mnist.npz and har.npz. First Keras 3 trains the float nets and our callback prunes copies of them; then
tfmot, in a process of its own, prunes copies of the same nets on tf_keras. Whole channels, which tfmot cannot remove,
stand beside a net as small from the start that was trained for as many steps.
"""

import functools
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
_SEEDS = flags.DEFINE_integer("seeds", None, "Seeds, if not as many as each task has by itself.", lower_bound=2)
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the tables go.")

_FEWER, _CHANNEL_SEEDS = (2, 4), 3  # times fewer MACs, and nets that lose channels
_WORKER = pathlib.Path(__file__).with_name("tfmot_pruning_worker.py")
_WEIGHTS = ("data", "sparsity", "float %", "keras_qat %", "tfmot %", "ours - tfmot", "zeros, ours", "tfmot's", "goal")
_CHANNELS = ("data", "MACs", "fewer", "parameters", "fewer", "float %", "shrunk %", "trained on %", "from scratch %")
_ABOUT_WEIGHTS = """\
Means ± standard deviation over the seeds; of the difference, taken seed by seed, ± standard error of the mean. Goal:
ours at least tfmot's, or below by two standard errors at the most. Zeros: in the kernels that are pruned, all but the
last. "all" is the mean of the levels."""
_ABOUT_CHANNELS = f"""\
Whole channels, which tfmot cannot remove, over {_CHANNEL_SEEDS} seeds: pruned and taken out by kq.pruning.shrink, then
trained on for {task.TUNE_STEPS} steps. From scratch: a net as small, trained for as many steps as all of that."""


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
        "seeds": {name: seeds_of(name) for name in _TASKS.value},
    }
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    subprocess.run([sys.executable, str(_WORKER)], input=json.dumps(request), text=True, env=environment, check=True)
    return json.loads(answers.read_text())


def channels(name: str, seed: int, data, folder: pathlib.Path, before: float, fewer: int) -> list:
    """[task, fewer, MACs, before / after, parameters, before / after, and the accuracies of the table]"""
    model = prune(name, seed, data, folder, sparsity_for(name, fewer), kq.pruning.Channels())
    small = kq.pruning.shrink(model)
    cost = kq.pruning.compare(model, small)
    accuracies = [before, task.accuracy(small, *data[2:])]
    task.fit(keras, small, *data[:2], task.TUNE_STEPS, task.FLOAT_RATE, seed + 1)
    keras.utils.set_random_seed(seed)
    scratch = task.build(keras, task.TASKS[name], [small.get_layer(layer).kernel.shape[-1] for layer in task.PRUNED])
    task.fit(keras, scratch, *data[:2], task.FLOAT_STEPS + 2 * task.TUNE_STEPS, task.FLOAT_RATE, seed)
    accuracies += [task.accuracy(each, *data[2:]) for each in (small, scratch)]
    macs, parameters = ((getattr(cost.before, of), getattr(cost.after, of)) for of in ("macs", "parameters"))
    row = [name, fewer, macs[1], macs[0] / macs[1], parameters[1], parameters[0] / parameters[1], *accuracies]
    _tell("channels", *row)
    return row


@functools.cache
def sparsity_for(name: str, fewer: int) -> float:
    """The share of channels without which a net has as nearly as can be so many times fewer MACs."""

    def macs(sparsity):
        widths = [max(round(width * (1 - sparsity)), 1) for width in task.WIDTHS]
        return kq.pruning.report(task.build(keras, task.TASKS[name], widths)).total.macs

    full = macs(0)
    return min(np.arange(0.02, 0.9, 0.02), key=lambda sparsity: abs(macs(sparsity) - full / fewer))


def weight_rows(our_rows: list[list], their_rows: list[list]) -> list[tuple]:
    """A row for each task and level, and one for the means of all levels."""
    rows = []
    for name in _TASKS.value:
        for level in (*task.LEVELS, "all"):
            before, found, zeros = _by_seed(our_rows, name, level)
            their_before, their_found, their_zeros = _by_seed(their_rows, name, level)
            assert np.allclose(before, their_before, atol=2e-3), "both begin with the same float nets"
            difference = found - their_found
            error = difference.std(ddof=1) / len(difference) ** 0.5
            verdict = "met" if difference.mean() >= -2 * error else "missed"
            shares = ["" if level == "all" else f"{100 * share.mean():.2f} %" for share in (zeros, their_zeros)]
            shown = f"{100 * difference.mean():+.2f} ± {100 * error:.2f}"
            rows.append((name, level, *map(_mean, (before, found, their_found)), shown, *shares, verdict))
    return rows


def channel_rows(found: list[list]) -> list[tuple]:
    rows = []
    for name in _TASKS.value:
        for fewer in _FEWER:
            columns = list(zip(*(row[2:] for row in found if row[:2] == [name, fewer]), strict=True))
            macs, times, parameters, parameter_times = (float(np.mean(column)) for column in columns[:4])
            cost = (round(macs), f"{times:.2f} ×", round(parameters), f"{parameter_times:.2f} ×")
            rows.append((name, *cost, *(_mean(np.array(column)) for column in columns[4:])))
    return rows


def seeds_of(name: str) -> int:
    return _SEEDS.value or task.TASKS[name].seeds


def _by_seed(rows: list[list], name: str, level: str) -> np.ndarray:
    """Float accuracy, accuracy and share of zeros, a column for each seed; with "all" the means over the levels."""
    found: dict[int, list] = {}
    for row in rows:
        if row[0] == name and level in (row[2], "all"):
            found.setdefault(row[1], []).append(row[3:])
    return np.array([np.mean(found[seed], axis=0) for seed in sorted(found)]).T


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
            for seed in range(seeds_of(name)):
                before = train_float(name, seed, data, folder)
                our_rows += ours(name, seed, data, folder, before)
                if seed < _CHANNEL_SEEDS:
                    channel_results += [channels(name, seed, data, folder, before, fewer) for fewer in _FEWER]
        their_rows = tfmots(folder)
    seeds = ", ".join(f"{name} {seeds_of(name)} seeds" for name in _TASKS.value)
    settings = (
        f"{seeds}; {task.FLOAT_STEPS} steps in float, {task.TUNE_STEPS} pruning, batch {task.BATCH}, Adam with cosine "
        f"decay, polynomial schedule, masks every {task.PRUNE_EVERY} steps up to step {task.PRUNE_UNTIL}; it took "
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
