"""How the range of a tensor is found, one idea per file."""

from keras_qat.quantizers.fixed import Fixed
from keras_qat.quantizers.max_abs import MaxAbs
from keras_qat.quantizers.moving_average import MovingAverage
from keras_qat.quantizers.quantizer import Quantizer

__all__ = ["Fixed", "MaxAbs", "MovingAverage", "Quantizer"]
