"""The order in which ops run: one that needs few bytes at once, which a microcontroller's arena has to hold."""

import dataclasses
import heapq
import math

import numpy as np

from tflite_export.program import Op, Program, Tensor


def in_frugal_order(program: Program) -> Program:
    """Of the ops that could run next always the one that leaves the fewest bytes behind; if that needs less at its peak.

    Operations at the same distance from the output run side by side otherwise, and all branches wait for each other.
    """
    frugal = dataclasses.replace(program, ops=_greedily(program))
    return frugal if bytes_at_once(frugal) < bytes_at_once(program) else program


def bytes_at_once(program: Program) -> int:
    """The most bytes of activations that are alive while an op runs."""
    sizes, last_read = _sizes(program), {}
    for place, op in enumerate(program.ops):
        last_read.update(dict.fromkeys(op.inputs, place))
    last_read.update(dict.fromkeys(program.outputs.values(), len(program.ops)))
    alive = sum(sizes[name] for name in set(program.inputs.values()))
    most = alive
    for place, op in enumerate(program.ops):
        alive += sum(sizes[name] for name in op.outputs)
        most = max(most, alive)
        done = {name for name in (*op.inputs, *op.outputs) if name in sizes and last_read.get(name, place) == place}
        alive -= sum(sizes[name] for name in done)
    return most


def _greedily(program: Program) -> list[Op]:
    sizes, readers = _sizes(program), program.consumers()
    written = {name for op in program.ops for name in op.outputs}
    awaited = [{name for name in op.inputs if name in written} for op in program.ops]
    places = {id(op): place for place, op in enumerate(program.ops)}
    waiting = {name: {places[id(op)] for op in readers[name]} for name in sizes}
    kept, order = set(program.outputs.values()), []

    def growth(place: int) -> tuple[int, int]:
        op = program.ops[place]
        freed = {name for name in op.inputs if waiting.get(name) == {place} and name not in kept}
        return sum(sizes[name] for name in op.outputs) - sum(sizes[name] for name in freed), place

    ready = [growth(place) for place, names in enumerate(awaited) if not names]
    heapq.heapify(ready)
    done = set()
    while ready:
        _, place = heapq.heappop(ready)
        if place in done:
            continue
        done.add(place)
        op = program.ops[place]
        order.append(op)
        for name in {name for name in op.inputs if name in sizes}:
            waiting[name].discard(place)
            if len(waiting[name]) == 1:  # whoever is last frees it: it stands in the heap once more, further in front
                (last,) = waiting[name]
                if not awaited[last]:
                    heapq.heappush(ready, growth(last))
        for name in op.outputs:
            for reader in waiting[name]:
                awaited[reader].discard(name)
                if not awaited[reader]:
                    heapq.heappush(ready, growth(reader))
    return order


def _sizes(program: Program) -> dict[str, int]:
    """The bytes of each activation."""
    return {name: _bytes_of(tensor) for name, tensor in program.tensors.items() if not tensor.is_constant}


def _bytes_of(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
