"""Recurrent layers, unrolled over their fixed number of steps.

Whatever reads the input reads all of the sequence at once, in front of the loop. Whatever reads the state is one layer that
is called at every step, so that its weights stay shared. A cell has two such pairs, one for its gates and one for its
candidate: their sums have different ranges, and one op of each kind applies to all gates together. All is in 8 bits, but for
what gates read that are steeper than a sigmoid.
"""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops, tree

from keras_qat.compounds import Narrow, WideAdd, Widen
from keras_qat.graph.lower.activations import symbolic
from keras_qat.graph.lower.moves import reshaped
from keras_qat.graph.lower.truths import chosen, truth_of
from keras_qat.graph.lower.weights import dense_of
from keras_qat.graph.walk import key_of


@keras.saving.register_keras_serializable("keras_qat")
class OneGrid(keras.layers.Layer):
    """Hands on what it gets. All tensors that it is called on share one grid: a state at each step.

    A layer called on them then has the same integer weights at every call, which are in the file once.
    """

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.supports_masking = True

    def call(self, x):
        return x


@dataclasses.dataclass
class Unrolled:
    """What can be run step by step.

    Args:
        inputs: `sequence -> [x, ...]`, what the steps read of it.
        step: `(x, states) -> (output, states)`. A state is None where it is zero and no tensor yet.
        first: `x -> states` in front of the first step.
    """

    inputs: Callable
    step: Callable
    first: Callable

    def run(self, sequence, states=None, backwards=False, seen=None):
        """Returns the outputs in the order of the steps, and the last states.

        Args:
            sequence: What the steps are of.
            states: To begin with.
            backwards: The last step is the first one.
            seen: `Seen`, if there are steps to leave out.
        """
        direction = -1 if backwards else 1
        inputs = self.inputs(sequence)[::direction]
        flags = seen.flags[::direction] if seen else inputs
        states, outputs = states or self.first(inputs[0]), []
        for x, flag in zip(inputs, flags, strict=True):
            output, new = self.step(x, states)
            if seen:
                output, new = seen.kept(flag, output, new, outputs, states)
            outputs.append(output)
            states = new
        return outputs, states


@dataclasses.dataclass
class Seen:
    """Which steps count. At the others states stay as they are, and the output is that of the step before, or zeros.

    Args:
        flags: Of each step a tensor of truth values, one a sample.
        gives_zeros: The output is zeros, not that of the step before.
    """

    flags: list
    gives_zeros: bool

    def kept(self, flag, output, new, outputs, states):
        """The output and states of a step of which `flag` tells whether it counts."""
        before = None if self.gives_zeros or not outputs else outputs[-1]
        kept = {}

        def choose(one, other):
            key = id(one), id(other)
            if key not in kept:
                there = ops.reshape(flag, (-1, *[1] * (len(one.shape) - 1)))
                kept[key] = chosen(there, one, 0.0 if other is None else other)
            return kept[key]

        output = choose(output, before)
        return output, [choose(one, other) for one, other in zip(new, states, strict=True)]


@dataclasses.dataclass
class Stacked:
    """Cells one behind the other: each runs over all steps before the next one does."""

    cells: list

    def run(self, sequence, states=None, backwards=False, seen=None):
        """See `Unrolled`. There is a list of states for each cell."""
        last_states = []
        for index, cell in enumerate(self.cells):
            outputs, last = cell.run(sequence, states and states[index], backwards and index == 0, seen)
            last_states.append(last)
            sequence = ops.stack(outputs, axis=1)
            if seen and backwards and index == 0:
                seen = dataclasses.replace(seen, flags=seen.flags[::-1])
        return outputs, last_states


def unrolled(layer, prefix: str = "") -> Callable:
    """`(sequence, initial_state, mask) -> (outputs, states)` for an RNN layer, outputs in the order of its steps.

    The layers of the result are made here, so that all calls share them. Their names begin with `prefix`.
    """
    if layer.stateful:
        raise ValueError(
            "It is stateful: it carries its state from one batch to the next, which a file without variables cannot. "
            "Build it with stateful=False, its state as an input (initial_state=) and an output (return_state=True) of "
            "the model."
        )
    cell = _cell_of(layer.cell, prefix)

    def run(sequence, initial_state=None, mask=None):
        seen = _seen(mask, layer.zero_output_for_mask)
        return cell.run(sequence, _states(layer.cell, initial_state), layer.go_backwards, seen)

    return run


def _seen(mask, gives_zeros) -> Seen | None:
    if mask is None:
        return None
    mask = truth_of(mask)
    return Seen([mask[:, step : step + 1] for step in range(mask.shape[1])], gives_zeros)


def _cell_of(cell, prefix):
    """An RNN cell as what can be run."""
    make = _CELLS.get(key_of(cell) if isinstance(cell, keras.Layer) else None, _own)
    return make(cell, prefix)


def steps_of(sequence) -> list:
    """The steps of a sequence. Those of images are cut out of a single image: TensorFlow Lite Micro slices four axes."""
    count, *shape = sequence.shape[1:]
    if len(shape) < 3:
        return [sequence[:, step] for step in range(count)]
    whole, rows = ops.reshape(sequence, (-1, count * shape[0], *shape[1:])), shape[0]
    return [whole[:, step * rows : (step + 1) * rows] for step in range(count)]


def _states(cell, given):
    """The given states as the cell takes them; None where there are none, or only zeros."""
    flat = [] if given is None else [x for x in tree.flatten(given) if x is not None]
    if not any(isinstance(x, keras.KerasTensor) for x in flat):
        if any(np.any(np.asarray(x)) for x in flat):
            raise ValueError("Its initial_state is an array of numbers. Expected: tensors of the model, or zeros.")
        return None
    return _per_cell(cell, iter(flat))


def _per_cell(cell, flat):
    if key_of(cell) == "StackedRNNCells":
        return [_per_cell(one, flat) for one in cell.cells]
    return [next(flat) for _ in tree.flatten(cell.state_size)]


def _rnn(layer, args, kwargs):
    run = unrolled(layer)

    def call(sequence, initial_state=None, mask=None, training=None):
        outputs, states = run(sequence, initial_state, mask)
        output = ops.stack(outputs, axis=1) if layer.return_sequences else outputs[-1]
        return (output, *states) if layer.return_state else output

    return call


# --- cells -----------------------------------------------------------------------------------------------------------


def _lstm(cell, prefix) -> Unrolled:
    """`c' = f · c + i · g`, `h' = o · tanh(c')`, of vectors or images (ConvLSTM)."""
    i, f, g, o = _columns(cell, 4)
    wide = _is_steep(cell.recurrent_activation)
    gates = _Sums(cell, prefix, "gates", [*i, *f, *o], wide=wide)
    candidate = _Sums(cell, prefix, "candidate", g, wide=wide)
    sigmoid, tanh = symbolic(cell.recurrent_activation), symbolic(cell.activation)
    # What is a product of the same two grids at every step can be rounded alike on all runtimes.
    opened, squashed, state = (OneGrid(name=f"{prefix}{name}") for name in ("gates", "squashed", "state"))

    def step(x, states):
        h, c = states
        i, f, o = _parts(opened(sigmoid(gates.plus(x[0], h))), 3)
        new = ops.multiply(i, tanh(candidate.plus(x[1], h)))
        c = new if c is None else ops.add(ops.multiply(f, c), new)
        h = state(ops.multiply(o, squashed(tanh(c))))
        return h, [h, c]

    return Unrolled(_inputs(gates, candidate), step, lambda x: [None, None])


def _gru(cell, prefix) -> Unrolled:
    """`h' = g + z · (h - g)`."""
    z, r, g = _columns(cell, 3)
    gates = _Sums(cell, prefix, "gates", [*z, *r], wide=_is_steep(cell.recurrent_activation))
    candidate = _Sums(cell, prefix, "candidate", g, bias_of_state=True)
    sigmoid, tanh = symbolic(cell.recurrent_activation), symbolic(cell.activation)
    state = OneGrid(name=f"{prefix}state")

    def reset(r, h):
        if cell.reset_after:
            return ops.multiply(r, candidate.of_state(h))
        return candidate.of_state(ops.multiply(r, h))

    def step(x, states):
        (h,) = states
        z, r = _parts(sigmoid(gates.plus(x[0], h)), 2)
        if h is None:
            g = tanh(x[1])
            h = ops.subtract(g, ops.multiply(z, g))
        else:
            g = tanh(ops.add(x[1], reset(r, h)))
            h = ops.add(g, ops.multiply(z, ops.subtract(h, g)))
        h = state(h)
        return h, [h]

    # Its recurrent bias counts inside of the reset gate, also at the first step.
    needs_zeros = cell.reset_after and cell.use_bias
    zeros = _constants([np.zeros(cell.units)], prefix) if needs_zeros else lambda x: [None]
    return Unrolled(_inputs(gates, candidate), step, lambda x: zeros(x[1]))


def _simple(cell, prefix) -> Unrolled:
    """`h' = tanh(x W + h U + b)`."""
    whole, activation = _Sums(cell, prefix, "", range(cell.units)), symbolic(cell.activation)
    state = OneGrid(name=f"{prefix}state")

    def step(x, states):
        h = state(activation(whole.plus(x[0], states[0])))
        return h, [h]

    return Unrolled(_inputs(whole), step, lambda x: [None])


def _stacked(cell, prefix) -> Stacked:
    return Stacked([_cell_of(one, f"{prefix}cell_{index}.") for index, one in enumerate(cell.cells)])


def _own(cell, prefix) -> Unrolled:
    """Somebody's own cell: its `call` at every step, on the states that it begins with."""
    if hasattr(cell, "get_initial_state"):
        begin = [np.asarray(state)[0] for state in tree.flatten(cell.get_initial_state(batch_size=1))]
    else:
        begin = [np.zeros(size) for size in tree.flatten(cell.state_size)]

    def step(x, states):
        output, states = cell(x, states)
        return output, list(states) if tree.is_nested(states) else [states]

    return Unrolled(steps_of, step, _constants(begin, prefix))


_CELLS = {
    "LSTMCell": _lstm,
    "ConvLSTMCell": _lstm,
    "GRUCell": _gru,
    "SimpleRNNCell": _simple,
    "StackedRNNCells": _stacked,
}


# --- parts of cells --------------------------------------------------------------------------------------------------


def _is_steep(activation) -> bool:
    """Whether a gate shows the steps of what it reads more than a sigmoid does, whose slope is a quarter at most."""
    return activation not in (keras.activations.sigmoid, keras.activations.hard_sigmoid)


class _Sums:
    """`x W + h U + b` for some of a cell's gates.

    Args:
        cell: Has the weights.
        prefix, name: The layers are called `{prefix}input_{name}` and `{prefix}recurrent_{name}`.
        columns: Which columns of the kernels these gates are.
        bias_of_state: The cell's second bias is added to `h U` before anything else is done with it.
        wide: `x W` and the sum are in 16 bits.
    """

    def __init__(self, cell, prefix, name, columns, bias_of_state=False, wide=False):
        columns = np.asarray(columns)
        inputs, state = (f"{kind}_{name}" if name else kind for kind in ("input", "recurrent"))
        bias, second = None if cell.bias is None else np.asarray(cell.bias), None
        if bias is not None and bias.ndim == 2:
            bias, second = (bias[0], bias[1]) if bias_of_state else (bias.sum(axis=0), None)
        self._whole, self._wide = not hasattr(cell, "kernel_size"), wide
        self._of_input = _layer_of(cell, "kernel", columns, bias, f"{prefix}{inputs}")
        self._of_state = _layer_of(cell, "recurrent", columns, second, f"{prefix}{state}")
        self._grid = OneGrid(name=f"{prefix}{state}_grid")
        # The same inputs are left out at every step; what is left out of the state is chosen anew.
        shape = (None, 1, *[None] * (np.ndim(cell.kernel) - 1))
        self._drop = _dropout(cell.dropout, f"{prefix}{inputs}_dropout", shape)
        self._drop_state = _dropout(cell.recurrent_dropout, f"{prefix}{state}_dropout")

    def of_inputs(self, sequence) -> list:
        """What the steps add for the sequence."""
        sequence = self._drop(sequence)
        widen = Widen() if self._wide else lambda x: x
        if self._whole:
            return steps_of(self._of_input(widen(sequence)))
        return [self._of_input(widen(x)) for x in steps_of(sequence)]

    def of_state(self, h):
        return self._grid(self._of_state(self._drop_state(h)))

    def plus(self, x, h):
        if not self._wide:
            return x if h is None else ops.add(x, self.of_state(h))
        return Narrow()(x if h is None else WideAdd()(x, self.of_state(h)))


def _layer_of(cell, kind, columns, bias, name):
    """The columns of a kernel as a Dense, or of a convolutional cell as a convolution."""
    kernel = np.asarray(cell.kernel if kind == "kernel" else cell.recurrent_kernel)[..., columns]
    bias = None if bias is None else bias[columns]
    options = {
        "use_bias": bias is not None,
        "kernel_regularizer": getattr(cell, f"{kind}_regularizer"),
        "kernel_constraint": getattr(cell, f"{kind}_constraint"),
        "bias_regularizer": cell.bias_regularizer,
        "bias_constraint": cell.bias_constraint,
        "trainable": cell.trainable,
        "name": name,
    }
    if kernel.ndim == 2:
        layer = keras.layers.Dense(len(columns), **options)
    else:
        options.update(data_format=cell.data_format, padding=cell.padding if kind == "kernel" else "same")
        if kind == "kernel":
            options.update(strides=cell.strides, dilation_rate=cell.dilation_rate)
        layer = getattr(keras.layers, f"Conv{cell.rank}D")(len(columns), cell.kernel_size, **options)
    layer.build((*[None] * (kernel.ndim - 1), kernel.shape[-2]))
    layer.set_weights([kernel] if bias is None else [kernel, bias])
    return layer


def _dropout(rate, name, noise_shape=None) -> Callable:
    return keras.layers.Dropout(rate, noise_shape, name=name) if rate else lambda x: x


def _inputs(*sums) -> Callable:
    return lambda sequence: list(zip(*[one.of_inputs(sequence) for one in sums], strict=True))


def _columns(cell, count: int) -> np.ndarray:
    """The numbers of the kernel's columns, in as many parts as there are gates."""
    return np.split(np.arange(cell.kernel.shape[-1]), count)


def _parts(x, count: int) -> list:
    size = x.shape[-1] // count
    return [x[..., part * size : (part + 1) * size] for part in range(count)]


def _constants(values: list[np.ndarray], prefix) -> Callable:
    """`x -> states` with these numbers for each sample: dense layers without any weight, on one number of x."""
    layers = [
        dense_of(np.zeros((1, one.size)), np.ravel(one) if np.any(one) else None, name=f"{prefix}state_{index}")
        for index, one in enumerate(values)
    ]

    def states(x):
        one_number = reshaped(x, (-1, math.prod(x.shape[1:])))[:, :1]
        pairs = zip(layers, values, strict=True)
        return [reshaped(layer(one_number), (-1, *value.shape)) for layer, value in pairs]

    return states


RULES = dict.fromkeys(["RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"], _rnn)
