"""What every benchmark prints above its table, and where the text goes."""

import datetime
import os
import pathlib
import platform
from importlib import metadata

import keras_qat as kq

_OURS = ("keras", "tensorflow", "ai-edge-litert")
_PEERS = ("tf_keras", "tensorflow-model-optimization")
_LOAD = os.getloadavg()[0]  # before the benchmark adds its own


def heading(title: str, settings: str, with_peer: bool) -> str:
    """The lines that make the figures below comparable: when, with what, on what machine, how measured."""
    packages = _OURS + (_PEERS if with_peer else ())
    versions = [f"python {platform.python_version()}", f"keras_qat {kq.__version__}"]
    versions += [f"{name} {metadata.version(name)}" for name in packages]
    lines = {
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(versions),
        "machine": f"{os.cpu_count()} cores, {_cpu_model()}, load {_LOAD:.1f} at the start",
        "settings": settings,
    }
    return "\n".join([title, *(f"  {name:<9} {value}" for name, value in lines.items())])


def default_out(script: str) -> str:
    """benchmarks/results/<script>.txt"""
    path = pathlib.Path(script)
    return str(path.with_name("results") / f"{path.stem}.txt")


def publish(text: str, out: str) -> None:
    """Prints the text and keeps it in a file."""
    print(text)
    write(text, out)


def write(text: str, out: str) -> None:
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _cpu_model() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
