"""What the QAT model assumes of TFLite's kernels, against the kernels themselves."""

import numpy as np
import pytest
import tensorflow as tf

from keras_qat import kernels, numerics, ties
from keras_qat.layers import Rescale
from keras_qat.primitives import Sum
from keras_qat.spec import Spec
from tflite_export import Op, Program, Tensor, write
from tflite_export.runtimes import RUNTIMES, run

each_runtime = pytest.mark.parametrize("runtime", RUNTIMES)
ALL_INT8 = np.arange(-128, 128).astype(np.int8)


def random_grids(count, seed) -> list[tuple[float, int]]:
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.uniform(np.log(1e-3), np.log(0.3), count)).astype(np.float32)
    return list(zip(scales.tolist(), generator.integers(-128, 128, count).tolist(), strict=True))


class OpsInParallel:
    """A program of one op on each of several pairs of grids, so that a runtime is started once for all of them."""

    def __init__(self, dtype="int8"):
        self.program, self.values, self.dtype = Program(), [], dtype

    def add(self, kind, values, grid, output_shape, output_grid, constants=(), **options) -> None:
        """One more op on `values` (integers without the batch axis), its constants behind them."""
        index = len(self.values)
        names = [f"{what}{index}" for what in ("in", "out")]
        for name, shape, (scale, zero_point) in zip(
            names, (values.shape, output_shape), (grid, output_grid), strict=True
        ):
            self.program.add(Tensor(name, (1, *shape), self.dtype, (float(scale),), int(zero_point)))
        self.program.inputs[names[0]], self.program.outputs[names[1]] = names
        inputs = [names[0], *(self.program.add(constant) for constant in constants)]
        self.program.ops.append(Op(kind, inputs, [names[1]], options))
        self.values.append(values[None].astype(self.dtype))

    def run(self, runtime) -> list[np.ndarray]:
        return [output[0].astype(int) for output in run(runtime, write(self.program), self.values).outputs]


def differing(found, expected) -> dict:
    """Index of each op that differs → how many elements of it, and by how much at the most."""
    differences = [np.abs(one - other) for one, other in zip(found, expected, strict=True)]
    return {index: (int((d > 0).sum()), int(d.max())) for index, d in enumerate(differences) if d.any()}


# --- HARD_SWISH ------------------------------------------------------------------------------------------------------


def hard_swish_grids() -> list:
    """Random pairs. The kernel refuses an output whose scale is less than 1/128 of the input's."""
    pairs = zip(random_grids(60, seed=0), random_grids(60, seed=1), strict=True)
    return [(grid, output_grid) for grid, output_grid in pairs if output_grid[0] * 127 > grid[0]][:40]


@each_runtime
def test_hard_swish_is_the_kernels(runtime):
    """All integers, on 40 pairs of scales and zero points."""
    ops, expected = OpsInParallel(), []
    assert len(hard_swish_grids()) == 40
    for grid, output_grid in hard_swish_grids():
        ops.add("HARD_SWISH", ALL_INT8, grid, (256,), output_grid)
        integers = ALL_INT8.astype(np.float32) - grid[1]
        scales = tf.constant(grid[0]), tf.constant(output_grid[0])
        result = np.asarray(kernels.hard_swish(integers, *scales)).astype(int) + output_grid[1]
        expected.append(np.clip(result, -128, 127))
    assert not differing(ops.run(runtime), expected)


# --- 16 bits ---------------------------------------------------------------------------------------------------------


@each_runtime
def test_softmax_of_16_bits_is_the_kernels(runtime):
    """Rows of all lengths, scores that are close together and far apart, some of them masked."""
    ops, expected, generator = OpsInParallel("int16"), [], np.random.default_rng(0)
    for size in (2, 8, 49, 128):
        for scale, beta in ((2**-12, 0.35), (3.3e-4, 1.0), (1e-3, 0.25), (5e-5, 1.3)):
            scores = np.clip(generator.normal(0, generator.uniform(100, 9000), (40, size)), -32767, 32767).astype(int)
            scores[::3, size // 2 :] = -32767
            ops.add("SOFTMAX", scores, (scale, 0), scores.shape, (2**-15, 0), beta=beta)
            scale = np.float64(np.float32(scale)) * np.float64(np.float32(beta))
            expected.append(np.asarray(kernels.softmax_16(scores, scale)).astype(int))
    found = ops.run(runtime)
    if runtime == "tflm":
        differences = np.concatenate([np.ravel(np.abs(a - b)) for a, b in zip(found, expected, strict=True)])
        assert differences.max() <= 1 and 0 < differences.mean() < 0.005
    else:
        assert not differing(found, expected)


RATIOS = [3.1e-5, 4e-4, 1.7e-3, 0.011, 0.0625, 0.3, 0.9]


@each_runtime
def test_dense_layers_of_16_bits_are_the_kernels(runtime):
    """Accumulators up to the ends of the output."""
    ops, expected, generator = OpsInParallel("int16"), [], np.random.default_rng(0)
    for wanted in RATIOS:
        ratio = float(kernels.snap_to_15_bits(wanted))
        assert ratio == pytest.approx(wanted, rel=2**-14)
        values = generator.integers(-32767, 32768, (200, 24))
        weights = generator.integers(-127, 128, (16, 24)) if wanted < 0.01 else generator.integers(-1, 2, (16, 24))
        bias = generator.integers(-9999, 9999, 16)
        constants = (
            Tensor("weights", weights.shape, "int8", (ratio,) * 16, axis=0, data=weights.astype(np.int8)),
            Tensor("bias", bias.shape, "int64", (ratio,) * 16, axis=0, data=bias),
        )
        ops.add("FULLY_CONNECTED", values, (1.0, 0), (200, 16), (1.0, 0), constants, keepNumDims=True)
        integers = np.asarray(kernels.requantized_16(values @ weights.T + bias, ratio))
        expected.append(np.clip(integers, -32768, 32767).astype(int))
    assert not differing(ops.run(runtime), expected)


@each_runtime
def test_matmuls_of_16_bits_are_the_kernels(runtime):
    ops, expected, generator = OpsInParallel("int16"), [], np.random.default_rng(0)
    for ratio in RATIOS[:4]:
        factor = generator.integers(-128, 128, (6, 30, 5))
        values = generator.integers(0, 2000, (6, 7, 30))
        name = ops.program.add(
            Tensor("factor", (1, *factor.shape), "int16", (1.0,), data=factor[None].astype(np.int16))
        )
        ops.add("BATCH_MATMUL", values, (ratio, 0), (6, 7, 5), (1.0, 0))
        ops.program.ops[-1].inputs.append(name)
        integers = np.asarray(kernels.requantized_16(values @ factor, np.float32(ratio)))
        expected.append(np.clip(integers, -32768, 32767).astype(int))
    assert not differing(ops.run(runtime), expected)


# --- MEAN ------------------------------------------------------------------------------------------------------------


def axes(*numbers) -> Tensor:
    return Tensor("axes", (len(numbers),), "int32", data=np.array(numbers, np.int32))


def values_with_sums(sums, count) -> np.ndarray:
    """Integers of shape (count, 1, sums): each column adds up to its sum."""
    whole, rest = np.divmod(sums, count)
    return (whole + (np.arange(count)[:, None] < rest))[:, None]


def telling_sums(count, multiplier, zero_point, generator) -> np.ndarray:
    """Sums of int8 values whose mean is close to a half on the output's grid, and any others."""
    halves = (np.arange(-255, 256) + 0.5) / multiplier
    near = np.floor(halves[:, None] + np.arange(-1, 3)).astype(int).ravel() + count * zero_point
    near = near[(near >= -128 * count) & (near <= 127 * count)]
    return np.concatenate([near, generator.integers(-128 * count, 127 * count + 1, 200)])


def mean_cases(count) -> list:
    """Grids of the input and of the output, the latter moved as `FakeQuant` does it, and sums to average."""
    generator, cases = np.random.default_rng(count), []
    for scale, zero_point in random_grids(12, seed=count):
        step = np.float32(scale / count)
        wanted = np.exp(generator.uniform(np.log(2), np.log(min(4 * count, 8000))))  # steps to one of the output
        output_scale = np.float32(step * wanted)
        moved_step, moved = ties.snap_to_kernels(tf.constant(step), output_scale, ties.FEWEST_STEPS, "down", count)
        assert moved == 1 and moved_step <= step * 1.0001, f"{wanted:.2f} steps were moved the wrong way"
        output_grid = float(np.float32(output_scale * step / moved_step)), int(generator.integers(-128, 128))
        sums = telling_sums(count, scale / (count * output_grid[0]), zero_point, generator)
        cases.append(((scale, zero_point), output_grid, sums))
    return cases


@each_runtime
@pytest.mark.parametrize("count", [5, 9, 10, 11, 12, 13, 16, 49, 64, 100, 1024])
def test_mean_rounds_once_on_a_moved_scale(runtime, count):
    """Everywhere but within the noise of XNNPACK's float32, which multiplies before it takes the zero point off."""
    ops, expected, unclear = OpsInParallel(), [], []
    for grid, output_grid, sums in mean_cases(count):
        values = values_with_sums(sums, count)
        ops.add("MEAN", values, grid, (1, 1, len(sums)), output_grid, [axes(1, 2)], keepDims=True)
        multiplier = grid[0] / (count * output_grid[0])
        exact = (sums - count * grid[1]) * multiplier
        expected.append(np.clip(np.floor(exact + 0.5) + output_grid[1], -128, 127).astype(int)[None, None])
        unclear.append(np.abs(exact % 1 - 0.5) < 2.0**-24 * 384 * (count * multiplier + 1))
    found = ops.run(runtime)
    if runtime == "xnnpack":
        assert max(np.abs(one - other).max() for one, other in zip(found, expected, strict=True)) <= 1
        found, expected = (
            [np.where(skip, 0, one) for one, skip in zip(results, unclear, strict=True)]
            for results in (found, expected)
        )
    assert not differing(found, expected)


# --- RSQRT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["litert", "tflm"])
def test_rsqrt_is_the_kernels(runtime):
    """XNNPACK leaves it to LiteRT's kernel."""
    generator, ops, expected = np.random.default_rng(9), OpsInParallel(), []
    for scale in np.exp(generator.uniform(np.log(1e-3), np.log(20), 60)).astype(np.float32):
        source = float(scale), -128
        output = float(np.float32(scale**-0.5 / generator.uniform(10, 300))), int(generator.integers(-128, 0))
        ops.add("RSQRT", ALL_INT8, source, (256,), output)
        source, grid = (Tensor(name, (256,), scale=(s,), zero_point=z) for name, (s, z) in zip("ab", (source, output)))
        expected.append([kernels.rsqrt(source, grid, hair) for hair in (-0.05, 0.05)])
    found = ops.run(runtime)
    assert not [index for index, pair in enumerate(expected) if not any((found[index] == one).all() for one in pair)]
    assert sum((one == other).all() for one, other in expected) > 50


# --- MUL with a constant ---------------------------------------------------------------------------------------------


@each_runtime
@pytest.mark.parametrize("same_grid", [True, False])
def test_rescale_rounds_once(runtime, same_grid):
    """All integers, by factors below and above 1, of both signs, onto finer and onto coarser grids."""
    generator, ops, expected = np.random.default_rng(6), OpsInParallel(), []
    for grid in random_grids(40, seed=5):
        factor = float(generator.choice([-1, 1]) * np.exp(generator.uniform(np.log(0.01), np.log(4))))
        coarseness = abs(factor) * np.exp(generator.uniform(np.log(0.3), np.log(30)))
        moved = float(np.float32(grid[0] * coarseness)), int(generator.integers(-128, 128))
        output_grid = grid if same_grid else moved
        scales = tf.constant(grid[0]), tf.constant(output_grid[0])
        integer, scale, snapped = (float(x) for x in Rescale(factor).integers(*scales))
        assert snapped == 1 and abs(integer * scale / factor - 1) < 0.02
        constant = Tensor("constant", (), "int8", (scale,), data=np.array(integer, np.int8))
        ops.add("MUL", ALL_INT8, grid, (256,), output_grid, [constant])
        exact = (ALL_INT8.astype(float) - grid[1]) * integer * (grid[0] * scale / output_grid[0])
        expected.append(np.clip(np.floor(exact + 0.5) + output_grid[1], -128, 127).astype(int))
    assert not differing(ops.run(runtime), expected)


# --- MUL of a tensor and itself ------------------------------------------------------------------------------------------


@each_runtime
def test_squares_round_alike_on_a_moved_scale(runtime):
    """Divisors at which the square of a whole number is half a step, among them, and those that take their place."""
    ops, expected = OpsInParallel(), []
    for (scale, zero_point), divisor in zip(random_grids(60, seed=9), 66 + 2 * np.arange(60), strict=True):
        step = np.float32(scale) * np.float32(scale)
        moved, is_moved = ties.snap_to_kernels(step, step * divisor, ties.FEWEST_STEPS, "down", 1, True)
        assert is_moved == 1 and round(float(step * divisor / moved)) >= divisor
        written = float(np.float32(step * (step * divisor / moved)))
        ops.add("MUL", ALL_INT8, (scale, zero_point), (256,), (written, -128))
        ops.program.ops[-1].inputs *= 2
        exact = (ALL_INT8.astype(float) - zero_point) ** 2 * np.float64(scale) ** 2 / written
        expected.append(np.clip(np.floor(exact + 0.5) - 128, -128, 127).astype(int))
    assert not differing(ops.run(runtime), expected)


# --- ADD and SUB -----------------------------------------------------------------------------------------------------


def sum_cases() -> list:
    """Grids of both terms and of the sum; in every third case that of both terms is the same."""
    generator, cases = np.random.default_rng(3), []
    for index, (first, second) in enumerate(zip(random_grids(24, seed=7), random_grids(24, seed=8), strict=True)):
        second = first if index % 3 == 0 else second
        coarseness = generator.uniform(0.6, 2.0)
        output = float(np.float32(max(first[0], second[0]) * coarseness)), int(generator.integers(-128, 128))
        cases.append((first, second, output))
    return cases


def moved_for_sums(grid, sign, *sums) -> tuple[float, int]:
    """The grid that a FakeQuant makes of one where such pairs of terms are added; None stands for a term on that grid."""
    ends = [(tf.constant(integer - grid[1], "float32")) * grid[0] for integer in (-128, 127)]
    terms = tf.constant([[term or (0.0, 0.0) for term in both] for both in sums], "float32")
    low, high = ties.stretched(*ends, ties.stretch_of_sums(*ends, Spec(), (sign,) * len(sums), terms))
    scale, zero_point = numerics.scale_and_zero_point(np.float32(low), np.float32(high), Spec())
    assert 1 - 1e-6 < scale / grid[0] < 1.0021
    return float(scale), zero_point


@each_runtime
@pytest.mark.parametrize("kind, sign", [("ADD", 1), ("SUB", -1)])
@pytest.mark.parametrize("moved", ["each", "four on one grid", "no"])
def test_sums_are_the_kernels(runtime, kind, sign, moved):
    """All pairs of integers. (XNNPACK's multipliers have 21 bits: a few in a million are on the other side of a tie, but
    not where the range is moved.)
    """
    ops, expected, layer = OpsInParallel(), [], Sum(sign)
    pairs = [numbers.ravel() for numbers in np.meshgrid(ALL_INT8, ALL_INT8)]
    cases = sum_cases()
    if moved == "each":
        cases = [(*both, moved_for_sums(output, sign, both)) for *both, output in cases]
    elif moved != "no":  # in each four the first term of the last sum is on the grid of the sums
        fours = [cases[index : index + 4] for index in range(0, len(cases), 4)]
        sums = [[both for *both, _ in four[:3]] + [(None, four[3][1])] for four in fours]
        outputs = [
            moved_for_sums(max(output for *_, output in four), sign, *both)
            for four, both in zip(fours, sums, strict=True)
        ]
        cases = [
            (first or output, second, output)
            for four, output in zip(sums, outputs, strict=True)
            for first, second in four
        ]
    for first, second, output in cases:
        constant = Tensor("term", (1, 65536), "int8", (second[0],), second[1], data=pairs[1][None])
        ops.add(kind, pairs[0], first, (65536,), output, [constant])
        scales = [tf.constant(grid[0]) for grid in (first, second, output)]
        terms = [(v - np.float32(zero)) * np.float32(s) for v, (s, zero) in zip(pairs, (first, second), strict=True)]
        real = np.asarray(layer(*terms, *scales)) / np.float32(output[0])
        expected.append(np.clip(np.round(real) + output[1], -128, 127).astype(int))
    found = differing(ops.run(runtime), expected)
    if moved != "no":
        assert not found
    elif runtime == "xnnpack":
        assert sum(count for count, _ in found.values()) <= 3e-5 * 65536 * len(expected)
        assert all(most == 1 for _, most in found.values())
    else:
        assert not found


# --- FULLY_CONNECTED on either side of ties ------------------------------------------------------------------------------


@each_runtime
@pytest.mark.parametrize("divisor", [100, 236, 480, 944, 972])
def test_layers_with_weights_break_ties_alike(runtime, divisor):
    """Sums that are half a step of the output behind a whole one, and their neighbours, on grids at random."""
    sums = np.array([divisor * step + divisor // 2 + more for step in range(255) for more in (-1, 0, 1)])
    tens, ones = np.divmod(sums, 127)  # a sum as what weights of 127 and one of 1 make of numbers from 0 to 255
    values = np.stack([*[np.clip(tens - 255 * place, 0, 255) for place in range(8)], ones], axis=1) - 128
    expected = (2 * sums + divisor) // (2 * divisor) - 128
    ops, weights = OpsInParallel(), np.array([[127] * 8 + [1]], "int8")
    part = np.float32(ties.one_part_of(np.float32(divisor)))
    for (read, _), (written, _) in zip(random_grids(16, seed=5), random_grids(16, seed=6), strict=True):
        step = np.array([np.float32(written) * part], np.float64)
        scale = ties.narrowest_hair(step, read, written)
        constants = [
            Tensor("weights", (1, 9), "int8", tuple(scale.tolist()), axis=0, data=weights),
            Tensor("bias", (1,), "int32", tuple(step.tolist()), axis=0, data=np.zeros(1, "int32")),
        ]
        grids = (read, -128), (len(sums), 1), (written, -128)
        ops.add("FULLY_CONNECTED", values, *grids, constants, keepNumDims=True, fusedActivationFunction=0)
    assert not differing([found[:, 0] for found in ops.run(runtime)], [expected] * 16)
