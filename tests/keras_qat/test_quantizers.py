"""How ranges are found: each quantizer alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_qat.layers import FakeQuant
from keras_qat.quantizers import Fixed, MaxAbs, MovingAverage


def built(**options):
    quantizer = MovingAverage(**options)
    quantizer.build(keras.layers.Layer())
    return quantizer


def limits(quantizer):
    return np.array([float(end) for end in quantizer.known_limits()])


def batches(low, high, count=20, seed=0):
    """Stationary data, its ends in every batch up to a few percent."""
    generator = np.random.default_rng(seed)
    return [generator.uniform(low, high, (32, 16)).astype("float32") for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("low, high", [(-1, 3), (0, 6), (-2, 0), (-0.01, 1000), (2, 5), (-5, -2)])
def test_range_is_right_from_the_first_batch_on(low, high, momentum):
    quantizer, truth = built(momentum=momentum), np.array([min(low, 0), max(high, 0)])
    for x in batches(low, high):
        quantizer.limits(x, observe=True)
        assert np.all(np.abs(limits(quantizer) - truth) <= 0.05 * np.ptp(truth))


def test_a_plain_average_from_zero_would_not_be():
    """The test above can fail: without the debiasing one batch moves the range by 5 % only."""
    quantizer = built(momentum=0.95)
    quantizer.seen.assign([[0.0, 0.0, 1000.0]])
    quantizer.limits(batches(-1, 3)[0], observe=True)
    assert np.all(np.abs(limits(quantizer)) < 0.2)


def test_moving_average_follows_its_formula():
    quantizer, expected = built(momentum=0.8), np.zeros(2)
    for t, x in enumerate(batches(-1, 1, 12) + batches(-4, 9, 12), start=1):
        quantizer.limits(x, observe=True)
        expected += max(0.2, 1 / t) * (np.array([x.min(), x.max()]) - expected)
        np.testing.assert_allclose(limits(quantizer), expected, rtol=1e-5)


def test_looking_without_observing_changes_nothing():
    quantizer = built()
    x = np.array([-3.0, 5.0], "float32")
    assert [float(end) for end in quantizer.limits(x)] == [-3, 5]  # its own range, nothing having been seen
    assert not quantizer.was_observed() and np.all(limits(quantizer) == 0)
    quantizer.limits(np.array([-1.0, 1.0], "float32"), observe=True)
    assert [float(end) for end in quantizer.limits(x)] == [-1, 1] and quantizer.was_observed()


def test_sites_share_the_union_of_their_ranges():
    quantizer = built(sites=3)
    data = [np.array(ends, "float32") for ends in ((-1, 2), (-5, 1), (0, 3))]
    for site, x in enumerate(data):
        assert not quantizer.was_observed()
        quantizer.limits(x, site, observe=True)
    assert quantizer.was_observed()
    np.testing.assert_array_equal(limits(quantizer), [-5, 3])
    for site, x in enumerate(data):
        assert [float(end) for end in quantizer.limits(x, site)] == [-5, 3]


@pytest.mark.parametrize("way", ["observe", "include"])
def test_nonnegative_sites_begin_at_zero(way):
    quantizer = built(sites=2, nonnegative=(True, False))
    take_in = {
        "observe": lambda x, site: quantizer.limits(x, site, observe=True),
        "include": lambda x, site: quantizer.include(x, site),
    }[way]
    take_in(np.array([-7.0, 2.0], "float32"), 0)  # the -7 is not looked for
    np.testing.assert_array_equal(quantizer.seen[0], [0, 2, 1])
    take_in(np.array([-3.0, 1.0], "float32"), 1)
    np.testing.assert_array_equal(limits(quantizer), [-3, 2])


def test_include_widens_and_forget_starts_over():
    quantizer = built()
    for ends in ((-1, 2), (-0.5, 3), (-2, 1)):
        quantizer.include(np.array(ends, "float32"), 0)
    np.testing.assert_array_equal(limits(quantizer), [-2, 3])
    quantizer.forget()
    assert not quantizer.was_observed() and np.all(limits(quantizer) == 0)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_ranges_are_float32_under_every_policy(policy):
    keras.config.set_dtype_policy(policy)
    try:
        quantizer = built()
    finally:
        keras.config.set_dtype_policy("float32")
    assert quantizer.seen.dtype == "float32"
    quantizer.limits(np.array([-1.0001, 3.0003], "float32"), observe=True)
    np.testing.assert_array_equal(limits(quantizer), np.array([-1.0001, 3.0003], "float32"))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_observing_in_a_graph_is_observing(jit_compile):
    eager, graph = built(), built()

    @tf.function(jit_compile=jit_compile)
    def observe(x):
        return graph.limits(x, observe=True)

    for x in batches(-1, 3, 5):
        eager.limits(x, observe=True)
        observe(x)
    np.testing.assert_allclose(limits(graph), limits(eager), rtol=1e-6)


def test_ranges_get_no_gradient():
    quantizer, x = built(), tf.Variable([-1.0, 2.0])
    with tf.GradientTape() as tape:
        low, high = quantizer.limits(x, observe=True)
        y = low + high
    assert tape.gradient(y, x) is None
    assert not quantizer.seen.trainable


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum") as error:
        MovingAverage(momentum=momentum)
    assert str(momentum) in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["limits", "include"])
def test_batches_that_are_not_finite_are_left_out(bad, how):
    """A single one would spoil the range for good, though a callback skips its step."""
    quantizer = built()
    take_in = {"limits": lambda x: quantizer.limits(x, observe=True), "include": lambda x: quantizer.include(x, 0)}[how]
    take_in(np.array([bad, 1.0], "float32"))
    assert not quantizer.was_observed()
    take_in(np.array([-2.0, 3.0], "float32"))
    take_in(np.array([5.0, bad], "float32"))
    np.testing.assert_array_equal(limits(quantizer), [-2, 3])


@pytest.mark.parametrize("low, high", [(1, 2), (-2, -1), (0, 0), (2, -2), (float("nan"), 1.0), (0.0, float("nan"))])
def test_fixed_refuses_what_is_no_range(low, high):
    with pytest.raises(ValueError, match="Received") as error:
        Fixed(low, high)
    assert str(low) in str(error.value) and str(high) in str(error.value)


@pytest.mark.parametrize("low, high", [(0.0, 255 / 256), (-1.0, 127 / 128), (0.0, 6.0), (-5.0, 0.0)])
def test_fixed_stays(low, high):
    quantizer = Fixed(low, high)
    assert quantizer.was_observed() and not quantizer.observes
    found = quantizer.limits(np.array([-99.0, 99.0], "float32"), observe=True)
    assert [float(end) for end in found] == [np.float32(low), np.float32(high)]
    assert [float(end) for end in quantizer.known_limits()] == [np.float32(low), np.float32(high)]


QUANTIZERS = {
    "fixed": lambda: Fixed(-1, 127 / 128),
    "moving_average": lambda: MovingAverage(0.9, 2, (True, False)),
    "moving_average_plain": MovingAverage,
    "max_abs": lambda: MaxAbs(4, False, (2, 3)),
}


@pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)
def test_config_round_trip(make):
    quantizer = make()
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(quantizer))
    assert type(twin) is type(quantizer) and twin.get_config() == quantizer.get_config()
    own = {key: value for key, value in vars(quantizer).items() if key in twin.get_config() or key == "spec"}
    assert {key: vars(twin)[key] for key in own} == own


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "max_abs"])
def test_save_and_load_keep_the_range(name, tmp_path):
    quantizer = QUANTIZERS[name]()
    sites = getattr(quantizer, "sites", 1)
    inputs = [keras.Input((4,)) for _ in range(sites)]
    layer = FakeQuant(quantizer, [f"site{i}" for i in range(sites)], name="range")
    model = keras.Model(inputs, [layer(x, site=i)[0] for i, x in enumerate(inputs)])
    data = [x[:, :4] for x in batches(-1, 3, sites)]
    model(data if sites > 1 else data[0], training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    twin = loaded.get_layer("range")
    assert twin.sites == layer.sites and twin.parameters() == layer.parameters()
    assert [float(end) for end in twin.quantizer.known_limits()] == [float(e) for e in quantizer.known_limits()]
    wide = [3 * x for x in data] if sites > 1 else 3 * data[0]
    for one, other in zip(keras.tree.flatten(loaded(wide)), keras.tree.flatten(model(wide)), strict=True):
        np.testing.assert_array_equal(one, other)
    loaded(wide, training=True)
    if quantizer.observes:
        assert twin.parameters() != layer.parameters()  # it goes on observing
