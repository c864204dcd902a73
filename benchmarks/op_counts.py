"""How lean our files are: op list, latency and arena beside those of TFLiteConverter's int8 PTQ of the same float model.

    python benchmarks/op_counts.py [--models=ResNet50 --models=cifar]

All of keras.applications that the project promises, the nets of the benchmarks and of the tests, with random weights and
statistics of batch norms (fresh ones add nothing, which saves the converter their op) and calibrated on noise. Latency is LiteRT with XNNPACK on one thread, the two files in turn; the arena is what TensorFlow Lite
Micro allocates. Each network has a process of its own, which gives all of its memory back.
"""

import collections
import contextlib
import dataclasses
import io
import pathlib
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import keras
import numpy as np
from absl import app, flags
from ai_edge_litert.interpreter import Interpreter
from isolated import in_own_process
from nets import NETS, u_net
from printout import default_out, heading, publish, write

import keras_qat as kq
import tflite_export
from tflite_export.runtimes import run
from tflite_export.table import table

_ROOT = pathlib.Path(__file__).parents[1]
# The root too: the processes started below would take tests/keras_qat for the package where that is installed as editable.
sys.path += [str(_ROOT), str(_ROOT / "tests")]
from cases import with_lively_batch_norms  # noqa: E402
from models import STYLES, converted  # noqa: E402

_SIZE, _CLASSES, _SAMPLES = 96, 10, 8
_BURST = 0.05  # seconds that one file runs before it is the other one's turn


@dataclasses.dataclass(frozen=True)
class Network:
    """A float model, the range of the noise it is calibrated with, and rules for `kq.quantize`."""

    build: Callable[[], keras.Model]
    low: float = -1.0
    high: float = 1.0
    rules: tuple[kq.Rule, ...] = ()


def _application(name: str, high: float = 1.0) -> Network:
    build = getattr(keras.applications, name)
    shape = (_SIZE, _SIZE, 3)
    return Network(lambda: build(input_shape=shape, weights=None, classes=_CLASSES), 0.0 if high > 1 else -1.0, high)


def _u_net() -> keras.Model:
    return u_net(keras, (_SIZE, _SIZE, 3), is_bilinear=True)


# Batch norms that stand alone as one op with a scale for each channel, instead of MUL and ADD: quicker, in more arena.
_PER_CHANNEL = (kq.Rule("*", kq.Scheme(per_channel_norms=True)),)
_EXACT_UPSAMPLING = (kq.Rule("*", kq.Scheme(exact_upsampling=True)),)
_PIXELS = 255.0  # these rescale pixels themselves
MODELS = {
    **{
        name: _application(name)
        for name in (
            *("VGG16", "ResNet50", "ResNet50V2", "InceptionV3", "InceptionResNetV2", "Xception"),
            *("MobileNet", "MobileNetV2", "DenseNet121", "NASNetMobile"),
        )
    },
    **{
        name: _application(name, _PIXELS)
        for name in ("MobileNetV3Small", "MobileNetV3Large", "EfficientNetB0", "EfficientNetV2B0", "ConvNeXtTiny")
    },
    **{
        f"{name}, per channel": dataclasses.replace(_application(name), rules=_PER_CHANNEL)
        for name in ("ResNet50V2", "DenseNet121", "NASNetMobile")
    },
    "U-Net": Network(_u_net),
    "U-Net, exact upsampling": Network(_u_net, rules=_EXACT_UPSAMPLING),
    **{name: Network(lambda net=net: net.build(keras)) for name, net in NETS.items()},
    **{name: Network(style) for name, style in STYLES.items()},
}

_MODELS = flags.DEFINE_multi_enum("models", list(MODELS), list(MODELS), "Networks to measure; give it once for each.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 31, "Rounds of latency, in each of which both files have a turn.", lower_bound=3
)
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the text goes.")

_COLUMNS = ("network", "ops", "PTQ", "", "ms", "PTQ", "ratio", "25 %", "75 %", "", "arena", "PTQ", "", "s", "PTQ")


@dataclasses.dataclass
class File:
    """A file and what was measured of it.

    Args:
        content: Its bytes.
        seconds: What it took to make it.
        ops: How often it has each op.
        milliseconds: Of one inference, a number per round.
        arena: Bytes that TensorFlow Lite Micro allocates for it.
        reason: Why there is no file.
        no_arena: Why there is no arena.
    """

    content: bytes = b""
    seconds: float = 0.0
    ops: dict[str, int] = dataclasses.field(default_factory=dict)
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    arena: int | None = None
    reason: str = ""
    no_arena: str = ""


# --- one network, in a process of its own ----------------------------------------------------------------------------


def measure(name: str, rounds: int) -> tuple[File, File]:
    """Our file and TFLiteConverter's, made of the same float model with the same data."""
    keras.utils.set_random_seed(0)
    network = MODELS[name]
    model = with_lively_batch_norms(network.build())
    generator = np.random.default_rng(0)
    inputs = model.inputs if hasattr(model, "inputs") else kq.quantize(model).inputs
    shapes = [(_SAMPLES, *x.shape[1:]) for x in inputs]
    samples = [generator.uniform(network.low, network.high, shape).astype("float32") for shape in shapes]
    files = [_file(lambda *args: _ours(*args, network.rules), model, samples), _file(_theirs, model, samples)]
    _take_turns([file for file in files if not file.reason], rounds)
    return tuple(dataclasses.replace(file, content=b"") for file in files)


def _file(make: Callable, model: keras.Model, samples: list[np.ndarray]) -> File:
    try:
        content, seconds = make(model, samples)
    except Exception as error:  # whatever it is, the table says it
        return File(reason=_in_short(error))
    return File(content, seconds, tflite_export.inspect(content).op_counts, [], *_arena(content))


def _ours(model: keras.Model, samples: list[np.ndarray], rules: tuple[kq.Rule, ...]) -> tuple[bytes, float]:
    """The file, and the seconds of quantize, freeze and write."""
    start = time.perf_counter()
    qat = kq.quantize(model, rules=rules)
    seconds = time.perf_counter() - start
    kq.calibrate(qat, keras.tree.pack_sequence_as(qat._inputs_struct, samples))
    start = time.perf_counter()
    content = tflite_export.write(kq.freeze(qat))
    seconds += time.perf_counter() - start
    summary = tflite_export.inspect(content)
    assert summary.is_full_int8, summary.reasons
    return content, seconds


def _theirs(model: keras.Model, samples: list[np.ndarray]) -> tuple[bytes, float]:
    if len(samples) > 1:
        raise ValueError("converted() of tests/models.py takes models of one input")
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # Keras describes the SavedModel that the converter goes through
        content = converted(model, samples[0])
    return content, time.perf_counter() - start


def _arena(content: bytes) -> tuple[int | None, str, str]:
    """The arena, or why there is none. There are no samples, so nothing runs: allocating is what tells."""
    ports = tflite_export.inspect(content).inputs
    try:
        result = run("tflm", content, [np.zeros((0, *port.tensor.shape[1:]), port.tensor.dtype) for port in ports])
    except RuntimeError as error:
        missing = re.search(r"Didn't find op for builtin opcode '(\w+)'", str(error))
        return None, "", f"TFLM has no {missing[1]}" if missing else _in_short(error)
    return result.arena_bytes, "", ""


def _take_turns(files: list[File], rounds: int) -> None:
    """Measures the latency of the files in turn.

    The interpreter that is made first is up to 2 % slower, by where its memory lies, also beside a second one of the same
    file. So there are two of each file, made in either order, and in each round the other two have their turns.
    """
    pairs = [[_Runner(file) for file in files], [_Runner(file) for file in files[::-1]]]
    for turn in range(rounds):
        runners = pairs[turn % 2]
        for runner in runners:
            runner.burst()
        runners.reverse()  # a machine that gets slower or faster favours nobody


class _Runner:
    """A file in LiteRT with XNNPACK on one thread."""

    def __init__(self, file: File):
        self.file = file
        self.interpreter = Interpreter(model_content=file.content, num_threads=1)
        self.interpreter.allocate_tensors()
        for details in self.interpreter.get_input_details():
            self.interpreter.set_tensor(details["index"], np.ones(details["shape"], details["dtype"]))
        self._seconds(1)
        self.repeats = max(1, int(_BURST / self._seconds(3)))

    def _seconds(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            self.interpreter.invoke()
        return (time.perf_counter() - start) / repeats

    def burst(self) -> None:
        self.file.milliseconds.append(1e3 * self._seconds(self.repeats))


def _in_short(error: Exception) -> str:
    lines = [line.strip(" -\0") for line in str(error).splitlines()]
    lines = [line for line in lines if line] or [""]
    # Ours names the layers in the lines behind the first, TFLiteConverter the cause in its last.
    telling = lines[1] if isinstance(error, kq.UnsupportedModelError) and len(lines) > 1 else lines[-1]
    return f"{type(error).__name__}: {telling[:150]}"


# --- all of them -----------------------------------------------------------------------------------------------------


def measured(name: str, rounds: int) -> tuple[File, File]:
    """`measure` in a fresh process; one network shall not take the others' results with it."""
    try:
        return in_own_process(measure, name, rounds)
    except BrokenProcessPool:
        lost = File(reason="its process died (out of memory?)")
    except Exception as error:
        lost = File(reason=_in_short(error))
    return lost, lost


def row(name: str, ours: File, theirs: File) -> tuple:
    """A line of the table of figures."""
    return (name, *_counts(ours, theirs), *_latencies(ours, theirs), *_arenas(ours, theirs), *_times(ours, theirs))


def _counts(ours: File, theirs: File) -> tuple:
    ours_count, theirs_count = (sum(file.ops.values()) for file in (ours, theirs))
    return (ours_count or "-", theirs_count or "-", _verdict(ours_count, theirs_count))


def _latencies(ours: File, theirs: File) -> tuple:
    medians = [f"{np.median(file.milliseconds):.3f}" if file.milliseconds else "-" for file in (ours, theirs)]
    if not (ours.milliseconds and theirs.milliseconds):
        return (*medians, "-", "-", "-", "-")
    lower, ratio, upper = np.percentile(np.divide(ours.milliseconds, theirs.milliseconds), (25, 50, 75))
    return (*medians, f"{ratio:.3f}", f"{lower:.3f}", f"{upper:.3f}", "held" if lower <= 1 else "missed")


def _arenas(ours: File, theirs: File) -> tuple:
    return (ours.arena or "-", theirs.arena or "-", _verdict(ours.arena, theirs.arena))


def _times(ours: File, theirs: File) -> tuple:
    return tuple(f"{file.seconds:.1f}" if file.seconds else "-" for file in (ours, theirs))


def _verdict(ours: int | None, theirs: int | None) -> str:
    if not ours or not theirs:
        return "-"
    return "held" if ours <= theirs else "missed"


def op_lists(name: str, ours: File, theirs: File) -> tuple[str, ...]:
    """What both have, and what one has more of than the other."""
    counts = [collections.Counter(file.ops) for file in (ours, theirs)]
    if ours.reason or theirs.reason:
        return (name, *(file.reason or _listed(count) for file, count in zip((ours, theirs), counts, strict=True)), "")
    return (name, _listed(counts[0] - counts[1]), _listed(counts[1] - counts[0]), _listed(counts[0] & counts[1]))


def _listed(counts: collections.Counter) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "-"


def text_of(results: dict[str, tuple[File, File]], rounds: int) -> str:
    """The tables, and what is missing from them."""
    title = "Our files beside those of TFLiteConverter's int8 PTQ: ops, latency (LiteRT, XNNPACK), TFLM arena"
    settings = (
        f"applications at {_SIZE}×{_SIZE}, random weights and batch norms, calibrated with {_SAMPLES} samples of noise; latency on one "
        f"thread, {rounds} rounds of {1e3 * _BURST:.0f} ms for each file"
    )
    figures = table(_COLUMNS, [row(name, *files) for name, files in results.items()])
    lists = table(
        ("network", "only ours", "only PTQ", "both"), [op_lists(name, *files) for name, files in results.items()]
    )
    gaps = [
        f"  {name}, {whose}: {file.no_arena}"
        for name, files in results.items()
        for whose, file in zip(("ours", "PTQ"), files, strict=True)
        if file.no_arena
    ]
    explanation = (
        "ms: medians. ratio: ours / PTQ within a round, with quartiles; held where the lower one is not above 1. "
        "arena: bytes.\ns: seconds for quantize, freeze and write; for convert."
    )
    parts = [heading(title, settings, with_peer=False), figures, explanation, lists]
    return "\n\n".join(parts + (["No arena:\n" + "\n".join(gaps)] if gaps else []))


def main(_) -> None:
    results = {}
    for name in _MODELS.value:
        results[name] = measured(name, _ROUNDS.value)
        print(f"  {name}: {results[name][0].reason or 'done'}", flush=True)
        write(text_of(results, _ROUNDS.value), _OUT.value)  # so far: all of them take half an hour
    publish(text_of(results, _ROUNDS.value), _OUT.value)


if __name__ == "__main__":
    app.run(main)
