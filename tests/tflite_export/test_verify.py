import json
import sys

import numpy as np
import pytest
import tensorflow as tf

from tflite_export import Op, Program, Tensor, inspect, reference_tensors, verify, write
from tflite_export.runtimes import RUNTIMES, available
from tflite_export.verify import LayerParity, OutputParity, Parity

EXACT = ("litert", "xnnpack")  # TFLM rounds twice, see test_runtimes
needs_tflm = pytest.mark.skipif(not available("tflm"), reason="tflite-micro is not installed")


class Predictor:
    def __init__(self, function):
        self.function = function

    def predict(self, inputs, verbose):
        assert verbose == 0
        return self.function(inputs)


REFERENCES = {
    "callable": lambda dense: dense.reference,
    "predict": lambda dense: Predictor(dense.reference),
    "callable, list": lambda dense: lambda x: [dense.reference(x)],
    "callable, dict": lambda dense: lambda x: {"logits": dense.reference(x)},
    "array": lambda dense: dense.reference(dense.inputs),
    "tensor": lambda dense: tf.constant(dense.reference(dense.inputs)),
    "list": lambda dense: [dense.reference(dense.inputs)],
    "dict": lambda dense: {"logits": dense.reference(dense.inputs)},
    "dict by tensor": lambda dense: {"y": dense.reference(dense.inputs)},
}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_reference_forms(dense, reference):
    parity = verify(dense.content, reference(dense), dense.inputs, EXACT)
    assert parity.exact and parity.passed and parity.samples == 50
    assert [(result.runtime, result.output, result.elements) for result in parity.results] == [
        ("litert", "logits", 500),
        ("xnnpack", "logits", 500),
    ]


@pytest.mark.parametrize(
    "wrap", [lambda x: [x], lambda x: (x,), lambda x: {"image": x}, lambda x: {"x": x}, tf.constant, np.float64]
)
def test_input_forms_and_the_reference_sees_what_was_passed(dense, wrap):
    seen = []

    def reference(inputs):
        seen.append(inputs)
        return dense.reference(dense.inputs)

    inputs = wrap(dense.inputs)
    assert verify(dense.content, reference, inputs, "litert").exact
    assert len(seen) == 1 and seen[0] is inputs


@pytest.mark.parametrize(
    "io", [{"input_type": "float32", "output_type": "float32"}, {"input_type": "uint8"}, {"output_type": "uint8"}]
)
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_any_rim_is_compared_on_the_inner_grid(make_dense, io, dynamic_batch):
    dense = make_dense(dynamic_batch=dynamic_batch, **io)
    assert verify(dense.content, dense.reference, dense.inputs, EXACT).exact


@needs_tflm
def test_all_runtimes_at_once_from_a_path(make_dense, tmp_path):
    dense = make_dense(dynamic_batch=True, samples=400)
    path = tmp_path / "dense.tflite"
    path.write_bytes(dense.content)
    parity = verify(path, dense.reference, dense.inputs)
    assert [result.runtime for result in parity.results] == list(RUNTIMES)
    assert parity.passed and not parity.exact and parity.max_lsb == 1 and 0 < parity.mismatch < 0.01
    assert parity.arena_bytes > 500
    assert parity.skipped == ["tflm: the file has a dynamic batch; TFLM ran it at batch 1"]


def test_differences_are_counted_in_lsb(dense):
    output = dense.program.tensors["y"]
    integers = dense.integers.astype(int)
    assert abs(integers).max() < 120
    assert verify(dense.content, output.dequantize(integers), dense.inputs, "litert").exact
    integers[::10, 4] += 3  # one element in a hundred
    parity = verify(dense.content, output.dequantize(integers), dense.inputs, "litert")
    assert (parity.max_lsb, parity.mismatch) == (3, pytest.approx(0.01))
    assert parity.rms == parity.results[0].rms == pytest.approx(0.3)  # the root of a hundredth of 9
    assert "rms LSB" in str(parity) and "0.3000" in str(parity)


def test_top1_counts_rows_whose_winner_changed(dense):
    outputs = dense.reference(dense.inputs)
    ranks = np.argsort(outputs, -1)
    swapped = outputs.copy()
    for row in (0, 7):
        loser, winner = ranks[row, 0], ranks[row, -1]
        swapped[row, [loser, winner]] = swapped[row, [winner, loser]]
    parity = verify(dense.content, swapped, dense.inputs, "litert")
    assert parity.top1 == pytest.approx(48 / 50)
    assert not parity.passed and "FAILED" in str(parity)


@pytest.mark.parametrize(
    "rows, passed",
    [
        ([], False),
        ([(0.0, 0, 0.0, 1.0)], True),
        ([(0.9, 1, 0.95, 0.2)], True),  # 1 LSB passes whatever the classes
        ([(0.9, 1, 0.95, None)], True),
        ([(0.9, 2, 1.0, 0.995)], True),
        ([(0.9, 2, 1.0, 0.99)], False),
        ([(0.9, 2, 1.01, 0.995)], False),
        ([(0.001, 90, 2.8, 1.0)], False),
        ([(0.01, 9, 0.9, None)], True),
        ([(0.5, 2, 1.0, None)], True),
        ([(0.5, 2, 1.01, None)], False),
        ([(0.0, 0, 0.0, 1.0), (0.5, 7, 0.9, 0.5)], False),
    ],
)
def test_what_passes(rows, passed):
    parity = Parity([OutputParity("litert", "y", 100, *row) for row in rows], samples=10)
    assert parity.passed == parity.to_dict()["passed"] == passed
    assert parity.exact == (rows == [(0.0, 0, 0.0, 1.0)])
    assert parity.to_dict()["rms"] == parity.rms == max((row[2] for row in rows), default=0)


def nan_at(array, *index):
    array = np.array(array)
    array[index] = np.nan
    return array


MISTAKES = {
    "NaN in an input": (lambda d: dict(inputs=nan_at(d.inputs, 3, 2)), "Input 'image' contains NaN.*1 NaN of 800"),
    "NaN in the reference": (
        lambda d: dict(reference=nan_at(d.reference(d.inputs), 0, 0)),
        "reference's output 'logits' contains NaN",
    ),
    "too many inputs": (lambda d: dict(inputs=[d.inputs, d.inputs]), r"1 inputs: \['image'\].*Received: 2"),
    "another name": (lambda d: dict(inputs={"picture": d.inputs}), r"lack \['image'\].*Received: \['picture'\]"),
    "another shape": (lambda d: dict(inputs=d.inputs[:, :8]), r"'image'.*Expected: \(samples, 16\).*: \(50, 8\)"),
    "no sample axis": (lambda d: dict(inputs=d.inputs[0]), r"'image'.*Expected: \(samples, 16\).*Received: \(16,\)"),
    "no samples": (lambda d: dict(inputs=d.inputs[:0]), "at least one"),
    "words": (lambda d: dict(inputs=np.full((50, 16), "x")), "Input 'image': expected real numbers"),
    "too few outputs": (lambda d: dict(reference=[]), r"1 outputs: \['logits'\].*Received: 0"),
    "output's name": (lambda d: dict(reference={"prob": d.inputs}), r"outputs lack \['logits'\]"),
    "output's samples": (lambda d: dict(reference=d.reference(d.inputs)[:4]), "Expected 50 samples"),
    "output's shape": (lambda d: dict(reference=d.inputs), r"'logits'.*Expected: \(50, 10\). Received: \(50, 16\)"),
    "runtime": (lambda d: dict(runtimes=("litert", "onnx")), "litert, xnnpack, tflm. Received: 'onnx'"),
    "no tflite": (lambda d: dict(tflite=b"nothing"), "not a readable .tflite"),
}


@pytest.mark.parametrize("change, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(dense, change, message):
    arguments = {"tflite": dense.content, "reference": dense.reference(dense.inputs), "inputs": dense.inputs}
    with pytest.raises(ValueError, match=message):
        verify(**arguments | change(dense))


def two_inputs() -> Program:
    program = Program(inputs={"left": "a", "right": "b"}, outputs={"difference": "y", "sum": "z"})
    for name in "abyz":
        program.add(Tensor(name, (1, 4), "int8", (0.5,), 1))
    options = {"fusedActivationFunction": 0}
    program.ops = [Op("SUB", ["a", "b"], ["y"], options), Op("ADD", ["a", "b"], ["z"], options)]
    return program


def test_several_inputs_and_outputs_by_order_and_by_name():
    content = write(two_inputs())
    left, right = np.random.default_rng(0).integers(-20, 20, (2, 30, 4)) * 0.5
    by_order, by_name = [left, right], {"right": right, "left": left}
    cases = [
        (by_order, lambda x: [x[0] - x[1], x[0] + x[1]]),
        (by_name, lambda x: {"sum": x["left"] + x["right"], "difference": x["left"] - x["right"]}),
    ]
    for inputs, reference in cases:
        parity = verify(content, reference, inputs)
        assert parity.exact and {result.output for result in parity.results} == {"difference", "sum"}
    with pytest.raises(ValueError, match="same number of samples.*'left': 30, 'right': 29"):
        verify(content, cases[0][1], [left, right[:-1]])


def test_a_float_output_is_compared_in_steps_of_its_range(foreign_files, image_net):
    """A float file and its float model agree; a hundredth of the range is two and a half steps."""
    inputs = np.random.default_rng(5).random((20, 16, 16, 3)).astype(np.float32)
    outputs = image_net(inputs).numpy()
    assert verify(foreign_files["float"], outputs, inputs, "litert").max_lsb <= 1
    moved = outputs + 0.01 * (outputs.max() - outputs.min())
    assert 2 <= verify(foreign_files["float"], moved, inputs, "litert").max_lsb <= 3


@pytest.mark.parametrize("name", ["int8", "float_rim"])
def test_foreign_files_against_their_float_model(foreign_files, image_net, name):
    """TFLiteConverter's own quantization is near its float model, and the same as another interpreter's result."""
    inputs = np.random.default_rng(5).random((20, 16, 16, 3)).astype(np.float32)
    float_net = verify(foreign_files[name], lambda x: image_net(x).numpy(), inputs, "litert")
    assert 0 < float_net.max_lsb < 30
    assert verify(foreign_files[name], witness(foreign_files[name], inputs), inputs, "litert").exact


def witness(content: bytes, inputs: np.ndarray) -> np.ndarray:
    interpreter = tf.lite.Interpreter(
        model_content=content, experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_REF
    )
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    outputs = []
    for sample in inputs:
        scale, zero_point = source["quantization"]
        if scale:
            sample = np.clip(np.floor(sample.astype(np.float64) / scale + 0.5) + zero_point, -128, 127)
        interpreter.set_tensor(source["index"], sample[None].astype(source["dtype"]))
        interpreter.invoke()
        values = interpreter.get_tensor(target["index"])[0].astype(np.float64)
        scale, zero_point = target["quantization"]
        outputs.append((values - zero_point) * scale if scale else values)
    return np.array(outputs)


@needs_tflm
def test_what_tflm_refuses_is_a_note(unknown_to_tflm):
    values = np.random.default_rng(0).permuted(np.tile(np.arange(8), (5, 1)), axis=1)
    parity = verify(unknown_to_tflm, np.tile([7, 6, 5], (5, 1)), values)
    assert parity.exact and [result.runtime for result in parity.results] == ["litert", "xnnpack"]
    assert len(parity.skipped) == 1 and "TOPK_V2" in parity.skipped[0] and "note: " in str(parity)


def test_tflm_that_is_not_installed_is_a_note(dense, monkeypatch):
    # The package's name `verify` is the function; its module is in sys.modules.
    monkeypatch.setattr(sys.modules["tflite_export.verify"], "available", lambda name: name != "tflm")
    parity = verify(dense.content, dense.reference, dense.inputs)
    assert parity.exact and parity.arena_bytes is None
    assert parity.skipped == ["tflm: tflite-micro is not installed. Install the extra: pip install keras_qat[micro]"]
    nothing = verify(dense.content, dense.reference, dense.inputs, "tflm")
    assert not nothing.results and not nothing.passed and not nothing.exact


def softmax_integers(dense) -> np.ndarray:
    logits = dense.program.tensors["y"].dequantize(dense.integers).astype(np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_layers_in_running_order(make_dense):
    dense = make_dense(then_softmax=True)
    tensors = {"p": softmax_integers(dense), "y": dense.reference(dense.inputs), "x": dense.inputs, "other": None}
    parity = verify(dense.content, tensors, dense.inputs, "litert", per_layer=True)
    assert [(layer.tensor, layer.op) for layer in parity.layers] == [
        ("x", "INPUT"),
        ("y", "FULLY_CONNECTED"),
        ("p", "SOFTMAX"),
    ]
    assert parity.first_divergence is None and "FULLY_CONNECTED" in str(parity)
    tensors["y"] = tensors["y"] + 0.5 * 2 * (np.arange(10) == 3)
    wrong = verify(dense.content, tensors, dense.inputs, "litert", per_layer=True)
    assert (wrong.first_divergence.tensor, wrong.first_divergence.max_lsb) == ("y", 2)
    assert wrong.first_divergence.mismatch == pytest.approx(0.1)
    assert wrong.results == parity.results


class Model:
    def __init__(self, dense):
        self.dense = dense

    def __call__(self, inputs):
        return self.dense.reference(inputs)


def test_inner_tensors_of_a_new_type_need_a_handler(dense):
    with pytest.raises(TypeError, match="No inner tensors are known of a Model.*reference_tensors.register"):
        verify(dense.content, Model(dense), dense.inputs, "xnnpack", per_layer=True)

    @reference_tensors.register
    def _(reference: Model, inputs):
        return {"y": reference(inputs).reshape(-1, 1, 10)}

    parity = verify(dense.content, Model(dense), dense.inputs, "xnnpack", per_layer=True)
    assert parity.layers == [LayerParity("y", "FULLY_CONNECTED", 0.0, 0)]


def test_prints_and_goes_into_json(dense):
    parity = verify(dense.content, dense.reference, dense.inputs, EXACT)
    text = str(parity)
    assert text.startswith("parity on 50 samples: exact") and "xnnpack" in text and "100.0000%" in text
    back = json.loads(json.dumps(parity.to_dict()))
    assert back["exact"] and back["results"][0]["output"] == "logits" and back["first_divergence"] is None


def test_inspect_and_verify_agree_on_the_names(dense):
    outputs = {port.name: dense.reference(dense.inputs) for port in inspect(dense.content).outputs}
    assert verify(dense.content, outputs, dense.inputs, "litert").exact
