"""Image operations."""

import itertools
import math

from keras import ops

from keras_qat.graph.lower.weights import dense_of

_GRAY = [[0.2989], [0.5870], [0.1140]]


def _resizing(layer, args, kwargs):
    if layer.data_format != "channels_last" or len(args[0].shape) != 4:
        return None
    names = "interpolation", "antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio", "fill_mode", "fill_value"
    options = {name: getattr(layer, name) for name in names}
    return lambda x: ops.image.resize(x, (layer.height, layer.width), **options)


def _center_crop(layer, args, kwargs):
    height, width = args[0].shape[-3:-1]
    if layer.data_format != "channels_last" or height < layer.height or width < layer.width:
        return None
    top, left = (height - layer.height) // 2, (width - layer.width) // 2
    return lambda x: x[..., top : top + layer.height, left : left + layer.width, :]


def _gray(operation, args, kwargs):
    return dense_of(_GRAY, name=operation.name) if operation.data_format == "channels_last" else None


def _patches(operation, args, kwargs):
    """Patches side by side are a reshape; those that overlap are cut out pixel by pixel."""
    if operation.data_format != "channels_last" or len(args[0].shape) != 4:
        return None
    size, rates = _pair(operation.size), _pair(operation.dilation_rate)
    strides = size if operation.strides is None else _pair(operation.strides)
    reach = [(count - 1) * rate + 1 for count, rate in zip(size, rates, strict=True)]
    sides = args[0].shape[1:3]
    missing = [0, 0]
    if operation.padding == "same":
        missing = [
            max(-(-n // step) * step - step + span - n, 0) for n, step, span in zip(sides, strides, reach, strict=True)
        ]
    counts = [(n + more - span) // step + 1 for n, more, step, span in zip(sides, missing, strides, reach, strict=True)]

    def patches(x):
        if any(missing):
            x = ops.pad(x, [(0, 0), *[(more // 2, more - more // 2) for more in missing], (0, 0)])
        if strides == size and rates == (1, 1):
            (rows, columns), (height, width), channels = counts, size, x.shape[-1]
            if x.shape[1:3] != (rows * height, columns * width):
                x = x[:, : rows * height, : columns * width]
            x = ops.transpose(ops.reshape(x, (-1, rows, height, columns, width, channels)), (0, 1, 3, 2, 4, 5))
            return ops.reshape(x, (-1, rows, columns, height * width * channels))
        pixels = itertools.product(*[range(0, span, rate) for span, rate in zip(reach, rates, strict=True)])
        windows = [
            [
                slice(begin, begin + (count - 1) * step + 1, step)
                for begin, count, step in zip(pixel, counts, strides, strict=True)
            ]
            for pixel in pixels
        ]
        return ops.concatenate([x[:, rows, columns] for rows, columns in windows], axis=-1)

    return patches


def _unfold(operation, args, kwargs):
    """Windows of an image whose channels come first, as columns."""
    size, dilation, padding, stride = map(
        _pair, (operation.kernel_size, operation.dilation, operation.padding, operation.stride)
    )
    channels, *sides = args[0].shape[1:]
    counts = [
        (side + 2 * pad - rate * (reach - 1) - 1) // step + 1
        for side, pad, rate, reach, step in zip(sides, padding, dilation, size, stride, strict=True)
    ]

    def unfold(x):
        x = ops.pad(x, [(0, 0), (0, 0), *[(pad, pad) for pad in padding]]) if any(padding) else x
        pixels = []
        for place in itertools.product(*map(range, size)):
            begins = [one * rate for one, rate in zip(place, dilation, strict=True)]
            rows, columns = (
                slice(begin, begin + (count - 1) * step + 1, step)
                for begin, count, step in zip(begins, counts, stride, strict=True)
            )
            pixels.append(ops.reshape(x[:, :, rows, columns], (-1, channels, 1, math.prod(counts))))
        return ops.reshape(ops.concatenate(pixels, axis=2), (-1, channels * len(pixels), math.prod(counts)))

    return unfold


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _margins(operation, what: str, sides, sign: int) -> list[tuple[int, int]]:
    """What is cut off, or added, in front and behind, where Keras is told two of front, back and target size."""
    margins = []
    for size, front, back, target in zip(sides, ("top", "left"), ("bottom", "right"), ("height", "width"), strict=True):
        before, after = (getattr(operation, f"{side}_{what}") for side in (front, back))
        rest = sign * (getattr(operation, f"target_{target}") or size) - sign * size
        margins.append((rest - after if before is None else before, rest - before if after is None else after))
    return margins


def _cropped(operation, args, kwargs):
    if operation.data_format != "channels_last":
        return None
    sides = args[0].shape[-3:-1]
    cuts = [slice(a, n - b) for n, (a, b) in zip(sides, _margins(operation, "cropping", sides, -1), strict=True)]
    return lambda x: x[(..., *cuts, slice(None))]


def _padded(operation, args, kwargs):
    if operation.data_format != "channels_last":
        return None
    margins = _margins(operation, "padding", args[0].shape[-3:-1], 1)
    return lambda x: ops.pad(x, [*[(0, 0)] * (len(x.shape) - 3), *margins, (0, 0)])


RULES = {
    "CenterCrop": _center_crop,
    "Resizing": _resizing,
    "ops.CropImages": _cropped,
    "ops.ExtractPatches": _patches,
    "ops.PadImages": _padded,
    "ops.RGBToGrayscale": _gray,
    "ops.Unfold": _unfold,
}
