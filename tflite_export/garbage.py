"""Python's search for garbage, put off."""

import contextlib
import gc


@contextlib.contextmanager
def garbage_left():
    """Looking for garbage among all that TensorFlow holds, again and again, takes a third of the time of a rewrite."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()
