"""A process of its own for each thing that is measured: it begins fresh, gives its memory back, and may die alone."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable


def in_own_process(function: Callable, *arguments):
    """What `function(*arguments)` returns or raises, computed in a fresh process."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
