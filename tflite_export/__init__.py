"""Integers to `.tflite` files, and proof that they run as they should. Knows nothing of Keras."""

from tflite_export.inspect import Summary, inspect
from tflite_export.predict import predict
from tflite_export.program import Op, Program, Tensor
from tflite_export.rim import with_io_types
from tflite_export.verify import Parity, reference_tensors, verify
from tflite_export.write import write

__all__ = [
    "Op",
    "Parity",
    "Program",
    "Summary",
    "Tensor",
    "inspect",
    "predict",
    "reference_tensors",
    "verify",
    "with_io_types",
    "write",
]
