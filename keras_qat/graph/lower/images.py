"""Image operations."""

from keras import ops

from keras_qat.graph.lower.weights import dense_of

_GRAY = [[0.2989], [0.5870], [0.1140]]


def _resizing(layer, args, kwargs):
    if layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio or layer.antialias:
        return None
    if layer.data_format != "channels_last" or len(args[0].shape) != 4:
        return None
    return lambda x: ops.image.resize(x, (layer.height, layer.width), interpolation=layer.interpolation)


def _center_crop(layer, args, kwargs):
    height, width = args[0].shape[-3:-1]
    if layer.data_format != "channels_last" or height < layer.height or width < layer.width:
        return None
    top, left = (height - layer.height) // 2, (width - layer.width) // 2
    return lambda x: x[..., top : top + layer.height, left : left + layer.width, :]


def _gray(operation, args, kwargs):
    return dense_of(_GRAY, name=operation.name) if operation.data_format == "channels_last" else None


RULES = {"CenterCrop": _center_crop, "Resizing": _resizing, "ops.RGBToGrayscale": _gray}
