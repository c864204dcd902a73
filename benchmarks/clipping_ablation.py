"""Does gradient clipping help training with few bits? Accuracy of the file, with three policies and with none.

    python benchmarks/clipping_ablation.py --data_dir=path/to/data

For each seed a net is trained in float, quantized to 8 and to 4 bits of weights, and trained on from there at a usual and
at a tenfold learning rate: with the same batches, once with each policy and once with none. Every policy is compared with
none seed by seed, so that what a seed does to both of them cancels out.
"""

import keras
import numpy as np
import pruning_task
from absl import app, flags
from printout import default_out, heading, publish

import keras_qat as kq
import tflite_export
from tflite_export.table import table

_DATA = flags.DEFINE_string("data_dir", None, "Folder with fashion_mnist.npz.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 4, "How many seeds.", lower_bound=3)
_STEPS = flags.DEFINE_integer("steps", 384, "Steps of quantized training.", lower_bound=1)
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the table goes.")

_TASK = "fashion_mnist"
_BITS, _RATES = (8, 4), (1e-3, 1e-2)
_NONE = "none"
POLICIES = {
    _NONE: None,
    "ByGlobalNorm(1.0)": kq.clipping.ByGlobalNorm(1.0),
    "Adaptive(0.01)": kq.clipping.Adaptive(0.01),
    "Percentile(10)": kq.clipping.Percentile(10),
}


def _trained(seed: int, data) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = pruning_task.build(keras, pruning_task.TASKS[_TASK])
    x, y, *_ = data
    pruning_task.fit(keras, model, x, y, pruning_task.FLOAT_STEPS, pruning_task.FLOAT_RATE, seed)
    return model


def _accuracy(model, bits: int, rate: float, policy, seed: int, data) -> tuple[float, float]:
    """In percent, of the file; and the share of steps that were clipped, as far as there are any."""
    x, y, x_test, y_test = data
    scheme = kq.Scheme(f"{bits} bits", weights=kq.Spec(bits=bits, symmetric=True, per_channel=True))
    qat = kq.quantize(model, scheme)
    callbacks = [] if policy is None else [kq.callbacks.GradientClipping(policy)]
    pruning_task.fit(keras, qat, x, y, _STEPS.value, rate, seed + 100, callbacks)
    clipped = qat.history.history.get("clipped", [])
    file = tflite_export.write(kq.freeze(qat))
    right = np.argmax(tflite_export.predict(file, x_test), axis=-1) == y_test
    return 100.0 * float(np.mean(right)), 100.0 * float(np.mean(clipped)) if clipped else float("nan")


def _rows(found: dict, floats: list[float]) -> list[tuple]:
    rows = []
    for (bits, rate, name), results in found.items():
        accuracies, clipped = np.array(results).T
        gains = accuracies - np.array(found[bits, rate, _NONE])[:, 0]
        error = np.std(gains, ddof=1) / np.sqrt(len(gains))
        verdict = "" if name == _NONE else "helps" if np.mean(gains) > 2 * error else "noise"
        verdict = "hurts" if name != _NONE and np.mean(gains) < -2 * error else verdict
        gain = "" if name == _NONE else f"{np.mean(gains):+.2f} ± {error:.2f}"
        share = "" if np.isnan(clipped).any() else f"{np.mean(clipped):.0f}"
        spread = f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
        rows.append((bits, f"{rate:g}", name, f"{np.mean(floats):.2f}", spread, share, gain, verdict))
    return rows


def main(_) -> None:
    data = pruning_task.load(_DATA.value, _TASK)
    found: dict[tuple, list] = {}
    floats = []
    for seed in range(_SEEDS.value):
        model = _trained(seed, data)
        floats.append(100.0 * pruning_task.accuracy(model, *data[2:]))
        for bits in _BITS:
            for rate in _RATES:
                for name, policy in POLICIES.items():
                    result = _accuracy(model, bits, rate, policy, seed, data)
                    found.setdefault((bits, rate, name), []).append(result)
                    print(f"seed {seed}, {bits} bits, rate {rate:g}, {name}: {result[0]:.2f} %", flush=True)
    headings = ("bits", "rate", "clipping", "float %", "int8 file %", "steps clipped %", "against none", "")
    settings = (
        f"{_TASK}, {_SEEDS.value} seeds, {_STEPS.value} steps of QAT, Adam, cosine decay; mean ± deviation over seeds; against "
        "none: mean of the differences within a seed ± its standard error, called noise within two of these"
    )
    title = heading("Gradient clipping in training with few bits", settings, with_peer=False)
    publish(f"{title}\n\n{table(headings, _rows(found, floats))}", _OUT.value)


if __name__ == "__main__":
    app.run(main)
