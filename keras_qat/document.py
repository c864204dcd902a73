"""Writes OPERATIONS.md: every Keras layer and function that has an integer form, and what becomes of it.

    python -m keras_qat.document

Nothing in it is written by hand. A small model of each is explained, quantized and frozen, and its row says what came
out; the notes are the docstrings of the code that handles it. `_ARGUMENTS` and `_CALLS` tell how to call what cannot be
called with tensors alone.
"""

import collections
import dataclasses
import inspect
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
from keras import layers, ops

import keras_qat as kq
import tflite_export
from keras_qat.graph.lower import RULES, lowering_of
from keras_qat.graph.walk import is_index, key_of
from keras_qat.layers import FakeQuant
from keras_qat.operations import row_of
from tflite_export.ops import BUILTINS

PATH = pathlib.Path(__file__).with_name("OPERATIONS.md")
COMMAND = "python -m keras_qat.document"

# Values of required arguments by their names; a function makes a fresh one.
_ARGUMENTS = {
    "activation": "relu",
    "axes": -1,
    "axis": -1,
    "axis1": 1,
    "axis2": 2,
    "block_size": 2,
    "cell": lambda: layers.GRUCell(4),
    "destination": 2,
    "default_value": 0.0,
    "dims": (2, 1),
    "dtype": "float32",
    "equation": "abc,cd->abd",
    "factor": 0.2,
    "filters": 4,
    "function": lambda: lambda x: ops.multiply(x, ops.sigmoid(x)),
    "head_dim": 2,
    "height": 2,
    "height_factor": 0.2,
    "kernel": np.full((2, 4, 4), 0.5, "float32"),
    "kernel_size": 2,
    "key": (slice(None), slice(1, None)),
    "key_dim": 2,
    "layer": lambda: layers.GRU(4, return_sequences=True),
    "n": 3,
    "newshape": (-1, 8),
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_query_heads": 2,
    "output_shape": (None, 4),
    "output_size": 2,
    "pad_width": ((0, 0), (1, 1), (0, 0)),
    "pool_size": 2,
    "rate": 0.5,
    "scale": 0.5,
    "size": (8, 8),
    "source": 1,
    "stddev": 0.1,
    "target_shape": (-1,),
    "threshold": 0.5,
    "units": 4,
    "width": 2,
    "width_factor": 0.2,
    "x_max": 0.5,
    "x_min": -0.5,
}


def _on(shape, call: Callable, dtype: str = "float32") -> keras.Model:
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, call(x))


# Calls of what needs more than that, or is refused with its defaults: functions of tensors, or of nothing that make a
# model.
_CALLS: dict[str, Callable] = {
    "CategoryEncoding": lambda: _on((4,), layers.CategoryEncoding(10), "int32"),
    "CenterCrop": lambda: _on((4, 4, 3), layers.CenterCrop(2, 2)),
    "ConvLSTM3D": lambda: _on((4, 4, 4, 4, 2), layers.ConvLSTM3D(2, 2)),
    "Embedding": lambda: _on((4,), layers.Embedding(10, 4), "int32"),
    "GroupNormalization": lambda x: layers.GroupNormalization(2)(x),
    "RandomColorDegeneration": lambda: _on((4, 4, 3), layers.RandomColorDegeneration(0.2)),
    "RandomPosterization": lambda: _on((4, 4, 3), layers.RandomPosterization(4)),
    "Resizing": lambda: _on((4, 4, 3), layers.Resizing(2, 2)),
    "ReversibleEmbedding": lambda: _on((4,), layers.ReversibleEmbedding(10, 4), "int32"),
    "SpectralNormalization": lambda x: layers.SpectralNormalization(layers.Dense(4))(x),
    "TimeDistributed": lambda x: layers.TimeDistributed(layers.Dense(4))(x),
    "ops.amax": lambda x: ops.amax(x, axis=-1),
    "ops.amin": lambda x: ops.amin(x, axis=-1),
    "ops.append (x, y)": lambda x, y: ops.append(x, y, axis=-1),
    "ops.argmax": lambda x: ops.argmax(x, axis=-1),
    "ops.argmin": lambda x: ops.argmin(x, axis=-1),
    "ops.average": lambda x: ops.average(x, axis=-1),
    "ops.batch_normalization": lambda x: ops.batch_normalization(x, np.zeros(4), np.ones(4), axis=-1),
    "ops.broadcast_to": lambda: _on((1, 4), lambda x: ops.broadcast_to(x, (None, 4, 4))),
    "ops.concatenate": lambda x, y: ops.concatenate([x, y], axis=-1),
    "ops.count_nonzero": lambda x: ops.count_nonzero(x, axis=-1),
    "ops.cumsum": lambda x: ops.cumsum(x, axis=1),
    "ops.depthwise_conv": lambda x: ops.depthwise_conv(x, np.full((2, 4, 1), 0.5, "float32")),
    "ops.diagonal": lambda x: ops.diagonal(x, 0, 1, 2),
    "ops.dot (x, constant)": lambda x: ops.dot(x, np.full((4, 4), 0.5, "float32")),
    "ops.dot_product_attention": lambda: _on((4, 2, 4), lambda x: ops.dot_product_attention(x, x, x)),
    "ops.equal (x, constant)": lambda: _of_words(lambda words: ops.equal(words, 1)),
    "ops.einsum": lambda x, y: ops.einsum("btc,bsc->bts", x, y),
    "ops.fft": lambda x, y: ops.fft((x, y)),
    "ops.fft2": lambda x, y: ops.fft2((x, y)),
    "ops.ifft2": lambda x, y: ops.ifft2((x, y)),
    "ops.fori_loop": lambda x: ops.fori_loop(0, 2, lambda turn, y: ops.tanh(y), x),
    "ops.flip": lambda x: ops.flip(x, axis=1),
    "ops.image.crop_images": lambda: _on((4, 4, 3), lambda x: ops.image.crop_images(x, 1, 1, 1, 1)),
    "ops.image.extract_patches": lambda: _on((4, 4, 3), lambda x: ops.image.extract_patches(x, 2)),
    "ops.image.gaussian_blur": lambda: _on((4, 4, 3), ops.image.gaussian_blur),
    "ops.image.pad_images": lambda: _on((4, 4, 3), lambda x: ops.image.pad_images(x, 1, 1, 1, 1)),
    "ops.image.rgb_to_grayscale": lambda: _on((4, 4, 3), ops.image.rgb_to_grayscale),
    "ops.logsumexp": lambda x: ops.logsumexp(x, axis=-1),
    "ops.matmul (constant, x)": lambda x: ops.matmul(np.full((4, 4), 0.5, "float32"), x),
    "ops.matmul (x, constant)": lambda x: ops.matmul(x, np.full((4, 4), 0.5, "float32")),
    "ops.max": lambda x: ops.max(x, axis=-1),
    "ops.mean": lambda x: ops.mean(x, axis=-1),
    "ops.min": lambda x: ops.min(x, axis=-1),
    "ops.norm": lambda x: ops.norm(x, axis=-1),
    "ops.not_equal (x, constant)": lambda: _of_words(lambda words: ops.not_equal(words, 0)),
    "ops.one_hot": lambda: _of_words(lambda words: ops.one_hot(words, 10)),
    "ops.ones_like": lambda: _of_words(ops.ones_like),
    "ops.prod": lambda x: ops.prod(x, axis=-1),
    "ops.repeat": lambda x: ops.repeat(x, 2, axis=1),
    "ops.reshape": lambda x: ops.reshape(x, (-1, 2, 8)),
    "ops.roll": lambda x: ops.roll(x, 1, axis=1),
    "ops.rot90": lambda: _on((4, 4, 3), lambda x: ops.rot90(x, axes=(1, 2))),
    "ops.scan": lambda x: ops.scan(lambda a, b: (a + b, a + b), ops.zeros_like(x[:, 0]), ops.transpose(x, (1, 0, 2)))[
        0
    ],
    "ops.select": lambda x, y: ops.select([np.arange(4) % 2 == 0], [x], y),
    "ops.separable_conv": lambda x: ops.separable_conv(x, np.full((2, 4, 1), 0.5, "f"), np.full((1, 4, 2), 0.5, "f")),
    "ops.slice": lambda x: ops.slice(x, (0, 1, 1), (-1, 2, 2)),
    "ops.slice_update": lambda x, y: ops.slice_update(x, (0, 1, 1), y[:, 1:3, 1:3]),
    "ops.split": lambda x: ops.split(x, 2, axis=1),
    "ops.squeeze": lambda: _on((1, 4), lambda x: ops.squeeze(x, axis=1)),
    "ops.stack": lambda x, y: ops.stack([x, y], axis=1),
    "ops.std": lambda x: ops.std(x, axis=-1),
    "ops.sum": lambda x: ops.sum(x, axis=-1),
    "ops.take": lambda x: ops.take(x, np.array([0, 2]), axis=1),
    "ops.take_along_axis": lambda x: ops.take_along_axis(x, np.zeros((1, 1, 4), "int32"), axis=1),
    "ops.tensordot (x, constant)": lambda x: ops.tensordot(x, np.full((4, 4), 0.5, "float32"), axes=1),
    "ops.tile": lambda x: ops.tile(x, (1, 2, 1)),
    "ops.trace": lambda x: ops.trace(x, 0, 1, 2),
    "ops.transpose": lambda x: ops.transpose(x, (0, 2, 1)),
    "ops.unstack": lambda x: ops.unstack(x, axis=1),
    "ops.var": lambda x: ops.var(x, axis=-1),
    "ops.where": lambda x, y: ops.where(np.arange(4) % 2 == 0, x, y),
    "ops.zeros_like": lambda: _of_words(ops.zeros_like),
}


def _of_words(truth):
    """Truth values from whole numbers, beside something that has a range."""
    words, x = keras.Input((4,), dtype="int32"), keras.Input((4,))
    return keras.Model([words, x], [truth(words), ops.relu(x)])


_SHAPES = [(4, 4), (4, 4, 4), (4,), (4, 4, 4, 4)]  # tried in turn: a series, an image, a vector, a volume
_TRIES = 3
_LISTS = ("xs", "arrays")  # arguments that are lists of tensors
# What keras.layers has that maps no tensor of numbers to another, or that Keras can make no model of.
_NO_LAYERS = {
    *("InputLayer", "Layer", "Pipeline", "Wrapper", "FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"),
    *("GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells"),
    *("Discretization", "Equalization", "HashedCrossing", "Hashing", "MaxNumBoundingBoxes", "STFTSpectrogram"),
}

_TRAINING, _MOVED = "training only", "as input"
RANGES = {
    "observed": "the result has a range of its own, observed in training",
    _MOVED: "values are only moved or chosen: the result shares its input's range, without any rounding",
    "rounded": "the result shares its input's range, and is rounded to it again",
    "joined": "its inputs' range, which it has a say in",
    "fixed": "known beforehand: TFLite prescribes the range, or the operation itself ends it",
    "-": "the result is not on a grid: whole numbers, or truth values",
}
_INTRODUCTION = """\
# What becomes of Keras layers and functions

Made from the code by `{command}`; a test fails while it is out of date. For each row a small model was quantized and
frozen, and "in the file" is what its file has (of recurrent layers: for 4 steps). `kq.explain(model)` tells the same of a
whole model. Nested and subclassed models and custom layers are opened, and may use everything below.

| range | |
|---|---|
{ranges}
"""
_COLUMNS = ("Keras", "in the file", "runs on", "range", "notes")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of a layer or function.

    Args:
        name: Its public name.
        key: What the tables in the code know it by.
        ops: The TFLite ops in its file, in their order.
        range: One of `RANGES`, or "training only".
        notes: What the code says of it.
        refusal: Why it cannot be quantized.
        failure: It should be, but went wrong: a bug, for the test to tell.
    """

    name: str
    key: str = ""
    ops: tuple[str, ...] = ()
    range: str = ""
    notes: str = ""
    refusal: str = ""
    failure: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns behind the name."""
        counts = collections.Counter(self.ops)
        kinds = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in counts.items())
        missing = ", ".join(sorted(kind for kind in counts if not BUILTINS[kind].micro))
        runs_on = f"LiteRT (TFLM has no {missing})" if missing else "LiteRT, TFLM"
        return (kinds, runs_on, self.range, self.notes)


def document() -> str:
    """The text of OPERATIONS.md."""
    return "\n".join([introduction(), layers_section(layer_entries()), functions_section(function_entries())])


def introduction() -> str:
    ranges = "\n".join(f"| {word} | {meaning} |" for word, meaning in RANGES.items())
    return _INTRODUCTION.format(command=COMMAND, ranges=ranges)


def layers_section(entries: list[Entry]) -> str:
    """A row for each layer, and the names of those that need none."""
    rows = [(_listed([entry.name]), *entry.cells) for entry in entries if entry.ops]
    gone = [entry.name for entry in entries if entry.range == _TRAINING]
    refused = _by(lambda entry: entry.refusal, [entry for entry in entries if entry.refusal])
    return (
        f"## keras.layers\n\n{_table(rows)}\n\n"
        f"In training only, and not in the file: {_listed(gone)}.\n\nRefused:\n"
        + "".join(f"- {_listed(names)}: {reason}\n" for reason, names in refused.items())
    )


def functions_section(entries: list[Entry]) -> str:
    """A row for all the functions that are treated alike."""
    alike = _by(lambda entry: entry.cells, [entry for entry in entries if entry.ops])
    rows = [(_listed(names), *cells) for cells, names in alike.items()]
    heading = "## keras.ops and keras.activations\n\nOperators of tensors (`+`, `@`, `[...]`) are these functions too."
    return f"{heading}\n\n{_table(rows)}\n"


def layer_entries() -> list[Entry]:
    """All of keras.layers."""
    classes = {each for each in vars(layers).values() if inspect.isclass(each) and issubclass(each, keras.Layer)}
    by_name = {each.__name__: each for each in classes if each.__name__ not in _NO_LAYERS}
    return [
        _entry(name, _models(_CALLS.get(name) or _calling_layer(by_name[name])))
        or Entry(name, failure="No call of it was found. Give it one in _CALLS of keras_qat/document.py.")
        for name in sorted(by_name)
    ]


def function_entries() -> list[Entry]:
    """The functions that the tables know; those of two tensors also with a constant on either side."""
    names: dict[Callable, list[str]] = {}
    for prefix, module in (("ops", ops), ("ops.image", ops.image), ("activations", keras.activations)):
        for name, function in sorted(vars(module).items()):
            if inspect.isfunction(function):
                names.setdefault(function, []).append(f"{prefix}.{name}")
    calls: dict[str, Callable] = {}
    for function, aliases in names.items():
        calls.update(_variants(function, ", ".join(aliases)))
    # The first model tells the operation, and so whether the function is known.
    found = [_entry(name, itertools.takewhile(_is_known, _models(_CALLS.get(name, calls[name])))) for name in calls]
    return [entry for entry in found if entry is not None]


def _variants(function, name: str) -> dict[str, Callable]:
    call = _calling_function(function)
    if _required(function) != ["x1", "x2"]:
        return {name: call}
    return {
        f"{name} (x, y)": call,
        f"{name} (x, constant)": lambda x: call(x, 0.5),
        f"{name} (constant, x)": lambda x: call(0.5, x),
    }


# --- small models ----------------------------------------------------------------------------------------------------


def _models(call: Callable) -> Iterator[keras.Model]:
    """Models that consist of one call, for every shape and number of inputs that it takes."""
    for count in (1, 2, 0):
        for shape in _SHAPES if count else [()]:
            model = _model(call, [keras.Input(shape) for _ in range(count)])
            if model is not None:
                yield model


def _model(call: Callable, inputs: list) -> keras.Model | None:
    try:
        outputs = call(*inputs)
        return outputs if isinstance(outputs, keras.Model) else keras.Model(inputs, outputs)
    except Exception:  # whatever Keras raises for a shape or number that it does not take
        return None


def _calling_layer(layer_class) -> Callable:
    def call(*tensors):
        layer = layer_class(**{name: _argument(name) for name in _required(layer_class)})
        if len(tensors) == 1 or len(_required(layer.call)) == 2:
            return layer(*tensors)
        return layer(list(tensors))

    return call


def _calling_function(function) -> Callable:
    def call(*tensors):
        rest, arguments = list(tensors), []
        for name in _required(function):
            if name in _LISTS:
                arguments.append(rest)
                rest = []
            else:
                arguments.append(_argument(name) if name in _ARGUMENTS else rest.pop(0))
        if rest:
            raise TypeError(f"{function.__name__} takes fewer tensors.")
        return function(*arguments)

    return call


def _required(function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]


def _argument(name: str):
    value = _ARGUMENTS[name]
    return value() if inspect.isfunction(value) else value


# --- what becomes of them --------------------------------------------------------------------------------------------


def _entry(name: str, models: Iterable[keras.Model]) -> Entry | None:
    """That of the first model which can be quantized, else the reason why the first one cannot; None for no model."""
    refused = None
    try:
        for model in itertools.islice(models, _TRIES):
            entry = _examined(name, model)
            if not entry.refusal:
                return entry
            refused = refused or entry
    except Exception as error:
        return Entry(name, failure=f"{type(error).__name__}: {error}")
    return refused


def _examined(name: str, model: keras.Model) -> Entry:
    node = _node(model)
    key, row = key_of(node.operation), row_of(node.operation)
    if row is not None and row.range == "train":
        return Entry(name, key, range=_TRAINING)
    explanation = kq.explain(model)
    if not explanation.supported:
        problem = explanation.problems[0]
        return Entry(name, key, refusal=f"{problem.reason} {problem.way_out}")
    kinds = _frozen_ops(model)
    range_kind = "-" if is_index(model.outputs[0]) else _range(explanation)
    return Entry(name, key, kinds, range_kind, " ".join(_notes(node, kinds)))


def _range(explanation: kq.Explanation) -> str:
    """The range of the result; where the last operation only moves values, that of what it moves."""
    kinds = [row.range.split(",")[0] for row in explanation.rows]
    return next((kind for kind in reversed(kinds) if kind not in (_TRAINING, _MOVED)), _MOVED)


def _frozen_ops(model: keras.Model) -> tuple[str, ...]:
    """The ops of its file, every observed range being that of -1 and 1."""
    qat = kq.quantize(model)
    for layer in qat.layers:
        if isinstance(layer, FakeQuant) and layer.quantizer.observes:
            for site in range(len(layer.sites)):
                layer.quantizer.include(np.float32([-1, 1]), site)
    program = kq.freeze(qat)
    tflite_export.write(program)
    return tuple(op.kind for op in program.ops)


def _node(model: keras.Model):
    """The call that the model consists of."""
    return model.outputs[0]._keras_history.operation._inbound_nodes[-1]


def _lowering(node):
    return lowering_of(node.operation, node.arguments.args, node.arguments.kwargs)


def _is_known(model: keras.Model) -> bool:
    node = _node(model)
    return row_of(node.operation) is not None or _lowering(node) is not None


def _notes(node, kinds: tuple[str, ...]) -> Iterator[str]:
    """The docstring of its lowering rule, or those of its row in the table."""
    row = row_of(node.operation)
    if _lowering(node) is not None:
        yield from _summaries(RULES.get(key_of(node.operation)))
    elif row is not None:
        if re.search("[a-z]", row.op) or not set(re.findall(r"[A-Z_\d]+", row.op)) <= set(kinds):
            yield f"`explain` says: {row.op}."
        yield from _summaries(row.emit, row.refuses)
        if row.fuses:
            yield "Takes in a relu behind it."


def _summaries(*functions) -> Iterator[str]:
    for function in functions:
        if inspect.isfunction(function) and function.__doc__:
            yield " ".join(inspect.getdoc(function).split("\n\n")[0].split())


# --- Markdown --------------------------------------------------------------------------------------------------------


def _by(key: Callable, entries: list[Entry]) -> dict:
    """Key → the names of the entries that have it."""
    names: dict[object, list[str]] = {}
    for entry in entries:
        names.setdefault(key(entry), []).append(entry.name)
    return names


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PATH.write_text(document())
    print(PATH)
