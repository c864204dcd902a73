"""Activations: the range of the batches seen so far, recent ones counting more."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_qat")
class MovingAverage(keras.layers.Layer):
    """A debiased moving average of each batch's smallest and largest value.

    Formula: `range ← range + rate · (batch - range)` with `rate = max(1 - momentum, 1 / t)` at batch t. The first
    batches are averaged evenly, so the range is right from the first one on.

    Tensors that must share one grid (the inputs of a concatenation) share one quantizer: each of its `sites` keeps an
    average of its own, and the range is the union of them all. A batch with a NaN or an infinite value is left out.

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
        # Lowest value, highest value, number of batches. In one variable, because a large model has hundreds of sites;
        # float32 under every dtype policy, because a range in half precision would move the grid.
        options = {"initializer": "zeros", "trainable": False, "dtype": "float32", "autocast": False}
        self.seen = [self.add_weight(name=f"seen_{site}", shape=(3,), **options) for site in range(self.sites)]

    def limits(self, x, site=0, observe=False):
        """Returns `(low, high)`, having taken in `x` first if it is to `observe`."""
        if observe:
            self._take_in(self._range_of(x, site), site)
            return self.known_limits()
        # Before anything was observed a batch is quantized by its own range, so that a fresh model predicts something.
        return ops.unstack(
            ops.cond(
                self.seen[site][2] > 0,
                lambda: ops.stack(self.known_limits()),
                lambda: ops.stack(ops.unstack(self._range_of(x, site))),
            )
        )

    def include(self, x, site: int) -> None:
        """Widens the range of a site so that it holds all of `x` (calibration by minimum and maximum)."""
        batch, (low, high, count) = self._range_of(x, site), ops.unstack(self.seen[site].value)
        wider = ops.stack([ops.minimum(low, batch[0]), ops.maximum(high, batch[1]), count + 1.0])
        self.seen[site].assign(ops.where(_is_finite(batch), wider, self.seen[site].value))

    def forget(self) -> None:
        """Goes back to the state before the first batch."""
        for variable in self.seen:
            variable.assign(ops.zeros_like(variable))

    def was_observed(self) -> bool:
        return all(ops.convert_to_numpy(variable)[2] > 0 for variable in self.seen)

    def _range_of(self, x, site):
        low = ops.zeros(()) if self.nonnegative[site] else ops.min(x)
        return ops.stop_gradient(ops.stack([ops.minimum(low, 0.0), ops.maximum(ops.max(x), 0.0)]))

    def _take_in(self, batch, site):
        low, high, count = ops.unstack(self.seen[site].value)
        rate = ops.maximum(1.0 - self.momentum, 1.0 / (count + 1.0))
        step = ops.stack([(batch[0] - low) * rate, (batch[1] - high) * rate, 1.0])
        self.seen[site].assign_add(ops.where(_is_finite(batch), step, 0.0))

    def known_limits(self):
        """The range as observed so far: the union over the sites."""
        if self.sites == 1:
            return ops.unstack(self.seen[0].value)[:2]
        lows, highs, _ = ops.unstack(ops.stack([variable.value for variable in self.seen]), axis=1)
        return ops.min(lows), ops.max(highs)

    def get_config(self):
        config = {"momentum": self.momentum, "sites": self.sites, "nonnegative": self.nonnegative}
        return {**super().get_config(), **config}


def _is_finite(batch):
    return ops.all(ops.isfinite(batch))
