"""A range that is known beforehand: what TFLite prescribes for softmax, or raw pixels."""

import keras
from keras import ops

from keras_qat.quantizers.quantizer import Quantizer


@keras.saving.register_keras_serializable("keras_qat")
class Fixed(Quantizer):
    """The range `low..high`, never observed and never changed.

    Args:
        low: Lowest value of the range; 0 or less.
        high: Highest value; 0 or more.
    """

    observes = False

    def __init__(self, low: float, high: float):
        if not low <= 0 <= high or low == high:
            raise ValueError(f"A range holds zero and has a width, low <= 0 <= high. Received: {low=}, {high=}")
        self.low, self.high = float(low), float(high)

    def limits(self, x=None, site=0, observe=False):
        """Returns `(low, high)`."""
        return ops.convert_to_tensor(self.low, "float32"), ops.convert_to_tensor(self.high, "float32")

    known_limits = limits

    def was_observed(self) -> bool:
        return True

    def get_config(self):
        return {"low": self.low, "high": self.high}
