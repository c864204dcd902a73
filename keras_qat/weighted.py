"""The layers of a model that hold weights, each under the path that rules name it by, and how its kernels lie."""

import dataclasses
import warnings
from collections.abc import Sequence

import keras

from keras_qat.layers import FakeQuant, Quantized, is_qat
from keras_qat.spec import Rule, matches_path

RANGES = "ranges"


@dataclasses.dataclass(frozen=True)
class WeightedLayer:
    """A layer with variables of its own that training can change.

    Args:
        path: Names of the layers around it and its own, with slashes. Trained ranges of quantizers stand under
            "ranges/".
        layer: The layer; in a QAT model the one inside of `Quantized`.
        around: The layers it is part of, outermost first.
        variables: Its own, without those of layers inside of it; also where they are frozen.
    """

    path: str
    layer: keras.Layer
    around: tuple[keras.Layer, ...]
    variables: tuple[keras.Variable, ...]

    @property
    def trained(self) -> tuple[keras.Variable, ...]:
        """Those of the variables that are not frozen."""
        return tuple(variable for variable in self.variables if self.layer.trainable and variable.trainable)

    @property
    def is_range(self) -> bool:
        return isinstance(self.layer, (FakeQuant, Quantized))


def weighted_layers(model: keras.Model) -> list[WeightedLayer]:
    """Every layer of a built model that holds such variables, once, under the first path that leads to it."""
    found, seen, dotted = [], set(), is_qat(model)

    def visit(layer, path, around):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if layer._trainable_variables:
            own = f"{RANGES}/{path}" if isinstance(layer, (FakeQuant, Quantized)) else path
            found.append(WeightedLayer(own, layer, around, tuple(layer._trainable_variables)))
        for child in layer._flatten_layers(include_self=False, recursive=False):
            visit(child, _path_of(child, layer, path if around else "", dotted), (*around, layer))

    visit(model, model.name, ())
    return found


def _path_of(child, parent, path, dotted) -> str:
    if isinstance(parent, Quantized) and child is parent.layer:
        return path
    name = child.name.replace(".", "/") if dotted else child.name
    return f"{path}/{name}" if path and not isinstance(parent, Quantized) else name


def first_matches(rules: Sequence[Rule], layers: Sequence[WeightedLayer], matches=None) -> list[Rule | None]:
    """For each layer the first rule that matches it, or None.

    A pattern is a class of layers, or shell-style on the path; one that matches a block matches everything in it.

    Args:
        rules: `kq.Rule(pattern, what this callback is to do there, or None)`.
        layers: What the rules choose from.
        matches: `(pattern, layer) -> bool`; `matches_layer` unless given.

    Raises:
        ValueError: if a rule matches no layer at all.
    """
    matches = matches or matches_layer
    hits = [[layer for layer in layers if matches(rule.pattern, layer)] for rule in rules]
    nowhere = [rule.pattern for rule, hit in zip(rules, hits, strict=True) if not hit]
    if nowhere:
        paths = [layer.path for layer in layers]
        shown = ", ".join(paths[:20]) + (" ..." if len(paths) > 20 else "")
        raise ValueError(f"These rules match no layer: {nowhere}. The layers with weights are: {shown}")
    chosen = [next((rule for rule in rules if matches(rule.pattern, layer)), None) for layer in layers]
    hidden = [rule.pattern for rule in rules if not any(rule is each for each in chosen)]
    if hidden:
        warnings.warn(f"These rules come too late, earlier ones match all of their layers: {hidden}", stacklevel=2)
    return chosen


def matches_layer(pattern: str | type, item: WeightedLayer) -> bool:
    if isinstance(pattern, type):
        return isinstance(item.layer, pattern) or any(isinstance(layer, pattern) for layer in item.around[1:])
    return matches_path(pattern, item.path)


def checked_rules(rules) -> list[Rule]:
    """The rules as a list; whatever is not a rule is refused."""
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    for rule in rules:
        if not isinstance(rule, Rule) or not isinstance(rule.pattern, (str, type)):
            raise ValueError(
                f"rules is a list of kq.Rule(pattern, ...), the pattern a string or a class of layers. Received: {rule!r}"
            )
    return rules


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kernel lies in memory, seen from its layer.

    Args:
        inner: The axis that the TFLite kernel reads along: its innermost one.
        channels: The axes that together number the output channels.
    """

    inner: int
    channels: tuple[int, ...]


_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)


def is_depthwise(layer, variable) -> bool:
    return isinstance(layer, _DEPTHWISE) or variable.name == "depthwise_kernel"


def layout_of(layer: keras.Layer, variable: keras.Variable) -> Layout:
    """The layout of a layer's variable, by Keras's conventions: HWIO, (in, out); TFLite has OHWI, (out, in)."""
    rank = len(variable.shape)
    if rank < 2:
        return Layout(-1, (-1,))
    if is_depthwise(layer, variable):
        return Layout(-2, (-2, -1))
    if isinstance(layer, _TRANSPOSED):
        return Layout(-1, (-2,))
    if isinstance(layer, keras.layers.Embedding):
        return Layout(-1, (-1,))
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_layout(layer.equation)
    return Layout(-2, (-1,))


def _einsum_layout(equation: str) -> Layout:
    """`abc,cde->abde`: the kernel's letters that the output has are channels; the last other one is summed along."""
    operands, output = equation.replace(" ", "").split("->")
    letters = operands.split(",")[1].replace(".", "")
    channels = [axis for axis, letter in enumerate(letters) if letter in output]
    summed = [axis for axis, letter in enumerate(letters) if letter not in output]
    return Layout(summed[-1] if summed else -1, tuple(channels))
