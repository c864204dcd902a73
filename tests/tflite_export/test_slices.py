"""Slices that move in front of pads, and into one another: leaner, and the same on every runtime."""

import numpy as np
import pytest

from tflite_export import Op, Program, Tensor, write
from tflite_export.optimize import optimize
from tflite_export.runtimes import RUNTIMES, run

SHAPE = (1, 7, 6, 3)


class Chain:
    """A program of ops one behind the other, the last one's result given out."""

    def __init__(self, *steps):
        self.program = Program({"x": Tensor("x", SHAPE, scale=(0.1,), zero_point=-5)}, inputs={"x": "x"})
        self.last = "x"
        for kind, *arguments in steps:
            getattr(self, kind)(*arguments)
        self.program.outputs = {"y": self.last}

    def _op(self, kind, shape, constants=(), **options):
        names = [self.program.add(Tensor(n, v.shape, str(v.dtype), data=v, batched=False)) for n, v in constants]
        before, scale = self.last, {"scale": (0.1,), "zero_point": -5}
        self.last = self.program.add(Tensor(kind.lower(), shape, **scale))
        self.program.ops.append(Op(kind, [before, *names], [self.last], options))

    def pad(self, *pads):
        shape = tuple(size + sum(pair) for size, pair in zip(self.program.tensors[self.last].shape, pads, strict=True))
        self._op("PAD", shape, [("pads", np.array(pads, np.int32))])

    def slice(self, *slices):
        sizes = self.program.tensors[self.last].shape
        picked = [range(size)[one] for size, one in zip(sizes, slices, strict=True)]
        bounds = np.array([one.indices(size) for one, size in zip(slices, sizes, strict=True)], np.int32).T
        masks = {"beginMask": 1, "endMask": 1, "shrinkAxisMask": 0}
        constants = list(zip(("begin", "end", "step"), bounds, strict=True))
        self._op("STRIDED_SLICE", tuple(map(len, picked)), constants, **masks)

    def pool(self, kind, stride, window=1):
        _, high, wide, channels = self.program.tensors[self.last].shape
        sizes = {"filterHeight": window, "filterWidth": window, "strideH": stride, "strideW": stride}
        self._op(f"{kind}_POOL_2D", (1, -(-high // stride), -(-wide // stride), channels), padding=0, **sizes)


ALL = slice(None)
PAD = ("pad", (0, 0), (1, 2), (0, 1), (0, 0))
CASES = {
    "keras_nasnet": ([("pad", (0, 0), (0, 1), (0, 1), (0, 0)), ("slice", ALL, slice(1, 8), slice(1, 7), ALL), ("pool", "AVERAGE", 2)], ["STRIDED_SLICE", "PAD"]),
    "of_what_is_there": ([PAD, ("slice", ALL, slice(3, 6), slice(1, 4), slice(0, 2))], ["STRIDED_SLICE"]),
    "takes_off_one_side": ([PAD, ("slice", ALL, slice(1, 10), ALL, ALL)], ["PAD"]),
    "skips": ([PAD, ("slice", ALL, slice(0, 10, 3), slice(1, 7, 2), ALL)], ["STRIDED_SLICE", "PAD"]),
    "all_of_it": ([PAD, ("slice", ALL, slice(1, 8), slice(0, 6), ALL)], ["STRIDED_SLICE"]),
    "only_padding": ([PAD, ("slice", ALL, slice(0, 1), ALL, ALL)], ["PAD", "STRIDED_SLICE"]),
    "slices": ([("slice", ALL, slice(1, 7, 2), ALL, ALL), ("slice", ALL, slice(1, 3), slice(0, 6, 3), slice(2, 3))], ["STRIDED_SLICE"]),
    "three": ([("slice", ALL, slice(1, 7), ALL, ALL), ("slice", ALL, ALL, slice(2, 6), ALL), ("pool", "MAX", 2)], ["STRIDED_SLICE"]),
    "pool_alone": ([("pool", "AVERAGE", 2)], ["AVERAGE_POOL_2D"]),
    "pool_of_more": ([("slice", ALL, slice(1, 7), ALL, ALL), ("pool", "MAX", 2, 2)], ["STRIDED_SLICE", "MAX_POOL_2D"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_leaner_with_the_same_results(name):
    steps, kinds = CASES[name]
    program = Chain(*steps).program
    leaner = optimize(program)
    leaner.check()
    assert [op.kind for op in leaner.ops] == kinds
    x = np.random.default_rng(0).integers(-128, 128, (4, *SHAPE[1:])).astype(np.int8)
    for runtime in RUNTIMES:
        found, expected = (run(runtime, write(each), [x]).outputs[0] for each in (leaner, program))
        np.testing.assert_array_equal(found, expected)


def test_a_pad_that_others_read_stays():
    program = Chain(PAD, ("slice", ALL, slice(1, 4), ALL, ALL)).program
    program.outputs["padded"] = program.ops[0].outputs[0]
    assert [op.kind for op in optimize(program).ops] == ["PAD", "STRIDED_SLICE"]


def test_with_any_batch():
    program = Chain(*CASES["keras_nasnet"][0]).program
    program.dynamic_batch = True
    x = np.random.default_rng(0).integers(-128, 128, (5, *SHAPE[1:])).astype(np.int8)
    found, expected = (run("litert", write(each), [x]).outputs[0] for each in (optimize(program), program))
    np.testing.assert_array_equal(found, expected)
