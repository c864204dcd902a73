"""Activations: the range of the batches seen so far, recent ones counting more."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_qat")
class MovingAverage(keras.layers.Layer):
    """A debiased moving average of each batch's smallest and largest value.

    Formula: `range ← range + rate · (batch - range)` with `rate = max(1 - momentum, 1 / t)` at batch t. The first
    batches are averaged evenly, so the range is right from the first one on.

    Tensors that must share one grid (the inputs of a concatenation) share one quantizer: each of its `sites` keeps an
    average of its own, and the range is the union of them all.

    Args:
        momentum: Of the average, once `1 / (1 - momentum)` batches have been seen.
        sites: How many tensors share the range.
        nonnegative: For each site whether its values are known to be ≥ 0 (behind a relu), so that the search for the
            smallest one is saved.
    """

    observes = True

    def __init__(self, momentum: float = 0.95, sites: int = 1, nonnegative: tuple[bool, ...] = (), **kwargs):
        super().__init__(**kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is at least 0 and below 1. Received: {momentum=}")
        self.momentum, self.sites = momentum, sites
        self.nonnegative = tuple(nonnegative) or (False,) * sites

    def build(self, input_shape=None):
        self.ranges = [self._state(f"range_{site}", (2,)) for site in range(self.sites)]
        self.batches = [self._state(f"batches_{site}", ()) for site in range(self.sites)]

    def _state(self, name, shape):
        # float32 under every dtype policy: a range in half precision would move the grid.
        return self.add_weight(
            name=name, shape=shape, initializer="zeros", trainable=False, dtype="float32", autocast=False
        )

    def limits(self, x, site=0, observe=False):
        """Returns `(low, high)`, having taken in `x` first if it is to `observe`."""
        if observe:
            self._take_in(self._range_of(x, site), site)
            return self.known_limits()
        # Before anything was observed a batch is quantized by its own range, so that a fresh model predicts something.
        return ops.unstack(
            ops.cond(
                self.batches[site] > 0,
                lambda: ops.stack(self.known_limits()),
                lambda: ops.stack(ops.unstack(self._range_of(x, site))),
            )
        )

    def include(self, x, site: int) -> None:
        """Widens the range of a site so that it holds all of `x` (calibration by minimum and maximum)."""
        batch = self._range_of(x, site)
        low = ops.minimum(self.ranges[site][0], batch[0])
        high = ops.maximum(self.ranges[site][1], batch[1])
        self.ranges[site].assign(ops.stack([low, high]))
        self.batches[site].assign_add(1.0)

    def forget(self) -> None:
        """Goes back to the state before the first batch."""
        for variable in (*self.ranges, *self.batches):
            variable.assign(ops.zeros_like(variable))

    def was_observed(self) -> bool:
        return all(ops.convert_to_numpy(count) > 0 for count in self.batches)

    def _range_of(self, x, site):
        low = ops.zeros(()) if self.nonnegative[site] else ops.min(x)
        return ops.stop_gradient(ops.stack([ops.minimum(low, 0.0), ops.maximum(ops.max(x), 0.0)]))

    def _take_in(self, batch, site):
        count = self.batches[site] + 1.0
        rate = ops.maximum(1.0 - self.momentum, 1.0 / count)
        self.batches[site].assign(count)
        self.ranges[site].assign_add((batch - self.ranges[site]) * rate)

    def known_limits(self):
        """The range as observed so far: the union over the sites."""
        if self.sites == 1:
            return ops.unstack(self.ranges[0].value)
        lows, highs = ops.unstack(ops.stack([variable.value for variable in self.ranges]), axis=1)
        return ops.min(lows), ops.max(highs)

    def get_config(self):
        config = {"momentum": self.momentum, "sites": self.sites, "nonnegative": self.nonnegative}
        return {**super().get_config(), **config}
