"""The rim of a program: QUANTIZE and DEQUANTIZE at its inputs and outputs, where a user wants uint8 or float32 there."""

import dataclasses

from tflite_export.program import Op, Program, Tensor

IO_TYPES = ("int8", "uint8", "float32")


def with_io_types(program: Program, input_type="int8", output_type="int8") -> Program:
    """Returns `program` with its quantized inputs and outputs as `input_type` and `output_type`: names, or numpy's or
    TensorFlow's types.

    uint8 keeps the integers and shifts them by 128. Inputs and outputs that are not int8 (indices, say) stay as they are.
    """
    input_type, output_type = _name_of(input_type), _name_of(output_type)
    for name, value in (("input_type", input_type), ("output_type", output_type)):
        if value not in IO_TYPES:
            raise ValueError(
                f"{name} is one of {', '.join(map(repr, IO_TYPES))}, or a type object like np.uint8. Received: {value!r}"
            )
    if input_type == output_type == "int8":
        return program
    result = dataclasses.replace(
        program,
        tensors=dict(program.tensors),
        inputs=dict(program.inputs),
        outputs=dict(program.outputs),
    )
    before, after = [], []
    for key, name in program.inputs.items():
        outer = _outer(result, name, input_type)
        if outer is not None:
            result.inputs[key] = outer
            before.append(Op("QUANTIZE", [outer], [name]))
    for key, name in program.outputs.items():
        outer = _outer(result, name, output_type)
        if outer is not None:
            result.outputs[key] = outer
            after.append(Op("DEQUANTIZE" if output_type == "float32" else "QUANTIZE", [name], [outer]))
    result.ops = before + program.ops + after
    return result


def _name_of(dtype) -> str:
    """The name of an element type: "uint8" for `np.uint8`, `np.dtype("uint8")` and `tf.uint8`."""
    return dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", dtype))


def _outer(program: Program, name: str, dtype: str) -> str | None:
    """Adds the tensor that stands outside of `name`, or returns None where there is nothing to change."""
    inner = program.tensors[name]
    if inner.dtype != "int8" or dtype == "int8":
        return None
    outer = Tensor(f"{name}_{dtype}", inner.shape, dtype)
    if dtype == "uint8":
        outer.scale, outer.zero_point = inner.scale, inner.zero_point + 128
    return program.add(outer)
