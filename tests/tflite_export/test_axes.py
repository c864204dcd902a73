"""Ops on many axes, as those on few: the same numbers."""

import numpy as np
import pytest

from tflite_export import Op, Program, Tensor, write
from tflite_export.axes import with_few_axes
from tflite_export.runtimes import run


def program_of(kind, shape, result, constants, **options) -> Program:
    program = Program(inputs={"x": "x"}, outputs={"y": "y"})
    for name, size in (("x", shape), ("y", result)):
        program.add(Tensor(name, size, "int8", (0.1,), 3))
    names = [
        program.add(Tensor(f"c{index}", (len(numbers),), "int32", data=np.array(numbers, np.int32), batched=False))
        for index, numbers in enumerate(constants)
    ]
    program.ops = [Op(kind, ["x", *names], ["y"], options)]
    return program


def transposes():
    generator = np.random.default_rng(0)
    for _ in range(12):
        shape = (1, *generator.integers(1, 4, generator.integers(4, 6)).tolist())
        yield shape, generator.permutation(len(shape)).tolist()
    yield (1, 2, 4, 2, 4, 3), [0, 1, 3, 2, 4, 5]  # windows
    yield (1, 5, 3, 2, 4), [2, 0, 3, 1, 4]  # queries, keys and values
    yield (1, 1, 1, 1, 1), [1, 0, 4, 3, 2]


def integers(shape):
    return np.random.default_rng(1).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("shape, order", transposes(), ids=str)
def test_a_transpose_of_many_axes_runs_everywhere(shape, order):
    expected = integers(shape).transpose(order)
    if expected.shape[0] != 1:  # a runner takes samples along the first axis
        order = [0, *[axis for axis in order if axis]]
        expected = integers(shape).transpose(order)
    program = with_few_axes(program_of("TRANSPOSE", shape, expected.shape, [order]))
    assert max(len(program.tensors[op.inputs[0]].shape) for op in program.ops if op.kind == "TRANSPOSE") <= 5
    for runtime in ("litert", "xnnpack", "tflm"):
        np.testing.assert_array_equal(run(runtime, write(program), [integers(shape)]).outputs[0], expected)


_WHOLE = slice(None)
SLICES = [
    ((1, 3, 2, 5, 4), (_WHOLE, 1)),
    ((1, 3, 2, 5, 4), (_WHOLE, slice(1, 3), _WHOLE, slice(0, 5, 2))),
    ((1, 3, 2, 5, 4), (_WHOLE, _WHOLE, 1, slice(1, 4), 2)),
    ((1, 3, 2, 5, 4, 2), (_WHOLE, _WHOLE, _WHOLE, slice(2, 5))),
    ((1, 2, 1, 3, 1, 5, 2), (_WHOLE, 0, 0)),
]


@pytest.mark.parametrize("shape, keys", SLICES, ids=str)
def test_a_slice_of_many_axes_runs_everywhere(shape, keys):
    expected = integers(shape)[keys]
    keys = [*keys, *[_WHOLE] * (len(shape) - len(keys))]
    shrunk = sum(1 << axis for axis, key in enumerate(keys) if isinstance(key, int))
    bounds = [
        (key, key + 1, 1) if isinstance(key, int) else key.indices(size) for key, size in zip(keys, shape, strict=True)
    ]
    options = {"beginMask": 1, "endMask": 1, "shrinkAxisMask": shrunk}
    program = with_few_axes(
        program_of("STRIDED_SLICE", shape, expected.shape, list(zip(*bounds, strict=True)), **options)
    )
    for runtime in ("litert", "xnnpack", "tflm"):
        np.testing.assert_array_equal(run(runtime, write(program), [integers(shape)]).outputs[0], expected)
