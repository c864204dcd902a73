"""tfmot as a contender that lives in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from contender import KINDS

_WORKER = pathlib.Path(__file__).with_name("tfmot_worker.py")


class Peer:
    """Has the methods of `contender.Contender`, and `convert`. Use it in a `with`.

    It computes only while a method is waited for, so it never competes with this process for the cores.
    """

    kinds = KINDS

    def __enter__(self) -> "Peer":
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_) -> None:
        self._process.communicate()  # the end of its stdin is the end of the worker

    def prepare(self, net_name: str) -> float:
        return self._ask("prepare", net_name)

    def warm_up(self) -> None:
        self._ask("warm_up")

    def burst(self, kind: str, steps: int) -> float:
        return self._ask("burst", kind, steps)

    def convert(self) -> float:
        return self._ask("convert")

    def _ask(self, *request: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"The tfmot process ended at {request}; its stderr says why. Go without it: --no_peer.")
        return json.loads(answer)
