"""What only picks some rows and columns is done early and in one go: the tensors behind it are smaller."""

import dataclasses

import numpy as np

from tflite_export.program import Op, Program, Tensor


def merge_slices(program: Program) -> Program:
    """A slice of a slice is one slice; so is a pool over single pixels, behind one, that skips some of them."""
    producers, consumers = program.producers(), program.consumers()
    program, ops = dataclasses.replace(program, tensors=dict(program.tensors)), []
    for op in program.ops:
        before, picked = producers.get(op.inputs[0]), _picked(op, program)
        if picked is not None and is_alone(before, ("STRIDED_SLICE",), program, consumers):
            first = _picked(before, program)
            if first is not None:
                both = [one[other.start : other.stop : other.step] for one, other in zip(first, picked, strict=True)]
                op = producers[op.outputs[0]] = _slice(program, before.inputs[0], both, op.outputs[0])
        ops.append(op)
    return dataclasses.replace(program, ops=ops).without_unread_ops()


def crop_before_padding(program: Program) -> Program:
    """A PAD that a slice takes a part of: first the slice of what is there, then what is left of the padding."""
    producers, consumers = program.producers(), program.consumers()
    program, ops = dataclasses.replace(program, tensors=dict(program.tensors)), []
    for op in program.ops:
        before, picked = producers.get(op.inputs[0]), _picked(op, program)
        if picked is not None and is_alone(before, ("PAD", "PADV2"), program, consumers):
            ops += _turned_around(before, op, picked, program)
        else:
            ops.append(op)
    return dataclasses.replace(program, ops=ops).without_unread_ops()


def is_alone(producer: Op | None, kinds: tuple[str, ...], program: Program, consumers) -> bool:
    """Whether an op of one of these kinds writes for one reader only."""
    if producer is None or producer.kind not in kinds:
        return False
    (result,) = producer.outputs
    return len(consumers[result]) == 1 and result not in program.outputs.values()


def _picked(op: Op, program: Program) -> list[range] | None:
    """The indices of each axis that go into the result, if picking them is all that the op does."""
    options = op.options
    if op.kind == "STRIDED_SLICE":
        masks = [options.get(f"{which}Mask", 0) for which in ("begin", "end", "shrinkAxis")]
        if masks != [1, 1, 0]:
            return None
        shape = program.tensors[op.inputs[0]].shape
        bounds = zip(*(program.tensors[name].data.tolist() for name in op.inputs[1:]), strict=True)
        picked = [range(size)[slice(*bound)] for size, bound in zip(shape, bounds, strict=True)]
        return picked if all(picked) else None
    if op.kind in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        if (options["filterHeight"], options["filterWidth"]) != (1, 1) or options.get("fusedActivationFunction"):
            return None
        shape, steps = program.tensors[op.inputs[0]].shape, (1, options["strideH"], options["strideW"], 1)
        return [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    return None


def _slice(program: Program, source: str, picked: list[range], output: str) -> Op:
    """The STRIDED_SLICE that picks these indices; the batch is taken whole, however large."""
    bounds = {
        "begin": [indices.start for indices in picked],
        "end": [indices[-1] + 1 for indices in picked],
        "step": [indices.step for indices in picked],
    }
    names = [
        program.add(
            Tensor(f"{output}/{what}", (len(picked),), "int32", data=np.array(numbers, np.int32), batched=False)
        )
        for what, numbers in bounds.items()
    ]
    return Op("STRIDED_SLICE", [source, *names], [output], {"beginMask": 1, "endMask": 1, "shrinkAxisMask": 0})


def _turned_around(pad: Op, op: Op, picked: list[range], program: Program) -> list[Op]:
    """The slice, then the PAD; or whichever of them is left; or the op alone where it picks nothing but padding."""
    source, (output,) = program.tensors[pad.inputs[0]], op.outputs
    pads, inside = [], []
    paddings = program.tensors[pad.inputs[1]].data.tolist()
    for size, (before, _), indices in zip(source.shape, paddings, picked, strict=True):
        real = [place for place, index in enumerate(indices) if before <= index < before + size]
        if not real:
            return [op]
        pads.append([real[0], len(indices) - 1 - real[-1]])
        inside.append(range(indices[real[0]] - before, indices[real[-1]] - before + 1, indices.step))
    if not np.any(pads):
        return [_slice(program, source.name, inside, output)]
    ops, begun = [], source.name
    if any(len(indices) != size for indices, size in zip(inside, source.shape, strict=True)):
        cropped = dataclasses.replace(source, name=f"{output}/cropped", shape=tuple(map(len, inside)))
        begun = program.add(cropped)
        ops = [_slice(program, source.name, inside, begun)]
    left = Tensor(f"{output}/paddings", (len(pads), 2), "int32", data=np.array(pads, np.int32), batched=False)
    return [*ops, Op(pad.kind, [begun, program.add(left), *pad.inputs[2:]], [output], pad.options)]
