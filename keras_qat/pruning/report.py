"""What pruning has done to a model, and what a device gains by it."""

import dataclasses
import math
import zlib

import keras
import numpy as np

from keras_qat.graph.walk import nodes_of
from keras_qat.layers import Quantized
from keras_qat.pruning.channel_table import attention_roles
from keras_qat.weighted import Layout, layout_of, weighted_layers
from tflite_export.table import table

_GAINS = """\
What a runtime gains: zeros inside of a kernel make no file smaller and no TFLite kernel faster by themselves. They pay
once the file is compressed: in flash or a download through zip ("zipped"), on Ethos-U through Vela, which compresses
weights. Dead channels pay everywhere, in size, speed and arena, once they are taken out of the model."""


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """A layer with a kernel.

    Args:
        layer: Its path.
        weights: Of all its kernels.
        sparsity: The share of them that is exactly zero.
        bytes, zipped_bytes: Of the kernels, in int8 for a QAT model (per-channel scales, before the kernels' snapping), in the
            weights' own type otherwise.
        macs: Multiplications for one input; None where the model's graph does not tell.
        useful_macs: Those by a weight that is not zero.
        dead_channels, channels: Output channels whose weights are all zero, of how many.
    """

    layer: str
    weights: int
    sparsity: float
    bytes: int
    zipped_bytes: int
    macs: int | None
    useful_macs: int | None
    dead_channels: int
    channels: int


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """A row per layer; prints as a table."""

    rows: list[LayerRow]

    @property
    def total(self) -> LayerRow:
        """All layers together."""
        weights = sum(row.weights for row in self.rows)
        zeros = sum(row.sparsity * row.weights for row in self.rows)
        sums = {
            name: sum(getattr(row, name) for row in self.rows)
            for name in ("bytes", "zipped_bytes", "dead_channels", "channels")
        }
        known = all(row.macs is not None for row in self.rows)
        macs = {
            name: sum(getattr(row, name) for row in self.rows) if known else None for name in ("macs", "useful_macs")
        }
        return LayerRow("total", weights, zeros / max(weights, 1), **sums, **macs)

    def __str__(self) -> str:
        heading = ("layer", "weights", "sparsity", "bytes", "zipped", "MACs", "useful MACs", "dead channels")
        body = [
            (
                row.layer,
                row.weights,
                f"{row.sparsity:.1%}",
                row.bytes,
                row.zipped_bytes,
                *("unknown" if macs is None else macs for macs in (row.macs, row.useful_macs)),
                f"{row.dead_channels} of {row.channels}",
            )
            for row in [*self.rows, self.total]
        ]
        return f"{table(heading, body)}\n\n{_GAINS}"

    def to_dict(self) -> dict:
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "total": dataclasses.asdict(self.total)}


def report(model: keras.Model) -> PruningReport:
    """Sparsity, zipped size and MACs of every layer with a kernel, of any built model.

    Example:
        `print(kq.pruning.report(model))`
    """
    positions = _positions(model)
    rows = []
    for item in weighted_layers(model):
        kernels = [v for v in item.variables if len(v.shape) >= 2 and "bias" not in v.name]
        if kernels and not item.is_range:
            wrapper = item.around[-1] if item.around and isinstance(item.around[-1], Quantized) else None
            rows.append(_row(item, kernels, wrapper, positions.get(id(item.layer))))
    return PruningReport(rows)


def _row(item, kernels, wrapper, positions) -> LayerRow:
    values = [np.asarray(kernel, np.float32) for kernel in kernels]
    weights = sum(value.size for value in values)
    alive = sum(int(np.count_nonzero(value)) for value in values)
    stored = [_integers(wrapper, value) for value in values] if wrapper else [np.asarray(kernel) for kernel in kernels]
    alive_channels = [
        _alive_channels(value, layout_of(item.layer, v)) for value, v in zip(values, kernels, strict=True)
    ]
    return LayerRow(
        layer=item.path,
        weights=weights,
        sparsity=1.0 - alive / weights,
        bytes=sum(array.nbytes for array in stored),
        zipped_bytes=sum(len(zlib.compress(array.tobytes(), 9)) for array in stored),
        macs=None if positions is None else positions * weights,
        useful_macs=None if positions is None else positions * alive,
        dead_channels=sum(int(np.sum(~channels)) for channels in alive_channels),
        channels=sum(channels.size for channels in alive_channels),
    )


def _integers(wrapper, kernel) -> np.ndarray:
    """The kernel's integers, nearly as the file has them: kernels may ask for a scale some percent larger."""
    quantizer = wrapper.weight_quantizer
    scale = wrapper._per_kernel(quantizer.channel_scale(kernel))
    return np.asarray(quantizer.integers(kernel, scale)).astype(np.int8)


def _alive_channels(kernel, layout: Layout) -> np.ndarray:
    channels = {axis % kernel.ndim for axis in layout.channels}
    return np.any(kernel != 0, axis=tuple(axis for axis in range(kernel.ndim) if axis not in channels))


def _positions(model) -> dict[int, int]:
    """Layer id → how often each of its weights is multiplied for one input, over all of its calls."""
    found: dict[int, int] = {}
    for graph in model._flatten_layers():
        if not isinstance(graph, keras.Model):
            continue
        graph = graph._functional if isinstance(graph, keras.Sequential) else graph
        for node in nodes_of(graph) if hasattr(graph, "_nodes_by_depth") else ():
            layer = getattr(node.operation, "layer", node.operation)
            for inner, count in _positions_in(layer, node):
                if count is not None:
                    found[id(inner)] = found.get(id(inner), 0) + count
    return found


def _positions_in(layer, node) -> list[tuple]:
    """A layer with how often each of its weights is multiplied in a call; for attention, the layers inside of it."""
    if not isinstance(layer, keras.layers.MultiHeadAttention):
        return [(layer, _positions_of_call(layer, node.input_tensors[0].shape, node.outputs[0].shape))]
    tensors = attention_roles(node)
    shapes = {role: tensor.shape[1:-1] for role, tensor in {**tensors, "output": tensors["query"]}.items()}
    return [
        (getattr(layer, f"{role}_dense"), None if None in shape else math.prod(shape)) for role, shape in shapes.items()
    ]


def _positions_of_call(layer, input_shape, output_shape) -> int | None:
    if isinstance(layer, keras.layers.EinsumDense):
        operands, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        sizes = {**dict(zip(output, output_shape, strict=False)), **dict(zip(inputs, input_shape, strict=False))}
        shape = [size for letter, size in list(sizes.items())[1:] if letter not in kernel]
        return None if "." in layer.equation or None in shape else math.prod(shape)
    if isinstance(layer, keras.layers.Embedding):
        return 0
    if isinstance(layer, keras.layers.Dense):
        shape = output_shape[1:-1]
    elif isinstance(layer, keras.layers.PReLU):
        shape = [size for size, weights in zip(output_shape[1:], layer.alpha.shape, strict=True) if weights != size]
    elif "Conv" in type(layer).__name__ and hasattr(layer, "data_format"):
        # A transposed convolution spreads each input out, the others gather each output.
        shape = input_shape if "Transpose" in type(layer).__name__ else output_shape
        shape = shape[1:-1] if layer.data_format == "channels_last" else shape[2:]
    else:
        return None
    return None if None in shape else math.prod(shape)
