"""What all quantizers are."""


class Quantizer:
    """Finds the range of a tensor. What it remembers are weights of the layer it works for.

    It is no layer itself: a deep network has hundreds, and Keras takes half a millisecond to make a layer.
    """

    def build(self, layer) -> None:
        """Gives `layer` the weights in which this quantizer remembers things."""

    def get_config(self) -> dict:
        return {}

    @classmethod
    def from_config(cls, config: dict) -> "Quantizer":
        return cls(**config)
