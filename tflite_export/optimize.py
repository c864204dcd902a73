"""Program → leaner program with the same integers: each rewrite is one function in `REWRITES`."""

import dataclasses

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export.axes import with_few_axes
from tflite_export.memory import in_frugal_order
from tflite_export.program import Op, Program, Tensor, unique_name
from tflite_export.slices import crop_before_padding, is_alone, merge_slices

_REDUCTIONS = ("MEAN", "REDUCE_MAX", "REDUCE_MIN")


def optimize(program: Program) -> Program:
    """Applies all rewrites, in order, and drops the tensors that nothing uses any more."""
    for rewrite in REWRITES:
        program = rewrite(program)
    return _without_unused_tensors(program)


def merge_reshapes(program: Program) -> Program:
    """RESHAPE of a RESHAPE reads the first one's input; a RESHAPE to the shape that is there already vanishes."""
    producers, tensors = program.producers(), program.tensors
    ops, renamed = [], {}
    for op in program.ops:
        op = dataclasses.replace(op, inputs=[renamed.get(name, name) for name in op.inputs])
        if op.kind == "RESHAPE":
            before = producers.get(op.inputs[0])
            while before is not None and before.kind == "RESHAPE":
                source = renamed.get(before.inputs[0], before.inputs[0])
                op.inputs[0], before = source, producers.get(source)
            is_output = op.outputs[0] in program.outputs.values()
            if tensors[op.inputs[0]].shape == tensors[op.outputs[0]].shape and not is_output:
                renamed[op.outputs[0]] = op.inputs[0]
                continue
        ops.append(op)
    return dataclasses.replace(program, ops=ops).without_unread_ops()


def keep_reduced_axes(program: Program) -> Program:
    """A reduction keeps its axes as ones itself where a RESHAPE behind it does nothing but bring them back."""
    producers, consumers, tensors, ops = program.producers(), program.consumers(), program.tensors, []
    for op in program.ops:
        before = producers.get(op.inputs[0])
        if op.kind == "RESHAPE" and is_alone(before, _REDUCTIONS, program, consumers):
            shape = list(tensors[before.inputs[0]].shape)
            for axis in np.ravel(tensors[before.inputs[1]].data):
                shape[axis] = 1
            if tuple(shape) == tensors[op.outputs[0]].shape:
                op = dataclasses.replace(before, outputs=op.outputs, options={**before.options, "keepDims": True})
        ops.append(op)
    return dataclasses.replace(program, ops=ops).without_unread_ops()


def fold_pads(program: Program) -> Program:
    """PAD in front of unpadded convolutions becomes their SAME padding where that pads exactly alike for all of them."""
    consumers, producers = program.consumers(), program.producers()
    ops = []
    for op in program.ops:
        before = producers.get(op.inputs[0])
        if before is not None and before.kind == "PAD":
            if all(_pads_like_same(reader, before, program) for reader in consumers[before.outputs[0]]):
                op = dataclasses.replace(
                    op,
                    inputs=[before.inputs[0], *op.inputs[1:]],
                    options={**op.options, "padding": schema.Padding.SAME},
                )
        ops.append(op)
    return dataclasses.replace(program, ops=ops).without_unread_ops()


def center_before_convolution(program: Program) -> Program:
    """PADV2 in front of such convolutions becomes an ADD: the same integers, with the border's for the zero point.

    Then SAME pads with it, and XNNPACK, which has no PADV2, computes all of it.
    """
    consumers, producers, tensors = program.consumers(), program.producers(), dict(program.tensors)
    ops, centered = [], {}
    for op in program.ops:
        pad = producers.get(op.inputs[0])
        if pad is not None and pad.kind == "PADV2" and pad.outputs[0] not in program.outputs.values():
            given, border = tensors[pad.inputs[0]], int(np.ravel(tensors[pad.inputs[2]].data)[0])
            moved = given.zero_point - border
            readers = consumers[pad.outputs[0]]
            fits = -128 <= moved <= 127 and all(
                _pads_like_same(x, pad, program) and x.inputs[2] is not None for x in readers
            )
            if fits and pad.outputs[0] not in centered:
                name = centered[pad.outputs[0]] = unique_name(f"{pad.inputs[0]}/centered", tensors)
                tensors[name] = dataclasses.replace(given, name=name, zero_point=border)
                number = Tensor(f"{name}/constant", (1,), given.dtype, given.scale, data=np.array([moved], given.dtype))
                tensors[number.name] = dataclasses.replace(number, batched=False)
                fused = {"fusedActivationFunction": schema.ActivationFunctionType.NONE}
                ops.append(Op("ADD", [pad.inputs[0], number.name], [name], fused))
            if fits:
                weights, bias = (tensors[name] for name in op.inputs[1:3])
                axes = (0, 1, 2) if op.kind == "DEPTHWISE_CONV_2D" else (1, 2, 3)
                sums = np.sum(weights.data, axis=axes, dtype=np.int64)
                # The border counted as so many steps from zero; now it is zero, and everything else counts from there.
                name = unique_name(f"{bias.name}/centered", tensors)
                tensors[name] = dataclasses.replace(bias, name=name, data=(bias.data - moved * sums).astype("int32"))
                inputs = [centered[pad.outputs[0]], op.inputs[1], name]
                op = dataclasses.replace(op, inputs=inputs, options={**op.options, "padding": schema.Padding.SAME})
        ops.append(op)
    return dataclasses.replace(program, ops=ops, tensors=tensors).without_unread_ops()


def _pads_like_same(op: Op, pad: Op, program: Program) -> bool:
    tensors, options = program.tensors, op.options
    if op.kind not in ("CONV_2D", "DEPTHWISE_CONV_2D") or options["padding"] != schema.Padding.VALID:
        return False
    expected = [[0, 0]]
    for axis, letter in ((1, "H"), (2, "W")):
        size, result = tensors[pad.inputs[0]].shape[axis], tensors[op.outputs[0]].shape[axis]
        stride, dilation = options[f"stride{letter}"], options[f"dilation{letter}Factor"]
        if result != -(-size // stride):
            return False
        reach = (tensors[op.inputs[1]].shape[axis] - 1) * dilation + 1
        total = max((result - 1) * stride + reach - size, 0)
        expected.append([total // 2, total - total // 2])
    return np.array_equal(tensors[pad.inputs[1]].data, [*expected, [0, 0]])


def flatten_for_fully_connected(program: Program) -> Program:
    """FULLY_CONNECTED flattens what it reads itself: a RESHAPE that only prepares that is not needed."""
    producers, tensors = program.producers(), program.tensors
    ops = []
    for op in program.ops:
        before = producers.get(op.inputs[0])
        if op.kind == "FULLY_CONNECTED" and before is not None and before.kind == "RESHAPE":
            wide, flat = tensors[before.inputs[0]].shape, tensors[before.outputs[0]].shape
            if len(flat) == 2 and len(wide) == 4 and wide[1:3] == (1, 1):
                op = dataclasses.replace(op, inputs=[before.inputs[0], *op.inputs[1:]])
        ops.append(op)
    return dataclasses.replace(program, ops=ops).without_unread_ops()


def merge_transposes(program: Program) -> Program:
    """A TRANSPOSE of a TRANSPOSE is one of the first one's input; one that moves nothing vanishes."""
    producers, tensors = program.producers(), dict(program.tensors)
    ops, renamed = [], {}
    for op in program.ops:
        op = dataclasses.replace(op, inputs=[renamed.get(name, name) for name in op.inputs])
        if op.kind == "TRANSPOSE":
            order, before = tensors[op.inputs[1]].data, producers.get(op.inputs[0])
            if before is not None and before.kind == "TRANSPOSE":
                order = tensors[before.inputs[1]].data[order]
                twin = dataclasses.replace(tensors[op.inputs[1]], data=order, name=f"{op.inputs[1]}/merged")
                tensors[twin.name] = twin
                op.inputs = [renamed.get(before.inputs[0], before.inputs[0]), twin.name]
                producers[op.outputs[0]] = op
            if np.array_equal(order, np.arange(len(order))) and op.outputs[0] not in program.outputs.values():
                renamed[op.outputs[0]] = op.inputs[0]
                continue
        ops.append(op)
    return dataclasses.replace(program, ops=ops, tensors=tensors).without_unread_ops()


def transpose_in_matmul(program: Program) -> Program:
    """BATCH_MATMUL can read its second factor with the last two axes swapped, behind a QUANTIZE of that factor too."""
    producers, tensors = program.producers(), dict(program.tensors)
    ops = []
    for op in program.ops:
        before = producers.get(op.inputs[1]) if op.kind == "BATCH_MATMUL" else None
        quantize = before if before is not None and before.kind == "QUANTIZE" else None
        if quantize is not None:
            before = producers.get(quantize.inputs[0])
        if before is not None and _swaps_last_axes(before, tensors) and not op.options.get("adjY"):
            factor = before.inputs[0]
            if quantize is not None:
                twin = dataclasses.replace(
                    tensors[quantize.outputs[0]], name=f"{op.outputs[0]}/swapped", shape=tensors[factor].shape
                )
                tensors[twin.name] = twin
                ops.append(dataclasses.replace(quantize, inputs=[factor], outputs=[twin.name]))
                factor = twin.name
            op = dataclasses.replace(op, inputs=[op.inputs[0], factor], options={**op.options, "adjY": True})
        ops.append(op)
    return dataclasses.replace(program, ops=ops, tensors=tensors).without_unread_ops()


def _swaps_last_axes(op: Op, tensors) -> bool:
    if op.kind != "TRANSPOSE":
        return False
    order = tensors[op.inputs[1]].data.tolist()
    return order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def drop_zero_biases(program: Program) -> Program:
    """FULLY_CONNECTED does without a bias that is zero everywhere."""
    ops = []
    for op in program.ops:
        if op.kind == "FULLY_CONNECTED" and op.inputs[2] is not None and not np.any(program.tensors[op.inputs[2]].data):
            op = dataclasses.replace(op, inputs=[*op.inputs[:2], None])
        ops.append(op)
    return dataclasses.replace(program, ops=ops)


def share_numbers(program: Program) -> Program:
    """Equal axes, paddings and bounds of slices are one tensor: TensorFlow Lite Micro keeps some bytes for each."""
    kept, renamed = {}, {}
    for name, tensor in program.tensors.items():
        if tensor.is_constant and not tensor.scale and tensor.dtype == "int32":
            renamed[name] = kept.setdefault((tensor.shape, tensor.batched, tensor.data.tobytes()), name)
    ops = [dataclasses.replace(op, inputs=[renamed.get(name, name) for name in op.inputs]) for op in program.ops]
    return dataclasses.replace(program, ops=ops)


REWRITES = (
    with_few_axes,
    merge_reshapes,
    keep_reduced_axes,
    merge_transposes,
    transpose_in_matmul,
    merge_slices,
    crop_before_padding,
    fold_pads,
    center_before_convolution,
    flatten_for_fully_connected,
    drop_zero_biases,
    share_numbers,
    in_frugal_order,
)


def _without_unused_tensors(program: Program) -> Program:
    used = {*program.inputs.values(), *program.outputs.values()}
    for op in program.ops:
        used.update(op.inputs, op.outputs)
    return dataclasses.replace(program, tensors={k: v for k, v in program.tensors.items() if k in used})
