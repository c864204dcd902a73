"""Loops of keras.ops whose number of turns is known: their turns, one behind the other."""

import keras
from keras import ops


def _fori_loop(operation, args, kwargs):
    bounds = operation.lower, operation.upper
    if any(isinstance(bound, keras.KerasTensor) for bound in bounds):
        return None

    def loop(value):
        for turn in range(*map(int, bounds)):
            value = operation.body_fun(turn, value)
        return value

    return loop


def _scan(operation, args, kwargs):
    """Over an axis in front of the batch's."""
    length = operation.length or (len(args) > 2 and args[2] is not None and args[2].shape[0])
    if not length:
        return None

    def scan(step, carry, xs=None):
        turns, results = range(int(length)), {}
        for turn in reversed(turns) if operation.reverse else turns:
            carry, results[turn] = step(carry, None if xs is None else xs[turn])
        return carry, ops.stack([results[turn] for turn in turns], axis=0)

    return scan


RULES = {"ops.ForiLoop": _fori_loop, "ops.Scan": _scan}
