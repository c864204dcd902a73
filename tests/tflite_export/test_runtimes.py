import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tflite_export
from tflite_export import Op, Program, Tensor, write
from tflite_export.runtimes import _WORKER, RUNTIMES, RefusedModelError, available, receive, run, send

PACKAGE_PARENT = str(Path(tflite_export.__file__).parent.parent)
needs_tflm = pytest.mark.skipif(not available("tflm"), reason="tflite-micro is not installed")
each_runtime = pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=needs_tflm if name == "tflm" else ()) for name in RUNTIMES]
)


@each_runtime
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_integers_equal_numpy(make_dense, runtime, dynamic_batch):
    dense = make_dense(dynamic_batch=dynamic_batch, samples=130)
    result = run(runtime, dense.content, [dense.quantized_inputs])
    difference = np.abs(result.outputs[0].astype(int) - dense.integers)
    assert result.outputs[0].dtype == np.int8 and result.outputs[0].shape == (130, 10)
    # TFLM rounds twice, to 31 bits and then to 8; that shows near ties.
    assert difference.max() <= (runtime == "tflm") and difference.mean() <= 0.01 * (runtime == "tflm")
    assert (result.arena_bytes is not None) == (runtime == "tflm") and result.tensors == {}


def tflm_multiply(values: np.ndarray, factor: float) -> np.ndarray:
    """How TFLM scales an accumulator: a rounded product in 31 fraction bits, then a rounded shift."""
    mantissa, exponent = np.frexp(factor)
    high = values * round(mantissa * 2**31) + 2**30
    high = high >> 31
    half = np.where(high < 0, 2 ** (-exponent - 1) - 1, 2 ** (-exponent - 1))
    return (high + half) >> -exponent


@needs_tflm
def test_tflm_rounds_twice_and_that_is_all(make_dense):
    dense = make_dense(samples=500)
    output, bias = (dense.program.tensors[name] for name in ("y", "b"))
    accumulators = dense.accumulate(dense.inputs)
    columns = [tflm_multiply(accumulators[:, c], bias.scale[c] / output.scale[0]) for c in range(10)]
    expected = np.clip(np.stack(columns, 1) + output.zero_point, -128, 127)
    received = run("tflm", dense.content, [dense.quantized_inputs]).outputs[0]
    np.testing.assert_array_equal(received, expected)
    assert (received != dense.integers).any()


def test_several_inputs_keep_their_order_and_static_batches_hold():
    program = Program(inputs={"a": "a", "b": "b"}, outputs={"difference": "y", "sum": "z"})
    for name in "abyz":
        program.add(Tensor(name, (2, 3), "int8", (0.5,)))
    options = {"fusedActivationFunction": 0}
    program.ops = [Op("SUB", ["a", "b"], ["y"], options), Op("ADD", ["a", "b"], ["z"], options)]
    a = np.arange(18, dtype=np.int8).reshape(6, 3)
    for runtime in filter(available, RUNTIMES):
        difference, total = run(runtime, write(program), [a * 2, a]).outputs
        np.testing.assert_array_equal(difference, a)
        np.testing.assert_array_equal(total, a * 3)


def test_inner_tensors(make_dense):
    dense = make_dense(then_softmax=True)
    result = run("litert", dense.content, [dense.quantized_inputs], per_layer=True)
    assert set(result.tensors) == {"x", "y", "p"}
    np.testing.assert_array_equal(result.tensors["x"], dense.quantized_inputs)
    np.testing.assert_array_equal(result.tensors["y"], dense.integers)
    np.testing.assert_array_equal(result.tensors["p"], result.outputs[0])
    with pytest.raises(ValueError, match="'litert' alone. Received: per_layer=True on 'xnnpack'"):
        run("xnnpack", dense.content, [dense.quantized_inputs], per_layer=True)


@needs_tflm
def test_arena_grows_with_the_model(dense):
    small = run("tflm", dense.content, [dense.quantized_inputs]).arena_bytes
    program = Program(inputs={"x": "x"}, outputs={"y": "y"})
    program.add(Tensor("x", (1, 6_000_000), "int8", (0.5,)))
    program.add(Tensor("y", (1, 6_000_000), "int8", (0.25,)))
    program.ops.append(Op("QUANTIZE", ["x"], ["y"]))
    result = run("tflm", write(program), [np.full((1, 6_000_000), 3, np.int8)])
    assert small < 10_000 and 12_000_000 <= result.arena_bytes < 13_000_000
    assert (result.outputs[0] == 6).all()


@needs_tflm
def test_a_refusal_tells_the_reason_and_spares_the_worker(unknown_to_tflm):
    values = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(run("litert", unknown_to_tflm, [values]).outputs[0], [[7, 6, 5]])
    worker = _WORKER._process.pid
    with pytest.raises(RefusedModelError, match="(?s)'tflm' cannot run this model.*TOPK_V2"):
        run("tflm", unknown_to_tflm, [values])
    assert _WORKER._process.pid == worker


def test_wrong_shape_is_a_refusal_too(dense):
    with pytest.raises(RefusedModelError, match="Dimension mismatch"):
        run("litert", dense.content, [np.zeros((1, 17), np.int8)])


def test_worker_is_used_again_and_replaced_when_dead(dense):
    inputs = [dense.quantized_inputs]
    run("litert", dense.content, inputs)
    first = _WORKER._process
    run("litert", dense.content, inputs)
    assert _WORKER._process is first
    first.kill()
    first.wait()
    np.testing.assert_array_equal(run("litert", dense.content, inputs).outputs[0], dense.integers)
    assert _WORKER._process.pid != first.pid


def test_death_during_a_call_is_told_and_survived(make_dense):
    dense = make_dense(samples=400_000)
    run("litert", dense.content, [dense.quantized_inputs[:1]])
    killer = threading.Timer(0.2, os.kill, (_WORKER._process.pid, signal.SIGABRT))
    killer.start()
    with pytest.raises(RuntimeError, match="'litert' ended its process by signal SIGABRT") as caught:
        run("litert", dense.content, [dense.quantized_inputs])
    assert not isinstance(caught.value, RefusedModelError)
    assert run("litert", dense.content, [dense.quantized_inputs[:2]]).outputs[0].shape == (2, 10)


def test_an_interrupted_call_does_not_shift_the_answers(make_dense, monkeypatch):
    """Interrupted while the answer is on its way, the next call gets its own answer, not that one."""
    dense = make_dense(samples=5)

    def interrupted(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tflite_export.runtimes"], "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("litert", dense.content, [dense.quantized_inputs])
    assert run("litert", dense.content, [dense.quantized_inputs[:3]]).outputs[0].shape == (3, 10)


def test_names():
    assert available("litert") and available("xnnpack")
    for call in (available, lambda name: run(name, b"", [])):
        with pytest.raises(ValueError, match="Expected one of: litert, xnnpack, tflm. Received: 'onnx'"):
            call("onnx")


def test_tflm_is_unavailable_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available("tflm")


def _python(*arguments, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": PACKAGE_PARENT, "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


SCRIPT = """
import os, sys, numpy as np
from tflite_export import runtimes
del os.environ["PYTHONSAFEPATH"]
content = open("dense.tflite", "rb").read()
go = lambda count: runtimes.run("litert", content, [np.zeros((count, 16), np.int8)]).outputs[0].shape[0]
print(go(3), flush=True)
worker = runtimes._WORKER._process.pid
if os.fork() == 0:
    print(go(5), flush=True)
    sys.exit()
os.wait()
print(go(4), runtimes._WORKER._process.pid == worker)
"""


def test_any_script_in_any_folder_can_use_it(dense, tmp_path):
    """No guard around the script's main part, a misleading module beside it, and a fork that gets its own worker."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the worker imported from the working directory')")
    (tmp_path / "dense.tflite").write_bytes(dense.content)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = _python("script.py", cwd=tmp_path)
    assert done.stdout.splitlines() == ["3", "5", "4 True"], done.stderr


NOISY_WORKER = """
import os
from tflite_export import worker
answer = worker._answer
worker._answer = lambda *request: (os.system("echo noise"), print("noise", flush=True), answer(*request))[-1]
worker.main()
"""


def test_what_natives_print_stays_out_of_the_answers(dense, tmp_path):
    request = io.BytesIO()
    send(request, ("litert", dense.content, [dense.quantized_inputs], False))
    environment = {**os.environ, "PYTHONPATH": PACKAGE_PARENT}
    command = [sys.executable, "-c", NOISY_WORKER]
    done = subprocess.run(command, input=request.getvalue(), capture_output=True, env=environment, cwd=tmp_path)
    is_good, result = receive(io.BytesIO(done.stdout))
    assert is_good and done.stderr.count(b"noise") == 2
    np.testing.assert_array_equal(result.outputs[0], dense.integers)


def test_the_worker_ends_with_its_parent(dense, tmp_path):
    (tmp_path / "dense.tflite").write_bytes(dense.content)
    script = (
        "import os, numpy as np, tflite_export.runtimes as r;"
        "r.run('litert', open('dense.tflite', 'rb').read(), [np.zeros((1, 16), np.int8)]);"
        "print(r._WORKER._process.pid, flush=True); os._exit(0)"  # no atexit: as if it were killed
    )
    worker = int(_python("-c", script, cwd=tmp_path).stdout)
    deadline = time.monotonic() + 5
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def dense_file(dense, tmp_path):
    path = tmp_path / "dense.tflite"
    path.write_bytes(dense.content)
    return path


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inspect"], ["full int8: yes", "FULLY_CONNECTED"]),
        (["inspect", "--json"], ['"is_full_int8": true']),
        (["run", "--samples=3"], ["logits", "3x10", "int8"]),
        pytest.param(["run", "--runtime=tflm", "--seed=4"], ["logits", "8x10", "arena: "], marks=needs_tflm),
    ],
)
def test_command_line(dense_file, arguments, words):
    command, *flags = arguments
    done = _python("-m", "tflite_export", command, dense_file.name, *flags, cwd=dense_file.parent)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--help"], 0),
        (["-h"], 0),
        (["inspect", "--help"], 0),
        ([], 1),
        (["inspect"], 1),
        (["draw", "x"], 1),
        (["--no"], 1),
    ],
)
def test_help_of_the_command_line(tmp_path, arguments, code):
    done = _python("-m", "tflite_export", *arguments, cwd=tmp_path)
    assert done.returncode == code
    if code == 0:
        assert "inspect model.tflite" in done.stdout and "--samples" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "run"])
@pytest.mark.parametrize("content, words", [(b"hello there", "not a readable .tflite"), (None, "No such file")])
def test_command_line_on_a_bad_file(tmp_path, command, content, words):
    if content:
        (tmp_path / "bad.tflite").write_bytes(content)
    done = _python("-m", "tflite_export", command, "bad.tflite", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr and "bad.tflite" in done.stderr
