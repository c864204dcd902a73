"""Recipes run from start to end, and what they print is so."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tflite_export

_ROOT = pathlib.Path(__file__).parents[2]


def _run(recipe, *arguments):
    """What a recipe prints."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(_ROOT / "recipes" / recipe), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _last_table(text):
    """Rows by their first cell, a dict by heading each."""
    lines = text.splitlines()
    rule = max(index for index, line in enumerate(lines) if set(line) == {"-", " "})
    ends = [index for index, sign in enumerate(lines[rule] + " ") if sign == " " and lines[rule][index - 1] == "-"]
    starts = [0, *(end + 2 for end in ends[:-1])]
    rows = []
    for line in [lines[rule - 1], *lines[rule + 1 :]]:
        if not line:
            break
        rows.append([line[start:end].strip().replace(",", "") for start, end in zip(starts, ends, strict=True)])
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def _data(name, folder):
    """A file like the real one, of noise."""
    shape, dtype, classes = {"fashion_mnist": ((28, 28), "uint8", 10), "har": ((52, 3), "int16", 4)}[name]
    generator = np.random.default_rng(0)
    splits = {"train": 96, "test": 40}
    arrays = {
        f"x_{split}": generator.integers(0, 255, (count, *shape)).astype(dtype) for split, count in splits.items()
    }
    labels = {f"y_{split}": np.arange(count) % classes for split, count in splits.items()}
    np.savez(folder / f"{name}.npz", **arrays, **labels)
    return f"--data={name}", f"--data_dir={folder}"


@pytest.mark.parametrize(
    "data", ["digits", *(pytest.param(name, marks=pytest.mark.full) for name in ("fashion_mnist", "har"))]
)
def test_prune_and_quantize(data, tmp_path):
    arguments = () if data == "digits" else _data(data, tmp_path)
    text = _run("prune_and_quantize.py", "--epochs=1", "--tune_epochs=1", f"--out={tmp_path}", *arguments)
    rows = _last_table(text)
    assert list(rows) == ["float", "pruned", "pruned + QAT", "shrunk + QAT"]
    parameters, macs, sizes, zipped = (
        [int(row[column]) for row in rows.values()] for column in ("parameters", "MACs", "bytes", "zipped")
    )
    assert macs[0] == macs[1] == macs[2] > 2 * macs[3] and parameters[0] == parameters[1] > 2 * parameters[3]
    assert zipped[1] < zipped[0] / 2 and zipped[2] < sizes[2] / 2 and sizes[3] < sizes[2] / 2
    assert tflite_export.inspect(tmp_path / "shrunk_int8.tflite").is_full_int8
    summary = tflite_export.inspect(tmp_path / "pruned_int8.tflite")
    assert summary.is_full_int8 and summary.file_bytes == sizes[2]
