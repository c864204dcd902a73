"""How exactly every operation, and two whole networks, compute on LiteRT, XNNPACK and TFLM what the QAT model does.

Runs the case table of the tests, each case alone and between two dense layers, on 64 random inputs; then MobileNetV2 and
ResNet50 (96 px, random weights, a few training steps), with their op lists beside those of TFLiteConverter's PTQ.

    python benchmarks/op_parity.py [--only=conv] [--nonetworks]
"""

import collections
import pathlib
import sys

import keras
import numpy as np
from absl import app, flags
from printout import default_out, heading, publish

import keras_qat as kq
import tflite_export
from tflite_export.table import table

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from cases import OPERATIONS, inputs_for  # noqa: E402
from models import converted  # noqa: E402

_RUNTIMES = ("litert", "xnnpack", "tflm")
_ONLY = flags.DEFINE_string("only", "", "Run just the cases whose name contains this.")
_NETWORKS = flags.DEFINE_bool("networks", True, "Run the two networks too.")
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the text goes.")


def measure_case(model: keras.Model, scheme: kq.Scheme) -> tuple[list[str], tflite_export.Parity]:
    """The ops of the file, and how it compares after calibration."""
    inputs = inputs_for(model)
    qat = kq.calibrate(kq.quantize(model, scheme), inputs)
    tflite = tflite_export.write(kq.freeze(qat))
    summary = tflite_export.inspect(tflite)
    assert summary.is_full_int8, summary.reasons
    return [op.kind for op in summary.ops], tflite_export.verify(tflite, qat, inputs, runtimes=_RUNTIMES)


def cells(parity: tflite_export.Parity) -> list[str]:
    """Per runtime the worst output: share that differs, and by how much."""
    found = []
    for runtime in _RUNTIMES:
        results = [result for result in parity.results if result.runtime == runtime]
        if not results:
            found.append("-")
            continue
        share, most = max(r.mismatch for r in results), max(r.max_lsb for r in results)
        found.append("exact" if most == 0 else f"{100 * share:.3f} % {most}")
    return found


def operations_table(only: str) -> str:
    rows, exact = [], collections.Counter()
    for case in OPERATIONS:
        if only not in case.name:
            continue
        kinds, alone = measure_case(case.one_op(), case.scheme)
        _, between = measure_case(case.three_ops(), case.scheme)
        held = alone.max_lsb <= 1 and (between.max_lsb <= 1 or bool(case.apart and between.passed))
        held = held and (not case.exact or max(alone.mismatch, between.mismatch) <= 0.001)
        rows.append((case.name, *cells(alone), *cells(between), "held" if held else "missed", " ".join(kinds)))
        exact["alone"] += alone.exact
        exact["between"] += between.exact
        print(f"  {case.name}: {rows[-1][-2]}", flush=True)
    columns = ("case", *[f"{r}, alone" for r in _RUNTIMES], *[f"{r}, of three" for r in _RUNTIMES], "bar", "ops")
    missed = [row[0] for row in rows if row[-2] == "missed"]
    return (
        f"{table(columns, rows)}\n\n{len(rows)} cases. Exact on all three runtimes: {exact['alone']} alone, "
        f"{exact['between']} between two dense layers. Cells: share of elements that differ, largest difference in LSB.\n"
        f"Bar missed by: {', '.join(missed) or 'none'}."
    )


def _networks():
    shape = (96, 96, 3)
    yield "MobileNetV2 0.35", keras.applications.MobileNetV2(shape, 0.35, weights=None, classes=10)
    yield "ResNet50", keras.applications.ResNet50(input_shape=shape, weights=None, classes=10)


def networks_table() -> str:
    rows = []
    for name, model in _networks():
        generator = np.random.default_rng(0)
        images = generator.uniform(-1, 1, (200, 96, 96, 3)).astype("float32")
        qat = kq.quantize(model)
        qat.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
        qat.fit(images, generator.integers(0, 10, 200), batch_size=16, steps_per_epoch=5, verbose=0)
        tflite = tflite_export.write(kq.freeze(qat))
        parity = tflite_export.verify(tflite, qat, images, runtimes=_RUNTIMES)
        ours, theirs = (tflite_export.inspect(file) for file in (tflite, converted(model, images)))
        rows.append((name, *cells(parity), f"{100 * parity.top1:.1f} %", op_list(ours), op_list(theirs)))
        print(f"  {name}: done", flush=True)
    columns = ("network", *_RUNTIMES, "top-1 equal", "ops", "ops of TFLiteConverter's PTQ")
    return table(columns, rows)


def op_list(summary: tflite_export.Summary) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in summary.op_counts.items())


def main(argv) -> None:
    del argv
    keras.utils.set_random_seed(0)
    title = "Operation by operation: the QAT model's prediction against the runtimes, integer by integer"
    parts = [heading(title, "64 random inputs a case, calibrated", with_peer=False), operations_table(_ONLY.value)]
    if _NETWORKS.value:
        parts.append(networks_table())
    publish("\n\n".join(parts), _OUT.value)


if __name__ == "__main__":
    app.run(main)
