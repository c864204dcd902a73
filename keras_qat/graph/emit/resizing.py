"""Images made larger."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_qat.graph.emit.call import PIXEL_BY_PIXEL, Call


def resize(call: Call) -> None:
    image = call.as_image(call.inputs[0])
    batch, *size, channels = call.shape(call.output)
    size = [1] * (2 - len(size)) + size  # of a series
    result = call.image_output((batch, *size, channels))
    _one_resize(call, "BILINEAR" if interpolates(call.node) else "NEAREST_NEIGHBOR", image, size, result)
    call.from_image(result)


def _one_resize(call: Call, kind: str, image: str, size, result: str) -> None:
    call.op(f"RESIZE_{kind}", [image, call.constant("size", size, "int32")], result, halfPixelCenters=True)


_LARGEST_EXACT_FACTOR = 4


def _sizes(node) -> list[tuple[int, int]]:
    """Height and width before and after."""
    return list(zip(node.input_tensors[0].shape[1:-1], node.outputs[0].shape[1:-1], strict=True))


def interpolates(node) -> bool:
    """Whether a resize has pixels to mix: a single one is only repeated."""
    is_bilinear = getattr(node.operation, "interpolation", "nearest") == "bilinear"
    return is_bilinear and any(before not in (1, after) for before, after in _sizes(node))


def kernels_find_pixels(node) -> bool:
    """Whether RESIZE_BILINEAR's kernels mix the same pixels: LiteRT's and TFLM's round their distance to 1/1024."""
    return all(1024 * before % after == 0 for before, after in _sizes(node))


def exact_factors(node) -> tuple[int, ...] | None:
    """How many times as large a bilinear image gets, where `exact_upsampling` is worth its multiplications."""
    if not interpolates(node):
        return None
    pairs = _sizes(node)
    factors = tuple(after // before for before, after in pairs)
    is_whole = all(after == before * times for (before, after), times in zip(pairs, factors, strict=True))
    return factors if is_whole and max(factors) <= _LARGEST_EXACT_FACTOR else None


def exact_upsampling(call: Call) -> None:
    """Bilinear interpolation that rounds alike everywhere: every pixel repeated, then a weighted mean of neighbours.

    RESIZE_BILINEAR does it in one op and a quarter of the time, but its kernels round ties apart (in 6 % of the results),
    which layers behind it add up. Here all is on one scale, the accumulator counts `finest` steps of it, and a bias of 1
    lifts the ties.
    """
    image, result, factors = call.inputs[0], call.output, call.operation.factors
    batch, *size, channels = call.shape(result)
    taps = np.outer(*[_taps(times) for times in factors])
    margins = [times // 2 for times in factors]
    repeated = call.twin(result, call.shape(result), "repeated")
    _one_resize(call, "NEAREST_NEIGHBOR", image, size, repeated)
    padded = call.twin(result, (batch, *[n + 2 * m for n, m in zip(size, margins, strict=True)], channels), "padded")
    paddings = call.constant("paddings", [[0, 0], *[[m, m] for m in margins], [0, 0]], "int32")
    call.op("MIRROR_PAD", [repeated, paddings], padded, mode=schema.MirrorPadMode.SYMMETRIC)

    finest = 127 // taps.max()
    scale, step = 1.0 / (finest * taps.sum()), call.program.tensors[image].scale[0] / (finest * taps.sum())
    integers = np.repeat(finest * taps[None, :, :, None], channels, axis=-1)
    weights = call.constant("weights", integers, "int8", scale=(float(scale),) * channels, axis=3)
    bias = call.constant("bias", np.ones(channels), "int32", scale=(float(step),) * channels, axis=0)
    call.op("DEPTHWISE_CONV_2D", [padded, weights, bias], result, **PIXEL_BY_PIXEL)


def _taps(times: int) -> np.ndarray:
    """Weights with which repeated pixels become interpolated ones: a window as wide as a pixel was."""
    return np.ones(times, int) if times % 2 else np.array([1, *[2] * (times - 1), 1])
