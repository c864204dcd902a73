"""Activations: the range of the batches seen so far, recent ones counting more."""

import keras
import numpy as np

from keras_qat.arrays import ops, read_as
from keras_qat.quantizers.quantizer import Quantizer
from keras_qat.replicas import agreed
from keras_qat.traced_once import traced_once


@keras.saving.register_keras_serializable("keras_qat")
class MovingAverage(Quantizer):
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

    def __init__(self, momentum: float = 0.95, sites: int = 1, nonnegative: tuple[bool, ...] = ()):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is at least 0 and below 1. Received: {momentum=}")
        self.momentum, self.sites = momentum, sites
        self.nonnegative = tuple(nonnegative) or (False,) * sites

    def build(self, layer):
        # A row for each site: lowest value, highest value, number of batches. In one variable, because a large model has
        # hundreds of sites; float32 under every dtype policy, because a range in half precision would move the grid.
        options = {"initializer": "zeros", "trainable": False, "dtype": "float32", "autocast": False}
        self.seen = layer.add_weight(name="seen", shape=(self.sites, 3), **options)

    def limits(self, x, site=0, observe=False):
        """Returns `(low, high)`, having taken in `x` first if it is to `observe`."""
        x = ops.stop_gradient(x)
        if observe:
            row, nonnegative = self._row_of(site), self.nonnegative[site]
            seen, low, high = _moved(self.seen.value, x, row, nonnegative, self.momentum)
            everyones = agreed(seen)
            self.seen.assign(everyones)
            return (low, high) if everyones is seen else _union(everyones)
        # Before anything was observed a batch is quantized by its own range, so that a fresh model predicts something.
        return _known_or_own(self.seen.value, x, self._row_of(site), self.nonnegative[site])

    def include(self, x, site: int) -> None:
        """Widens the range of a site so that it holds all of `x` (calibration by minimum and maximum)."""
        low, high = _ends_of(x, self.nonnegative[site])
        row, seen = self._row_of(site), self.seen.value
        old_low, old_high, _ = ops.unstack(ops.sum(row * seen, axis=0))
        wider = ops.stack([ops.minimum(low - old_low, 0.0), ops.maximum(high - old_high, 0.0), 1.0])
        self.seen.assign(seen + ops.where(_are_finite(low, high), row * wider, 0.0))

    def forget(self) -> None:
        """Goes back to the state before the first batch."""
        self.seen.assign(ops.zeros_like(self.seen))

    def was_observed(self) -> bool:
        return bool((ops.convert_to_numpy(self.seen)[:, 2] > 0).all())

    def known_limits(self, like=None):
        """The range as observed so far: the union over the sites. Arrays where `like` is one of numpy's."""
        return _union(read_as(like, self.seen.value))

    def _row_of(self, site):
        """1 in the row of this site, 0 in the others."""
        return ops.convert_to_tensor(np.eye(self.sites, dtype="float32")[:, site : site + 1])

    def get_config(self):
        return {"momentum": self.momentum, "sites": self.sites, "nonnegative": self.nonnegative}


def _ends_of(x, nonnegative):
    """The smallest and the largest value, zero among them."""
    return ops.zeros(()) if nonnegative else ops.minimum(ops.min(x), 0.0), ops.maximum(ops.max(x), 0.0)


def _are_finite(low, high):
    return ops.logical_and(ops.isfinite(low), ops.isfinite(high))


@traced_once
def _moved(seen, x, row, nonnegative, momentum):
    """`seen` after one more batch at the site of this row, and the range that this makes."""
    batch_low, batch_high = _ends_of(x, nonnegative)
    low, high, count = ops.unstack(ops.sum(row * seen, axis=0))
    rate = ops.maximum(1.0 - momentum, 1.0 / (count + 1.0))
    step = ops.stack([(batch_low - low) * rate, (batch_high - high) * rate, 1.0])
    seen = seen + ops.where(_are_finite(batch_low, batch_high), row * step, 0.0)
    return seen, *_union(seen)


@traced_once
def _union(seen):
    """The range of all sites. Of tensors that are zero everywhere it is 0..1: with steps of next to nothing the ratio of
    their scale to others would overflow in the kernels."""
    low, high = ops.min(seen[:, 0]), ops.max(seen[:, 1])
    is_zero = ops.logical_and(low == high, ops.max(seen[:, 2]) > 0)
    return low, ops.where(is_zero, 1.0, high)


@traced_once
def _known_or_own(seen, x, row, nonnegative):
    was_observed = ops.sum(row * seen, axis=0)[2] > 0
    return ops.cond(was_observed, lambda: _union(seen), lambda: _ends_of(x, nonnegative))
