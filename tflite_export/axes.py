"""Ops on more axes than microcontrollers can, on fewer ones: axes of one, and axes that stay together, need not be told apart.

They stand between two RESHAPEs then, which the ones in front and behind take in (see `optimize.merge_reshapes`).
"""

import dataclasses

import numpy as np

from tflite_export.program import Op, Program, Tensor

_MOST_AXES = 4  # of TensorFlow Lite Micro's STRIDED_SLICE


def with_few_axes(program: Program) -> Program:
    """TRANSPOSE and STRIDED_SLICE of more than four axes are those of fewer."""
    if program.dynamic_batch:
        return program
    program, ops, narrowed = dataclasses.replace(program, tensors=dict(program.tensors)), [], {}
    for op in program.ops:
        rewrite = {"TRANSPOSE": _transposed, "STRIDED_SLICE": _sliced}.get(op.kind)
        is_wide = rewrite is not None and len(program.tensors[op.inputs[0]].shape) > _MOST_AXES
        ops += _between_reshapes(op, program, narrowed, *rewrite(op, program)) if is_wide else [op]
    return dataclasses.replace(program, ops=ops)


def _transposed(op: Op, program: Program) -> tuple:
    """The shapes before and after, and what makes the op on tensors of these."""
    order = program.tensors[op.inputs[1]].data.tolist()
    shape = program.tensors[op.inputs[0]].shape
    order = [axis for axis in order if shape[axis] > 1] or [0]
    groups = [[axis] for axis in order]
    if len(groups) > _MOST_AXES:
        groups = _runs(order, shape)
    in_place = sorted(groups)
    sizes = [_size(group, shape) for group in in_place]
    moved = [in_place.index(group) for group in groups]

    def on_few(source, result) -> Op:
        return Op("TRANSPOSE", [source, _numbers(program, f"{result}/order", moved)], [result], op.options)

    return sizes, [sizes[axis] for axis in moved], on_few


def _runs(order, shape) -> list[list[int]]:
    """Axes that stand one behind the other before and after."""
    groups: list[list[int]] = []
    for axis in order:
        last = groups[-1][-1] if groups else None
        follows = last is not None and last < axis and all(shape[between] == 1 for between in range(last + 1, axis))
        groups[-1].append(axis) if follows else groups.append([axis])
    return groups


def _sliced(op: Op, program: Program) -> tuple:
    options, shape = op.options, program.tensors[op.inputs[0]].shape
    bounds = zip(*(program.tensors[name].data.tolist() for name in op.inputs[1:]), strict=True)
    picked = []
    for axis, (size, (begin, end, step)) in enumerate(zip(shape, bounds, strict=True)):
        begin, end = (
            None if options.get(f"{which}Mask", 0) >> axis & 1 else bound
            for which, bound in (("begin", begin), ("end", end))
        )
        picked.append(range(size)[begin : begin + 1] if _shrinks(op, axis) else range(size)[begin:end:step])
    is_whole = [len(indices) == size for indices, size in zip(picked, shape, strict=True)]
    groups = [[axis] for axis in range(len(shape)) if shape[axis] > 1] or [[0]]
    if len(groups) > _MOST_AXES:  # those beside each other that are taken whole
        merged: list[list[int]] = []
        for (axis,) in groups:
            joins = merged and is_whole[axis] and is_whole[merged[-1][-1]]
            merged[-1].append(axis) if joins else merged.append([axis])
        groups = merged
    picked = [picked[group[0]] if len(group) == 1 else range(_size(group, shape)) for group in groups]

    def on_few(source, result) -> Op:
        names = [
            _numbers(program, f"{result}/{what}", [number(indices) for indices in picked])
            for what, number in (
                ("begin", lambda indices: indices.start),
                ("end", lambda indices: indices[-1] + 1),
                ("step", lambda indices: indices.step),
            )
        ]
        return Op("STRIDED_SLICE", [source, *names], [result], {"beginMask": 0, "endMask": 0, "shrinkAxisMask": 0})

    return [_size(group, shape) for group in groups], list(map(len, picked)), on_few


def _shrinks(op: Op, axis: int) -> bool:
    return bool(op.options.get("shrinkAxisMask", 0) >> axis & 1)


def _size(axes, shape) -> int:
    return int(np.prod([shape[axis] for axis in axes]))


def _between_reshapes(op: Op, program: Program, narrowed: dict, before, after, on_few) -> list[Op]:
    """RESHAPE to the shape `before`, what `on_few` makes of it, which has the shape `after`, and a RESHAPE of that.

    The first one serves all that read the tensor with so few axes: `narrowed` remembers it.
    """
    ops, source, (result,) = [], op.inputs[0], op.outputs
    key = source, tuple(before)
    if key not in narrowed:
        narrowed[key] = _twin(program, source, before, f"{result}/few_axes")
        ops.append(_reshape(program, source, narrowed[key]))
    done = _twin(program, result, after, f"{result}/of_few_axes")
    return [*ops, on_few(narrowed[key], done), _reshape(program, done, result)]


def _twin(program: Program, name: str, shape, twin: str) -> str:
    return program.add(dataclasses.replace(program.tensors[name], name=twin, shape=tuple(shape), data=None))


def _reshape(program: Program, source: str, result: str) -> Op:
    shape = program.tensors[result].shape
    return Op("RESHAPE", [source, _numbers(program, f"{result}/shape", shape)], [result], {"newShape": np.int32(shape)})


def _numbers(program: Program, name: str, numbers) -> str:
    return program.add(Tensor(name, (len(numbers),), "int32", data=np.array(numbers, np.int32), batched=False))
