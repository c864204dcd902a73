"""One operation on its way into a program."""

import dataclasses

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import Op, Program, Tensor

_ACTIVATIONS = {
    None: schema.ActivationFunctionType.NONE,
    "RELU": schema.ActivationFunctionType.RELU,
    "RELU6": schema.ActivationFunctionType.RELU6,
}

PADDINGS = {"same": schema.Padding.SAME, "valid": schema.Padding.VALID}

PIXEL_BY_PIXEL = {
    "padding": schema.Padding.VALID,
    "strideH": 1,
    "strideW": 1,
    "dilationHFactor": 1,
    "dilationWFactor": 1,
    "depthMultiplier": 1,
}


@dataclasses.dataclass
class Call:
    """One operation on its way into a program.

    Args:
        program: Where it goes.
        operation: The Keras layer or operation; of a `Quantized` the layer inside.
        node: Its node in the QAT model.
        inputs: Names of the integer tensors it reads.
        output: Name of the tensor it writes.
        activation: None, "RELU" or "RELU6", fused.
        portable: Only ops that TensorFlow Lite Micro has too.
        weights: The `IntegerWeights` of a `Quantized`, or what the `integers` of another layer returned.
    """

    program: Program
    operation: object
    node: object
    inputs: list[str]
    output: str
    activation: str | None = None
    weights: object = None
    portable: bool = False

    def shape(self, name: str) -> tuple[int, ...]:
        return self.program.tensors[name].shape

    @property
    def is_float(self) -> bool:
        """A rule leaves the operation in float."""
        return self.program.tensors[self.output].dtype == "float32"

    def op(self, kind: str, inputs: list, output: str, **options) -> None:
        self.program.ops.append(Op(kind, inputs, [output], options))

    def fused(self) -> dict:
        return {"fusedActivationFunction": _ACTIVATIONS[self.activation]}

    def constant(self, what: str, values, dtype: str, **quantization) -> str:
        data = np.ascontiguousarray(values).astype(dtype)
        return self.program.add(Tensor(f"{self.output}/{what}", data.shape, dtype, data=data, **quantization))

    def become_constant(self, values) -> None:
        """No op: the output itself is a constant of the file."""
        tensor = self.program.tensors[self.output]
        tensor.data, tensor.batched = tensor.quantize(np.asarray(values)), False

    def twin(self, name: str, shape, what: str) -> str:
        """A new tensor on the grid of `name`, with another shape."""
        return self.program.add(
            dataclasses.replace(self.program.tensors[name], name=f"{self.output}/{what}", shape=tuple(shape))
        )

    def reshape(self, name: str, output: str) -> None:
        shape = list(self.shape(output))
        if self.program.dynamic_batch:
            shape[0] = -1
        target = self.constant("shape", shape, "int32")
        self.op("RESHAPE", [name, target], output, newShape=np.array(shape, np.int32))

    def reshaped(self, name: str, shape, what: str) -> str:
        twin = self.twin(name, shape, what)
        self.reshape(name, twin)
        return twin

    def as_image(self, name: str) -> str:
        """(batch, steps, channels) → (batch, 1, steps, channels); (batch, channels) → (batch, 1, 1, channels)."""
        shape = self.shape(name)
        if len(shape) == 4:
            return name
        middle = (1,) * (4 - len(shape)) + shape[1:-1]
        if len(shape) > 4:
            middle = (int(np.prod(shape[1:-2])), shape[-2])
        return self.reshaped(name, (shape[0], *middle, shape[-1]), "image")

    def image_output(self, shape) -> str:
        """The tensor an op on images writes: the output itself, or a twin that `from_image` reshapes to it."""
        return self.output if tuple(shape) == self.shape(self.output) else self.twin(self.output, shape, "result")

    def from_image(self, name: str) -> None:
        if name != self.output:
            self.reshape(name, self.output)


def output_size(size, window, stride, dilation, padding) -> int:
    if padding == "same":
        return -(-size // stride)
    return -(-(size - (window - 1) * dilation) // stride)


def pair(values) -> tuple[int, int]:
    return (1, values[0]) if len(values) == 1 else tuple(values)
