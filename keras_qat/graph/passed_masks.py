"""The masks that Keras hands on from layer to layer beside the tensors: `Embedding(mask_zero=True)` makes one, attention reads it.

They are attributes of tensors at run time, and in no graph. While a model is traced the same is done with the traced tensors.
"""

import inspect
from collections.abc import Callable

import keras
from keras import tree

from keras_qat.graph.walk import key_of

# Keras layers that use a mask, or that refuse one themselves.
_USES_IT = {
    *("Attention", "AdditiveAttention", "GroupedQueryAttention", "MultiHeadAttention", "Softmax"),
    *("Bidirectional", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "GRU", "LSTM", "RNN", "SimpleRNN"),
    "GlobalAveragePooling1D",
}
MASKING_IS_REFUSED = (
    "Which steps it leaves out depends on the data.",
    "Mask by whole numbers: Embedding(mask_zero=True), or mask=(ids != 0) for the layers behind, of an input of type int32 or "
    "bool.",
)
_IGNORES_IT = "BatchNormalization"  # but for its statistics in training


class PassedMasks:
    """Which tensor has a mask, and how it is made: most are never asked for.

    Args:
        run: `(compute, layer, tensors, mask) -> mask`: opens what a layer computes.
    """

    def __init__(self, run: Callable):
        self._run = run
        self._of: dict[int, tuple] = {}  # tensor id → the tensor, and a function that makes its mask

    def given_to(self, layer, args, kwargs) -> dict:
        """The keyword arguments of a layer's call, with the masks of its tensors."""
        if isinstance(layer, keras.Layer) and key_of(layer) == _IGNORES_IT:
            return {name: value for name, value in kwargs.items() if name != "mask"}
        if not self._of or not isinstance(layer, keras.Layer):
            return kwargs
        parameters = inspect.signature(layer.call).parameters
        given = {**dict(zip(parameters, args)), **kwargs}
        tensors = {name: value for name, value in given.items() if _symbolic(value) and not name.endswith("mask")}
        names = {"mask": next(iter(tensors.values()))} if len(tensors) == 1 else {}
        names |= {f"{name}_mask": value for name, value in tensors.items() if len(tensors) > 1}
        missing = {name: value for name, value in names.items() if name in parameters and given.get(name) is None}
        masks = {name: tree.map_structure(self._mask_of, value) for name, value in missing.items()}
        return {**kwargs, **{name: mask for name, mask in masks.items() if _symbolic(mask)}}

    def note(self, layer, args, outputs) -> None:
        """What a layer returned has a mask if it makes one, or hands on that of its first argument."""
        if not isinstance(layer, keras.Layer) or not layer.supports_masking or not _symbolic(args):
            return
        first, compute = args[0], layer.compute_mask
        makes_it = type(layer).compute_mask is not keras.Layer.compute_mask
        if not makes_it and not any(id(x) in self._of for x in _symbolic(first)):
            return
        if makes_it and getattr(layer, "mask_zero", True) is False:
            return

        def mask():
            before = tree.map_structure(self._mask_of, first)
            if makes_it:
                return self._run(compute, layer, first, before)
            return next((x for x in tree.flatten(before) if x is not None), None)

        for x in _symbolic(outputs):
            self._of.setdefault(id(x), (x, mask))

    def _mask_of(self, x):
        return self._of[id(x)][1]() if id(x) in self._of else None


def problem_with(layer, kwargs) -> tuple[str, str] | None:
    """Why a Keras layer cannot have the mask that it is given, and the way out; None if it can."""
    key = key_of(layer) if isinstance(layer, keras.Layer) else None
    if key == "Masking":
        return MASKING_IS_REFUSED
    if key is None or key in _USES_IT or not _symbolic(kwargs.get("mask")):
        return None
    return (
        "It leaves out what a mask hides, which depends on the data.",
        "Take the mask off (mask_zero=False, no Masking), or multiply by a mask of 0 and 1 that is an input of its own.",
    )


def _symbolic(structure) -> list:
    return [x for x in tree.flatten(structure) if isinstance(x, keras.KerasTensor)]
