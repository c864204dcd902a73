"""Every clipping policy against its formula in numpy, on fixed gradients, step after step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_qat import clipping
from keras_qat.clipping import Weight

SHAPES = [[(5, 4), (4,)], [(3, 3, 2, 4), (4,)], [(3,)]]  # of three layers
STEPS = 8


def random_like(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return [[scale * generator.normal(size=shape).astype("float32") for shape in layer] for layer in SHAPES]


# Sizes differ from step to step, so that some steps are clipped and others are not; one gradient is all zeros.
GRADIENTS = [random_like(step, scale) for step, scale in enumerate([1, 0.01, 3, 0.2, 0, 10, 1, 0.5])]
WEIGHTS = random_like(99, 0.3)


def flat(layers):
    return [array for layer in layers for array in layer]


def norm_of(arrays):
    return np.sqrt(sum(np.sum(np.float64(array) ** 2) for array in arrays))


def limited(arrays, size, limit):
    return [array * (limit / max(size, limit)) for array in arrays]


def each(function):
    """A reference that treats every gradient alike and has no memory."""
    return lambda: lambda layers: [[function(array) for array in layer] for layer in layers]


def by_norm(limit):
    return lambda: lambda layers: [limited(layer, norm_of(layer), limit) for layer in layers]


def by_global_norm(limit):
    return lambda: lambda layers: [limited(layer, norm_of(flat(layers)), limit) for layer in layers]


def unit_norms(array):
    axes = tuple(range(array.ndim - 1)) if array.ndim > 1 else None
    return np.sqrt(np.sum(np.float64(array) ** 2, axis=axes, keepdims=True))


def adaptive(factor, eps):
    def clip(gradient, weight):
        limit = factor * np.maximum(unit_norms(weight), eps)
        return gradient * limit / np.maximum(unit_norms(gradient), limit)

    return lambda: (
        lambda layers: [[clip(g, w) for g, w in zip(*pair, strict=True)] for pair in zip(layers, WEIGHTS, strict=True)]
    )


def percentile(p, window):
    def start():
        norms = []

        def step(layers):
            norms.append(norm_of(flat(layers)))
            limit = np.percentile(norms[-window:], p)
            return [limited(layer, norms[-1], max(limit, 1e-30)) for layer in layers]

        return step

    return start


def top(keep, feedback):
    def start():
        errors = [[np.zeros_like(array) for array in layer] for layer in WEIGHTS]

        def one(gradient, error):
            total = gradient + error if feedback else gradient
            count = max(round(keep * total.size), 1)
            kept = np.zeros(total.size, "float32")
            best = np.argsort(-np.abs(total.ravel()), kind="stable")[:count]
            kept[best] = total.ravel()[best]
            error[...] = total - kept.reshape(total.shape)
            return kept.reshape(total.shape)

        return lambda layers: [
            [one(*pair) for pair in zip(*two, strict=True)] for two in zip(layers, errors, strict=True)
        ]

    return start


def chained(*references):
    def start():
        steps = [reference() for reference in references]

        def step(layers):
            for each_step in steps:
                layers = each_step(layers)
            return layers

        return step

    return start


CASES = {
    "value": (clipping.ByValue(0.5), each(lambda g: np.clip(g, -0.5, 0.5))),
    "norm": (clipping.ByNorm(1.5), by_norm(1.5)),
    "global_norm": (clipping.ByGlobalNorm(2.0), by_global_norm(2.0)),
    "adaptive": (clipping.Adaptive(0.2, 1e-3), adaptive(0.2, 1e-3)),
    "adaptive_eps": (clipping.Adaptive(0.1, 10.0), adaptive(0.1, 10.0)),
    "percentile": (clipping.Percentile(30, 100), percentile(30, 100)),
    "percentile_window": (clipping.Percentile(50, 3), percentile(50, 3)),
    "percentile_all": (clipping.Percentile(100, 4), percentile(100, 4)),
    "scale": (clipping.Scale(0.3), each(lambda g: 0.3 * g)),
    "top_k": (clipping.TopK(0.3), top(0.3, feedback=False)),
    "top_k_feedback": (clipping.TopK(0.25, error_feedback=True), top(0.25, feedback=True)),
    "top_k_all": (clipping.TopK(1.0), top(1.0, feedback=False)),
    "sign": (clipping.Sign(), each(np.sign)),
    "chain": (
        clipping.resolve([clipping.TopK(0.5, True), clipping.ByValue(1.0), clipping.Percentile(40, 5)]),
        chained(top(0.5, feedback=True), each(lambda g: np.clip(g, -1, 1)), percentile(40, 5)),
    ),
}


def run(policy, compiled):
    """The new gradients and the flags of all steps."""
    weights = [[Weight(tf.constant(array)) for array in layer] for layer in WEIGHTS]
    update = tf.function(lambda g, s: policy.update(g, weights, s), jit_compile=True) if compiled else None
    state, results, flags = policy.init(weights), [], []
    for gradients in GRADIENTS:
        tensors = keras.tree.map_structure(tf.constant, gradients)
        state = keras.tree.map_structure(tf.constant, state)
        new, clipped, state = update(tensors, state) if compiled else policy.update(tensors, weights, state)
        results.append(keras.tree.map_structure(np.asarray, new))
        flags.append(bool(clipped))
    return results, flags


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_policy_follows_its_formula(name, compiled):
    policy, start = CASES[name]
    reference, (results, flags) = start(), run(policy, compiled)
    for gradients, result, flag in zip(GRADIENTS, results, flags, strict=True):
        expected = reference(gradients)
        for ours, theirs in zip(flat(result), flat(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        if not isinstance(policy, (clipping.TopK, clipping.Sign, clipping.Chain, clipping.Scale)):
            assert flag == any(
                np.any(np.abs(a - b) > 1e-6) for a, b in zip(flat(gradients), flat(expected), strict=True)
            )


def test_flags_of_policies_that_change_everything():
    for name, expected in {"scale": True, "sign": True, "top_k": True, "top_k_all": False}.items():
        assert set(run(CASES[name][0], compiled=False)[1]) == {expected}
    assert not any(run(clipping.Scale(1.0), compiled=False)[1])


def test_adaptive_units_follow_the_channel_axes():
    """A depthwise kernel's units are its channels, each over its own window."""
    generator = np.random.default_rng(0)
    weight, gradient = (generator.normal(size=(3, 3, 4, 2)).astype("float32") for _ in range(2))
    policy = clipping.Adaptive(0.01, 1e-3)
    [[clipped]], was_clipped, _ = policy.update([[gradient]], [[clipping.Weight(weight, (-2, -1))]], ())
    limit = 0.01 * np.linalg.norm(weight.reshape(9, 8), axis=0)
    expected = gradient * (limit / np.linalg.norm(gradient.reshape(9, 8), axis=0)).reshape(4, 2)
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)
    assert was_clipped


def test_of_equal_entries_top_k_keeps_the_first():
    mask = clipping.largest(tf.constant([1.0, -2.0, 2.0, 2.0, -1.0]), 2)
    assert np.asarray(mask).tolist() == [0, 1, 1, 0, 0]


BAD = [float("nan"), float("inf"), 0, -1.0, "1", None]


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        clipping.ByValue,
        clipping.ByNorm,
        clipping.ByGlobalNorm,
        clipping.Adaptive,
        lambda value: clipping.Adaptive(0.01, value),
        clipping.Percentile,
        lambda value: clipping.Percentile(10, value),
        clipping.Scale,
        clipping.TopK,
    ],
)
def test_bad_limits_are_refused(make, value):
    with pytest.raises(ValueError, match="Received: "):
        make(value)


@pytest.mark.parametrize("policy", [0.5, "norm", [], [clipping.Sign(), 1.0], [None]])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(ValueError, match="kq.clipping"):
        clipping.resolve(policy)
