"""Where ranges and steps go so that all kernels round alike: at places between two steps where none decides a tie otherwise.

LiteRT's reference kernels and TensorFlow Lite Micro round twice, XNNPACK once, and each has multipliers of its own. Instead
of simulating one of them, against which the others would differ, grids are moved by a hair or by a little to where all agree.
"""

import functools
import math

import numpy as np
import tensorflow as tf

from keras_qat.arrays import is_numpy, ops
from keras_qat.numerics import scale_and_zero_point
from keras_qat.spec import Spec
from keras_qat.traced_once import traced_once


@traced_once
def snapped_grid(low, high, spec: Spec, step, count: int = 1, square: bool = False):
    """A range made a little wider, to where all kernels round what they write there alike (see `snap_to_kernels`).

    Args:
        low, high: A range, widened.
        spec: The bits.
        step: The real value of one step of the accumulator.
        count: How many values a mean is over.
        square: What is written is the product of a tensor and itself.

    Returns:
        `(low, high, scale, quarter_step)`, the last one being what decides ties (see `Quantized`), or zero.
    """
    scale, _ = scale_and_zero_point(low, high, spec)
    moved_step, moved = snap_to_kernels(step, scale, FEWEST_STEPS, "down", count, square)
    ratio = step / moved_step
    low, high = low * ratio, high * ratio
    return low, high, scale_and_zero_point(low, high, spec)[0], 0.25 * step * moved


_STRETCHES = 1.0 + np.arange(2048) * 2.0**-20  # ranges to try for sums
_AT_ONCE, _ROUNDS = 8, 12  # how many of them are looked at in all their integers, and how often at most
_UNSURE = 4e-6  # of a step: LiteRT's reference kernels and TFLM are as close to the exact sum as this


@traced_once
def stretch_of_sums(low, high, spec: Spec, signs: tuple[int, ...], terms):
    """By how much to widen a range that sums are written to, so that all kernels add alike whatever the integers.

    XNNPACK has multipliers of 21 bits. On two of 65,536 pairs of integers that decides a tie otherwise than the exact sum
    does, and layers behind amplify it. The ranges to try, up to 0.2 % wider, are ordered by how well such multipliers fit
    all of the sums. The first one is taken on whose grid no pair of integers of any sum is added in two ways; if there is
    none, the one with the fewest such pairs.

    Args:
        low, high: A range, widened; tensors.
        spec: The bits.
        signs: For each sum 1, or -1 for a difference.
        terms: The scale and the zero point of both terms of each sum, of shape (sums, 2, 2). A scale of 0 stands for the
            grid that is looked for: the term shares it.

    Returns:
        What to give `stretched`.
    """
    scales, zeros = scale_and_zero_point(*stretched(low, high, _STRETCHES), spec)
    scales, zeros = scales[:, None, None], tf.cast(zeros, "float64")[:, None, None]
    given, given_zeros, shares = terms[..., 0], tf.cast(terms[..., 1], "float64"), terms[..., 0] == 0.0
    ratios = tf.where(shares, np.float64(1), tf.cast(given, "float64") / tf.cast(scales, "float64"))
    largest = tf.bitcast(tf.reduce_max(ratios, axis=2, keepdims=True), "int64")
    unit = tf.bitcast((largest // 2**52 - 20) * 2**52, "float64")  # 2^-20 of the power of two below it
    rounded = tf.where(shares, np.float64(1), tf.cast(given / scales, "float64"))
    rounded = tf.round(rounded / unit) * unit
    order = tf.argsort(tf.reduce_max(tf.reduce_sum(tf.abs(rounded - ratios), axis=2), axis=1), stable=True)
    turns = tf.reshape(order[: _AT_ONCE * _ROUNDS], (_ROUNDS, _AT_ONCE))
    signs = np.array([[1.0, sign] for sign in signs])

    def look(turn, best, fewest):
        tried = tf.gather(turns, turn)
        zero_points = tf.where(shares, tf.gather(zeros, tried), given_zeros)
        counts = _added_in_two_ways(signs * tf.gather(ratios, tried), signs * tf.gather(rounded, tried), zero_points)
        here = tf.reduce_min(counts)
        best = tf.where(here < fewest, tf.gather(tried, tf.argmin(counts)), best)
        return turn + 1, best, tf.minimum(here, fewest)

    begin = tf.constant(0), order[0], tf.constant(2**30)
    _, best, _ = tf.while_loop(lambda turn, _, fewest: (turn < _ROUNDS) & (fewest > 0), look, begin)
    return tf.cast(tf.gather(_STRETCHES, best), "float32")


def _added_in_two_ways(ratios, rounded, zero_points):
    """How many pairs of integers come to another sum by rounded ratios, or so close to a tie that kernels differ.

    Only the two first terms next to a tie are looked at for each second one.

    Args:
        ratios: Of the scales of both terms to that of the sum, of shape (tries, sums, 2).
        rounded: The same as a kernel has them.
        zero_points: Of the terms.

    Returns:
        A number for each try.
    """
    tries = tf.shape(ratios)[0]
    ratios, rounded, zero_points = (tf.reshape(x, (-1, 2, 1)) for x in (ratios, rounded, zero_points))
    integers = np.arange(-128.0, 128.0) - zero_points
    exact, inexact = ratios * integers, rounded * integers
    # A sum is at a tie where the one term is what the other lacks of half a step, behind the point.
    place_of_tie = _behind_the_point(0.5 - exact[:, 1])
    behind = _behind_the_point(exact[:, 0])
    ranks = tf.argsort(behind, axis=1)
    above = tf.searchsorted(tf.gather(behind, ranks, batch_dims=1), place_of_tie)
    found = tf.zeros(tf.shape(place_of_tie), "int32")
    for neighbour in (above, above - 1):
        first = tf.gather(ranks, neighbour % 256, batch_dims=1)
        true, theirs = (tf.gather(terms[:, 0], first, batch_dims=1) + terms[:, 1] + 0.5 for terms in (exact, inexact))
        is_close = tf.abs(true - tf.round(true)) < _UNSURE
        found += tf.cast(is_close | (tf.floor(true) != tf.floor(theirs)), "int32")
    return tf.reduce_sum(tf.reshape(found, (tries, -1)), axis=1)


def _behind_the_point(x):
    return x - tf.floor(x)


def stretched(low, high, stretch):
    """A range, made wider."""
    # In float64 for XLA, which would make one operation of a float32 product and the difference behind it.
    stretch = ops.cast(stretch, "float64")
    return tuple(ops.cast(ops.cast(end, "float64") * stretch, "float32") for end in (low, high))


# XNNPACK computes M in float32, in three roundings: with 1e-7 it lost 45 % of a ResNet50's outputs by 1 LSB.
_SMALLEST_HAIR = 3e-7
_LIFTS_TIES = 6.1e-8  # what half a unit of the last place of a float32 is at most
MOST_STEPS = 8192.0  # with more steps of the accumulator to one of the output, kernels disagree once in ten thousand
FEWEST_STEPS = 6.0  # the smallest even number with room below the next power of two, after 2


@traced_once
def snap_to_kernels(step, output_scale, fewest: float, move: str, count: int = 1, square: bool = False):
    """Moves the accumulator's step a little, to where all kernels round alike.

    XNNPACK rounds `accumulator · M` once, `M = step / output_scale`. TFLM and LiteRT's reference kernels round twice:
    first to `s` fractional bits, `2^-(s+1) <= M < 2^-s`, then to integers; so whatever lies less than `2^-(s+1)` below a
    half is rounded up, which is one result in about `1 / M`. But an accumulator is an integer. With `M = (1 + e) / D` and
    an even D no integer multiple of M lies there: the closest ones are a hair above the half (that is what e is for) and
    a whole M below, and M is more than `2^-(s+1)` as long as D is not too close below a power of two.

    MEAN splits M into a ratio of scales and `1 / count`, and takes s from the rounded-down logarithms of both. There D
    must not be too close above a power of two either (see `has_divisors`).

    MUL of a tensor and itself is a table for XNNPACK: it adds the zero point, -128, before it rounds in float32, which
    loses a hair below 4e-6 of a step. There D must be one at which no whole number's square is so close to a tie.

    Args:
        step: Real value of one step of the accumulator, per channel.
        output_scale: Of the tensor that is written.
        fewest: Channels are moved where `1 / M` is from this (at least 6) to 8192.
        move: "up" only ever makes steps larger, "down" smaller, "nearest" either.
        count: How many values a MEAN is over.
        square: What is written is the product of a tensor and itself.

    Returns:
        The moved steps, and for each channel 1.0 if it was moved, else 0.0.
    """
    divisor = kernel_divisor(output_scale / step, fewest, move, count, square)
    moved = step * MOST_STEPS >= output_scale
    if move != "down":
        moved = ops.logical_and(step * fewest <= output_scale, moved)
    return ops.where(moved, output_scale * one_part_of(divisor), step), ops.cast(moved, "float32")


@traced_once
def snap_by_integers(step, integers, output_scale):
    """`snap_to_kernels` for channels with one integer each, which may become smaller: D goes down to the next one that will
    do, the integer in the same proportion. What they stand for together moves by about a percent at the most.

    Returns:
        The moved steps, the integers, and for each channel 1.0 if it was moved, else 0.0.
    """
    wanted = output_scale / step
    divisor = ops.where(
        wanted < 2.0, 1.0, ops.where(wanted < FEWEST_STEPS, 2.0, kernel_divisor(wanted, FEWEST_STEPS, "up"))
    )
    part = ops.where(wanted < 2.0, 1.0 + _SMALLEST_HAIR, one_part_of(divisor))
    moved = ops.logical_and(step <= output_scale, step * MOST_STEPS >= output_scale)
    step = ops.where(moved, output_scale * part, step)
    return step, ops.where(moved, ops.round(integers * (divisor / wanted)), integers), ops.cast(moved, "float32")


def kernel_divisor(wanted, fewest: float, move: str, count: int = 1, square: bool = False):
    """The even number D next to `wanted` with which all kernels round alike (see `snap_to_kernels`)."""
    wanted = ops.clip(wanted, max(fewest, _smallest_divisor(count)), MOST_STEPS)
    below, above = (table[wanted] for table in _divisors(count, square))
    if move == "up":
        return below
    if move == "down":
        return ops.where(wanted > below, above, below)
    return ops.where(wanted * wanted > below * above, above, below)


def one_part_of(divisor):
    """`(1 + e) / D` with the hair e that lifts ties above the half."""
    return _parts()[divisor]


def narrowest_hair(step: np.ndarray, input_scale: float, output_scale: float) -> np.ndarray:
    """The weights' scales for the file. Where the steps are snapped with the smallest hair, those that make it smaller still.

    The hair e of `(1 + e) / D` lifts ties above the half. XNNPACK computes M in float32 from the three scales, so half a
    unit of its last place is the least it needs, but a step that is rounded itself has to be further off to be safe. Here
    all that is rounded is known: the smallest scale is taken with which every kernel's own M lifts them. (With 3e-7 and
    D = 972, reference kernels lift 167.5 - 1 / D too.)
    """
    given, read, written = np.float32(step / np.float32(input_scale)), np.float32(input_scale), np.float32(output_scale)
    divisor = np.round(np.minimum(np.float64(written) / step, 2 * MOST_STEPS))
    hair = step * divisor / np.float64(written) - 1.0
    scale = np.float32(np.float64(written) / divisor / read * (1.0 - 2e-7))
    found = np.zeros(scale.shape, bool)
    for _ in range(12):
        product = read * scale
        multipliers = np.float32(product / written), np.float64(product) / written, np.float64(read) * scale / written
        found = np.all([np.float64(one) * divisor - 1.0 > _LIFTS_TIES for one in multipliers], axis=0)
        scale = np.where(found, scale, np.nextafter(scale, np.float32(np.inf)))
    is_smallest = (divisor >= FEWEST_STEPS) & (hair > 0) & (hair < 2 * _SMALLEST_HAIR)
    return np.where(is_smallest & found, np.minimum(scale, given), given)


class _Table:
    """A number for each even one, `table[x]` that for the largest one not above x. Looked up, for arrays and for tensors.

    Computed anew wherever a layer asks it would be most of the operations of an unrolled recurrent layer.
    """

    def __init__(self, values: np.ndarray):
        self.values = values.astype("float32")

    @functools.cached_property
    def _tensor(self):
        with tf.init_scope():  # one for all graphs, which read it like a variable
            return tf.constant(self.values)

    def __getitem__(self, x):
        index = ops.cast(ops.where(x >= 0, 0.5 * x, 0.0), "int32")  # that of NaN is 0
        return self.values[index] if is_numpy(index) else tf.gather(self._tensor, index)


@functools.cache
def _divisors(count: int, square: bool) -> tuple[_Table, _Table]:
    """For each even number up to `MOST_STEPS` the next D below (or the number itself), and the next one above that."""
    even = np.arange(2.0, 2.0 * MOST_STEPS + 1.0, 2.0, dtype="float32")
    power = _next_power_of_two(even)
    found = even[(even <= _highest_below(power)) & (even >= _lowest_above(power, count))]
    if square:
        found = found[~_has_squares_at_ties(found)]
    place = np.searchsorted(found, np.arange(0.0, MOST_STEPS + 1.0, 2.0), side="right") - 1
    return _Table(found[np.maximum(place, 0)]), _Table(found[np.maximum(place, 0) + 1])


def _has_squares_at_ties(divisor: np.ndarray) -> np.ndarray:
    """Whether a square of a difference of two integers is at a tie that its hair does not lift out of float32's last place."""
    tie = np.arange(256) + 0.5
    is_lost = np.outer(_hair(divisor), tie) < 4e-6
    return np.any(is_lost & np.isin(np.outer(divisor, tie), np.arange(256.0) ** 2), axis=1)


@functools.cache
def _parts() -> _Table:
    """`one_part_of` every even number."""
    divisor = np.arange(2.0, 2.0 * MOST_STEPS + 1.0, 2.0, dtype="float32")
    parts = (1.0 + _hair(divisor)) / divisor
    return _Table(np.concatenate([parts[:1], parts]))


def _hair(divisor: np.ndarray) -> np.ndarray:
    """Half of the way to where double rounding would lift the next integer too, at the largest result."""
    distance = 1.0 / divisor - 1.0 / _next_power_of_two(divisor)
    return np.maximum(0.5 * distance / 255.5, _SMALLEST_HAIR)


@functools.cache
def has_divisors(count: int) -> bool:
    """Whether MEAN over so many values can round alike everywhere: there is a D in every octave, and on the grid of what it
    reads, or on one at most a fifth coarser, too.
    """
    if _share_of_octave(count) >= 0.9:
        return False
    return bool(kernel_divisor(np.float32(count), FEWEST_STEPS, "down", count) <= 1.2 * count)


def _share_of_octave(count: int) -> float:
    """Where in the octave below a power of two (0.5 to 1) a divisor may begin."""
    return count / 2.0 ** count.bit_length()


def _smallest_divisor(count: int) -> float:
    """The smallest D of all: the further a count is above a power of two, the more of the small octaves have none."""
    share = _share_of_octave(count)
    if share == 0.5:
        return FEWEST_STEPS
    octaves = (2.0**exponent for exponent in range(3, 14))
    return next(low for p in octaves if (low := 2.0 * math.ceil(0.51 * share * p)) <= 2.0 * math.floor(0.475 * p))


def _next_power_of_two(x: np.ndarray) -> np.ndarray:
    return np.exp2(np.ceil(np.log2(np.maximum(x, 1.0)))).astype("float32")


def _highest_below(power: np.ndarray) -> np.ndarray:
    """The highest even number that keeps its distance from a power of two."""
    return 2.0 * np.floor(0.475 * power)


def _lowest_above(power: np.ndarray, count: int) -> np.ndarray:
    """The lowest even number in the octave that ends at `power`."""
    share = _share_of_octave(count)
    if share == 0.5:
        return 0.5 * power + 2.0
    return 2.0 * np.ceil(0.51 * share * power)
