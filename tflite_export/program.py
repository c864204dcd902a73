"""A network of integers: the only thing the writer, the verifier and the inspector share.

A `Program` is plain data: tensors by name and a list of TFLite ops in the order they run. It knows nothing of Keras;
`keras_qat.freeze` makes one, `tflite_export.write` turns one into a file.
"""

import dataclasses
from collections.abc import Container

import numpy as np

_INTEGER_RANGES = {"int4": (-8, 7), "int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
_BLOCK = 2**16  # numbers that are quantized at a time: in float64 they are to fit into a cache


def unique_name(base: str, taken: Container[str]) -> str:
    """`base`, numbered if it is taken."""
    if base not in taken:
        return base
    used, free = 0, 1  # by halves, because a deep network has thousands of "add"s
    while f"{base}_{free}" in taken:
        used, free = free, 2 * free
    while free - used > 1:
        middle = (used + free) // 2
        used, free = (middle, free) if f"{base}_{middle}" in taken else (used, middle)
    return f"{base}_{free}"


@dataclasses.dataclass
class Tensor:
    """One tensor. `scale` is empty for plain numbers, has one entry per tensor or one per channel along `axis`.

    `batched` says that the leading axis is the batch: it is what a dynamic batch makes unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "int8"
    scale: tuple[float, ...] = ()
    zero_point: int = 0
    axis: int | None = None
    data: np.ndarray | None = None
    batched: bool = True

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    @property
    def integer_range(self) -> tuple[int, int]:
        """The lowest and the highest integer of its type."""
        return _INTEGER_RANGES[self.dtype]

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """Real values → this tensor's integers, rounded half up from the lowest one on (computed in float64)."""
        if not self.scale:
            return np.asarray(values).astype(self.dtype)
        low, high = self.integer_range
        scale = np.float64(np.float32(self.scale[0]))
        lowest, highest = ((bound - self.zero_point) * scale for bound in (low, high))
        values = np.asarray(values, np.float32)
        integers = np.empty(values.shape, self.dtype)
        reals, written = values.reshape(-1), integers.reshape(-1)
        for start in range(0, len(reals), _BLOCK):
            block = np.clip(reals[start : start + _BLOCK].astype(np.float64), lowest, highest)
            written[start : start + _BLOCK] = np.floor((block - lowest) / scale + 0.5) + low
        return integers

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        """This tensor's integers → real values."""
        if not self.scale:
            return np.asarray(integers)
        return ((integers.astype(np.float64) - self.zero_point) * self.scale[0]).astype(np.float32)


@dataclasses.dataclass
class Op:
    """One TFLite builtin. `options` holds the fields of its schema table; `None` among inputs is an absent one."""

    kind: str
    inputs: list[str | None]
    outputs: list[str]
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Program:
    """Tensors by name, ops in running order, and the signature (Keras name → tensor name).

    With `dynamic_batch`, the leading 1 of every activation stands for any batch size.
    """

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ops: list[Op] = dataclasses.field(default_factory=list)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)
    dynamic_batch: bool = False
    description: str = "keras_qat"

    def add(self, tensor: Tensor) -> str:
        """Adds `tensor`, made unique by a counter if its name is taken, and returns its name."""
        tensor.name = unique_name(tensor.name, self.tensors)
        self.tensors[tensor.name] = tensor
        return tensor.name

    def producers(self) -> dict[str, Op]:
        return {name: op for op in self.ops for name in op.outputs}

    def consumers(self) -> dict[str, list[Op]]:
        users: dict[str, list[Op]] = {name: [] for name in self.tensors}
        for op in self.ops:
            for name in op.inputs:
                if name is not None:
                    users[name].append(op)
        return users

    def without_unread_ops(self) -> "Program":
        """The same without the ops whose results nobody reads."""
        read, kept = set(self.outputs.values()), []
        for op in reversed(self.ops):
            if any(name in read for name in op.outputs):
                kept.append(op)
                read.update(op.inputs)
        return dataclasses.replace(self, ops=kept[::-1])

    def check(self) -> None:
        """Raises `ValueError` where an op reads a tensor that nothing has written yet."""
        known = {name for name, tensor in self.tensors.items() if tensor.is_constant} | set(self.inputs.values())
        for position, op in enumerate(self.ops):
            for name in op.inputs:
                if name is not None and name not in known:
                    raise ValueError(
                        f"Op {position} ({op.kind}) reads tensor {name!r} before anything writes it. Expected a "
                        f"constant, an input or the output of an earlier op. Received inputs: {op.inputs}"
                    )
            known.update(op.outputs)
        for name in self.outputs.values():
            if name not in known:
                raise ValueError(f"Output tensor {name!r} is written by no op.")

    def __str__(self) -> str:
        lines = [f"Program: {len(self.ops)} ops, {len(self.tensors)} tensors"]
        for op in self.ops:
            output = self.tensors[op.outputs[0]]
            lines.append(f"  {op.kind:24} {output.name}  {list(output.shape)} {output.dtype}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        return {
            "ops": [op.kind for op in self.ops],
            "inputs": dict(self.inputs),
            "outputs": dict(self.outputs),
            "tensors": {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in self.tensors.values()},
        }
