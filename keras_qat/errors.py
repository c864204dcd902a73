"""The one error that `quantize` raises for a model it cannot put into integers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a layer cannot be quantized, and the way out."""

    layer: str
    operation: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"Layer {self.layer!r} ({self.operation}): {self.reason} {self.way_out}"


class UnsupportedModelError(ValueError):
    """Raised before any training starts; `problems` holds one row per layer, as `kq.explain` shows them."""

    def __init__(self, problems: list[Problem]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} layer(s) cannot be quantized:\n{lines}")

    def __reduce__(self):
        return type(self), (self.problems,)  # an error is pickled by its message otherwise
