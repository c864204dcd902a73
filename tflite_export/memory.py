"""The order in which ops run: one that needs few bytes at once, which a microcontroller's arena has to hold."""

import dataclasses
import heapq
import math

import numpy as np

from tflite_export.program import Op, Program, Tensor


def in_frugal_order(program: Program) -> Program:
    """The order that needs fewer bytes: the given one, or of the ops that could run next always the one that leaves least.

    Operations at the same distance from the output run side by side otherwise, and all branches wait for each other.
    """
    frugal = dataclasses.replace(program, ops=_greedily(program))
    candidates = _by_last_use(program), _by_last_use(frugal), program
    return min(candidates, key=lambda each: (planned_bytes(each), bytes_at_once(each)))


def _by_last_use(program: Program) -> Program:
    """With the tensors in the order in which they are done with.

    Of tensors of one size TensorFlow Lite Micro places the last one in the file first. For as long as sizes are equal this
    order needs no more than what is alive at once; others take room for four where three would do.
    """
    lives = _lives(program)
    order = [*sorted(lives, key=lambda name: lives[name][1::-1]), *program.tensors]
    return dataclasses.replace(program, tensors={name: program.tensors[name] for name in dict.fromkeys(order)})


def bytes_at_once(program: Program) -> int:
    """The most bytes of activations that are alive while an op runs: what no plan can do without."""
    lives = list(_lives(program).values())
    change = np.zeros(len(program.ops) + 2, np.int64)
    for first, last, size in lives:
        change[first] += size
        change[last + 1] -= size
    return int(np.cumsum(change).max())


def planned_bytes(program: Program) -> int:
    """What TensorFlow Lite Micro's planner makes of it: the largest tensors first, of equal ones the last in the file, each
    in the lowest gap that holds it.
    """
    lives = _lives(program)
    names = sorted([name for name in program.tensors if name in lives][::-1], key=lambda name: -lives[name][2])
    first, last, size = (np.array([lives[name][index] for name in names]) for index in range(3))
    offset = np.zeros_like(size)
    for place in range(len(names)):
        beside = np.flatnonzero((first[:place] <= last[place]) & (last[:place] >= first[place]))
        end = 0
        for other in beside[np.argsort(offset[beside], kind="stable")]:
            if offset[other] - end >= size[place]:
                break
            end = max(end, offset[other] + size[other])
        offset[place] = end
    return int(max(offset + size, default=0))


def _lives(program: Program) -> dict[str, tuple[int, int, int]]:
    """Each activation's first and last op, and its bytes."""
    sizes = _sizes(program)
    first = dict.fromkeys(program.inputs.values(), 0)
    last = dict(first)
    for place, op in enumerate(program.ops):
        last.update(dict.fromkeys((name for name in (*op.inputs, *op.outputs) if name in sizes), place))
        first.update({name: place for name in op.outputs})
    last.update(dict.fromkeys(program.outputs.values(), len(program.ops)))
    return {name: (first[name], last[name], sizes[name]) for name in last}


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
