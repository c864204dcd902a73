"""Recurrent layers and wrappers: the table for the tests of their lowerings and for the whole-path test.

Sequences are short here: at every step a result may be off by 1 LSB where runtimes round differently, and a state hands
that on. What many steps do is measured apart (see test_recurrent.py).
"""

import keras
from cases import Case
from keras import layers, ops

STEPS, STATE, CLIP = (3, 8), (6,), (3, 6, 6, 3)
_SERIES_OF_SERIES = (3, 8, 5)


def _lively(**options):
    """Options of a recurrent layer whose biases are not the zeros of a fresh one."""
    return {"bias_initializer": keras.initializers.RandomNormal(stddev=0.5, seed=3), **options}


def _lstm(**options):
    return layers.LSTM(6, **_lively(unit_forget_bias=False, **options))


def _gru(**options):
    return layers.GRU(6, **_lively(**options))


def _simple(**options):
    return layers.SimpleRNN(6, **_lively(**options))


@keras.saving.register_keras_serializable("keras_qat_tests")
class OwnCell(layers.Layer):
    """A cell as people write it: dense layers, a leak, and two states of different sizes, one of which begins with ones."""

    state_size = (6, 3)
    output_size = 6

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.reads, self.feeds_back, self.recalls = (layers.Dense(6, use_bias=bias) for bias in (True, False, False))
        self.remembers = layers.Dense(3, activation="sigmoid")

    def build(self, input_shape):
        for layer, size in (
            (self.reads, input_shape[-1]),
            (self.feeds_back, 6),
            (self.recalls, 3),
            (self.remembers, 6),
        ):
            layer.build((None, size))

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, 6)), ops.ones((batch_size, 3))]

    def call(self, x, states):
        h, memory = states
        h = ops.tanh(self.reads(x) + self.feeds_back(h) + self.recalls(memory)) * 0.5 + h * 0.5
        return h, [h, self.remembers(h)]


def _with_states(layer):
    """Output and states in one tensor."""

    def build(x, *initial_state):
        output, *states = layer(x, initial_state=list(initial_state) or None)
        return layers.Add()([output, *states])

    return build


CELLS = [
    Case("simple", lambda x: _simple()(x), (STEPS,)),
    Case("simple_sequence", lambda x: _simple(return_sequences=True)(x), (STEPS,)),
    Case("simple_relu_backwards", lambda x: _simple(activation="relu", go_backwards=True)(x), (STEPS,)),
    Case("lstm", lambda x: _lstm()(x), (STEPS,)),
    Case("lstm_sequence", lambda x: _lstm(return_sequences=True)(x), (STEPS,)),
    Case("lstm_no_bias", lambda x: layers.LSTM(6, use_bias=False)(x), (STEPS,)),
    Case("lstm_backwards_sequence", lambda x: _lstm(go_backwards=True, return_sequences=True)(x), (STEPS,)),
    Case("lstm_states", lambda x: _with_states(_lstm(return_state=True))(x), (STEPS,)),
    Case(
        "lstm_given_states",
        lambda *x: _with_states(_lstm(return_state=True))(*x),
        (STEPS, STATE, STATE),
    ),
    Case(
        "lstm_other_activations",
        lambda x: _lstm(activation="softsign", recurrent_activation="tanh")(x),
        (STEPS,),
    ),
    Case("lstm_relu", lambda x: _lstm(activation="relu")(x), (STEPS,)),
    Case("gru", lambda x: _gru()(x), (STEPS,)),
    Case("gru_sequence", lambda x: _gru(return_sequences=True)(x), (STEPS,)),
    Case("gru_no_bias", lambda x: layers.GRU(6, use_bias=False)(x), (STEPS,)),
    Case("gru_steep_gates", lambda x: _gru(recurrent_activation="tanh")(x), (STEPS,)),
    Case("gru_reset_before", lambda x: _gru(reset_after=False)(x), (STEPS,)),
    Case("gru_given_state", lambda x, h: _gru()(x, initial_state=h), (STEPS, STATE)),
    Case("gru_twice", lambda x: _gru()(_gru(return_sequences=True)(x)), (STEPS,)),
    Case("gru_dropout", lambda x: _gru(dropout=0.3, recurrent_dropout=0.2)(x), (STEPS,)),
    Case("rnn_of_lstm_cell", lambda x: layers.RNN(layers.LSTMCell(6))(x), (STEPS,)),
    Case(
        "rnn_of_stacked_cells",
        lambda x: layers.RNN([layers.LSTMCell(6), layers.GRUCell(5), layers.SimpleRNNCell(4)], go_backwards=True)(x),
        (STEPS,),
    ),
    Case("rnn_of_own_cell", lambda x: layers.RNN(OwnCell(), return_sequences=True)(x), (STEPS,)),
    Case("conv_lstm_1d", lambda x: layers.ConvLSTM1D(4, 3, padding="same")(x), (_SERIES_OF_SERIES,)),
    Case("conv_lstm_2d", lambda x: layers.ConvLSTM2D(4, 3, return_sequences=True)(x), (CLIP,)),
]
BIDIRECTIONAL = [
    Case(
        f"bidirectional_{mode}",
        lambda x, mode=mode: layers.Bidirectional(_gru(return_sequences=True), merge_mode=mode)(x),
        (STEPS,),
    )
    for mode in ("concat", "sum", "ave", "mul")
] + [
    Case(
        "bidirectional_two_kinds",
        lambda x: layers.Bidirectional(_simple(), backward_layer=_gru(go_backwards=True))(x),
        (STEPS,),
    ),
    Case("bidirectional_last", lambda x: layers.Bidirectional(_lstm())(x), (STEPS,)),
    Case(
        "bidirectional_both",
        lambda x: layers.Subtract()(layers.Bidirectional(_simple(), merge_mode=None)(x)),
        (STEPS,),
    ),
    Case(
        "bidirectional_other_layer_first",
        lambda x: layers.Bidirectional(
            _gru(return_sequences=True, go_backwards=True), backward_layer=_simple(return_sequences=True)
        )(x),
        (STEPS,),
    ),
    Case(
        "bidirectional_given_states",
        lambda x, *states: layers.Concatenate()(
            layers.Bidirectional(_lstm(return_state=True))(x, initial_state=list(states))[1:]
        ),
        (STEPS, STATE, STATE, STATE, STATE),
    ),
]


def _each(inner):
    return lambda x: layers.TimeDistributed(inner())(x)


TIME_DISTRIBUTED = [
    Case("each_dense", _each(lambda: layers.Dense(5, activation="relu")), (STEPS,)),
    Case("each_batch_norm", _each(layers.BatchNormalization), (STEPS,)),
    Case("each_layer_norm", _each(layers.LayerNormalization), ((4, 32),)),
    Case("each_dropout_relu", lambda x: _each(layers.ReLU)(_each(lambda: layers.Dropout(0.2))(x)), (STEPS,)),
    Case("each_conv1d", _each(lambda: layers.Conv1D(4, 3, 2, "same")), (_SERIES_OF_SERIES,)),
    Case("each_conv1d_causal", _each(lambda: layers.Conv1D(4, 3, padding="causal")), (_SERIES_OF_SERIES,)),
    Case("each_separable1d", _each(lambda: layers.SeparableConv1D(4, 3)), (_SERIES_OF_SERIES,)),
    Case("each_max_pool1d", _each(lambda: layers.MaxPooling1D(2)), (_SERIES_OF_SERIES,)),
    Case("each_global_average1d", _each(layers.GlobalAveragePooling1D), (_SERIES_OF_SERIES,)),
    Case("each_flatten", _each(layers.Flatten), (_SERIES_OF_SERIES,)),
    Case("each_reshape", _each(lambda: layers.Reshape((5, 8))), (_SERIES_OF_SERIES,)),
    Case("each_lstm", _each(lambda: _lstm()), ((2, 3, 5),)),
    Case("each_conv2d", _each(lambda: layers.Conv2D(4, 3, activation="relu")), (CLIP,)),
    Case("each_patch", _each(lambda: layers.Conv2D(4, 2, 2)), (CLIP,)),
    Case("each_average_pool2d", _each(lambda: layers.AveragePooling2D(2)), (CLIP,)),
    Case("each_global_max2d", _each(lambda: layers.GlobalMaxPooling2D(keepdims=True)), (CLIP,)),
    Case(
        "each_model",
        _each(lambda: keras.Sequential([layers.Conv2D(4, 3), layers.ReLU(), layers.Flatten(), layers.Dense(3)])),
        (CLIP,),
    ),
]
RECURRENT = [*CELLS, *BIDIRECTIONAL, *TIME_DISTRIBUTED]
