"""Pruning: what is removed and how it is chosen. `kq.callbacks.Pruning` does it while a model trains."""

from keras_qat.pruning.comparison import Comparison, Size, compare
from keras_qat.pruning.patterns import Blocks, Channels, NofM, Weights
from keras_qat.pruning.report import LayerRow, PruningReport, report
from keras_qat.pruning.shrink import shrink
from keras_qat.pruning.targets import Policy

__all__ = [
    "Blocks",
    "Channels",
    "Comparison",
    "LayerRow",
    "NofM",
    "Policy",
    "PruningReport",
    "Size",
    "Weights",
    "compare",
    "report",
    "shrink",
]
