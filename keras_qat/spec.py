"""What is to be quantized and how finely: plain values that everything else reads."""

import dataclasses
import fnmatch
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one kind of tensor is put into integers.

    Args:
        bits: 2 to 8, or 16 (of tensors inside of attention; no scheme asks for it yet).
        symmetric: zero point 0, and the range leaves out the lowest integer (-127..127), as TFLite wants of weights and
            of everything in 16 bits.
        per_channel: one scale per output channel instead of one per tensor.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False

    def __post_init__(self):
        if not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(f"Spec.bits goes from 2 to 8, or is 16. Received: bits={self.bits}")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a model is quantized; `kq.quantize(model, scheme=...)` takes it, or its name.

    Args:
        name: Of the scheme.
        activations, weights: Of the tensors between layers, and of kernels.
        per_channel_norms: Batch norms that stand alone have a scale for each channel: one DEPTHWISE_CONV_2D instead of MUL
            and ADD. It is quicker and more precise before training, and takes 8 bytes of TensorFlow Lite Micro's arena for
            each channel.
        exact_upsampling: Bilinear upsampling by 2 or 4 rounds alike on all runtimes: three ops instead of one, in which
            XNNPACK rounds ties otherwise (1 LSB in 5 %). It takes four times as long. (By 3 it is always those three:
            the kernels of RESIZE_BILINEAR disagree about where the pixels are.)
    """

    name: str = "int8"
    activations: Spec = Spec()
    weights: Spec = Spec(symmetric=True, per_channel=True)
    per_channel_norms: bool = False
    exact_upsampling: bool = False


SCHEMES = {"int8": Scheme()}


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme's name, or a scheme itself → the scheme."""
    if isinstance(scheme, Scheme):
        found = scheme
    elif scheme in SCHEMES:
        found = SCHEMES[scheme]
    else:
        raise ValueError(f"Unknown scheme. Expected one of {sorted(SCHEMES)} or a kq.Scheme. Received: {scheme!r}")
    if found.activations.bits != 8 or found.activations.symmetric:
        raise ValueError(f"Activations are 8-bit and asymmetric in every scheme so far. Received: {found.activations}")
    if found.weights.bits > 8:
        raise ValueError(f"Weights have 8 bits at the most. Received: {found.weights}")
    if not found.weights.symmetric:
        raise ValueError(f"TFLite kernels read symmetric weights only. Received: {found.weights}")
    return found


@dataclasses.dataclass(frozen=True)
class Rule:
    """Gives the layers whose path matches `pattern` (shell-style: `*`, `?`, `[ab]`) a scheme of their own.

    Paths are those that `kq.explain` shows: the names of layers, with slashes between those inside of each other. The name of
    a block or a layer matches all that is in it, "head" as well as "head/*". Rules stand in a list; the first match wins. A
    scheme of None leaves the layers in float.

    Example:
        `kq.quantize(model, rules=[kq.Rule("head/*", kq.Scheme(weights=kq.Spec(bits=4, symmetric=True)))])`
    """

    pattern: str
    scheme: str | Scheme | None


def matches_path(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path, or something that it is inside of."""
    whole = pattern.removesuffix("/*")
    names = (pattern, f"{pattern}/*") if whole == "*" else (pattern, f"{pattern}/*", whole)  # "*/*" is what is inside
    return any(fnmatch.fnmatchcase(path, name) for name in names)


def _scheme_of(rule: Rule) -> Scheme:
    try:
        return resolve_scheme(rule.scheme)
    except ValueError as error:
        raise ValueError(f"Rule for {rule.pattern!r}: {error}") from None


class Rules:
    """An ordered list of rules that remembers which of them were ever used, so that a typo shows."""

    def __init__(self, rules: Sequence[Rule], default: Scheme):
        if isinstance(rules, Rule):
            rules = [rules]
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"rules is a list of kq.Rule. Received: {rule!r}")
        self._rules = [(rule, None if rule.scheme is None else _scheme_of(rule)) for rule in rules]
        self._default = default
        self._used: set[str] = set()

    def scheme_of(self, path: str) -> Scheme | None:
        """The scheme of a layer, None where it stays in float."""
        for rule, scheme in self._rules:
            if matches_path(rule.pattern, path):
                self._used.add(rule.pattern)
                return scheme
        return self._default

    @property
    def unused(self) -> list[str]:
        return [rule.pattern for rule, _ in self._rules if rule.pattern not in self._used]
