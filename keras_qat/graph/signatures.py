"""Signatures of functions, remembered for a while."""

import contextlib
import inspect
import types


@contextlib.contextmanager
def signatures_remembered():
    """Keras asks for the signatures of `__init__`, `build` and `call` of each layer it makes: a sixth of a deep network's
    `quantize`. Inside of this, Python finds each of them once.
    """
    find = {"signature": inspect.signature, "getfullargspec": inspect.getfullargspec}
    known = {}

    def remembering(name):
        def found(function, **options):
            is_method = isinstance(function, types.MethodType)
            if options or not (is_method or isinstance(function, types.FunctionType)):
                return find[name](function, **options)
            key = name, is_method, function.__func__ if is_method else function
            if key not in known:
                known[key] = find[name](function)
            return known[key]

        return found

    try:
        for name in find:
            setattr(inspect, name, remembering(name))
        yield
    finally:
        for name, function in find.items():
            setattr(inspect, name, function)
