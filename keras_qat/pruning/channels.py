"""Which channels of a model's tensors are needed: constants seen forwards, readers seen backwards.

A channel is a place on a tensor's last axis. Channels that can only go together share a *slot*: those in front of and
behind a batch norm or an activation, those that an addition adds up. A slot goes if every kernel that reads it can do
without: its weights for it are zero, or the channel is a constant there, which the kernel's bias takes over.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Channels:
    """The channels of a tensor.

    Args:
        slots: The slot of each.
        constants: The value of each that is the same for all inputs and at all positions, NaN for the others.
    """

    slots: np.ndarray
    constants: np.ndarray

    def __len__(self) -> int:
        return len(self.slots)

    def with_constants(self, constants) -> "Channels":
        return Channels(self.slots, constants)

    def only_zeros(self) -> "Channels":
        """What stays constant where zeros come to stand beside the values, or some values are set to zero."""
        return self.with_constants(np.where(self.constants == 0, 0.0, np.nan))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel does, without its positions.

    Args:
        nonzero: (inputs, outputs), where any weight differs from zero.
        sums: (inputs, outputs), the weights summed over the positions: what a constant input is multiplied with.
        bias: Of the outputs, or 0.
        takes: Whether a bias can take over what the kernel makes of a constant: not of one beside zero padding.
    """

    nonzero: np.ndarray
    sums: np.ndarray
    bias: np.ndarray | float
    takes: bool = True

    def times(self, inputs: Channels) -> np.ndarray:
        """What it makes of the constants among its inputs."""
        known = np.nan_to_num(inputs.constants) != 0
        return inputs.constants[known] @ self.sums[known]


@dataclasses.dataclass
class Mixing:
    """A place where outputs are sums over inputs: the only kind of place where a channel can end.

    Args:
        kernel: The weights.
        inputs: What they read; for a layer that is called twice, with the constants that both calls see.
        outputs: The slots of the results.
    """

    kernel: Kernel
    inputs: Channels
    outputs: np.ndarray

    def read(self, alive: np.ndarray) -> np.ndarray:
        """The inputs that cannot go, a truth value each, if the slots `alive` stay."""
        return self.kernel.nonzero[:, alive[self.outputs]].any(axis=1) & np.isnan(self.inputs.constants)

    def shift(self, alive: np.ndarray) -> np.ndarray:
        """What the outputs that stay get from the inputs that go."""
        gone = self.inputs.with_constants(np.where(alive[self.inputs.slots], 0.0, self.inputs.constants))
        return self.kernel.times(gone)[alive[self.outputs]]


class Slots:
    """Collects what the operations of a model say about its channels, and then decides which slots stay."""

    def __init__(self):
        self.mixings: dict[tuple, Mixing] = {}
        self._count = 0
        self._kept: list[np.ndarray] = []
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._tensors: list[np.ndarray] = []
        self._known: dict[tuple, np.ndarray] = {}

    def fresh(self, count: int, key: tuple | None = None) -> np.ndarray:
        """New slots; for a key that was there before, the same ones again. Keys begin with the id of a layer."""
        if key is None or key not in self._known:
            slots = np.arange(self._count, self._count + count)
            self._count += count
            self._tensors += [slots] if count else []
            if key is None:
                return slots
            self._known[key] = slots
        return self._known[key]

    def variable(self, count: int) -> Channels:
        """Channels of which nothing is known."""
        return Channels(self.fresh(count), np.full(count, np.nan))

    def keep(self, slots: np.ndarray) -> None:
        self._kept.append(slots)

    def keep_layer(self, layer_id: int) -> None:
        """Keeps all channels that a layer's weights have, whichever call made them known."""
        mixings = [mixing for key, mixing in self.mixings.items() if key[0] == layer_id]
        self._kept += [slots for key, slots in self._known.items() if key[0] == layer_id]
        self._kept += [slots for mixing in mixings for slots in (mixing.inputs.slots, mixing.outputs)]

    def tie(self, slots: np.ndarray, others: np.ndarray) -> None:
        """They stay or go together, each with the one at its place."""
        if slots is not others:
            self._ties.append((slots, others))

    def agree(self, key: tuple, slots: np.ndarray) -> None:
        """Ties slots to those of the same key before: all calls of one layer see the same channels."""
        self.tie(self._known.setdefault(key, slots), slots)

    def mix(self, key: tuple, inputs: Channels, kernel: Kernel, outputs: np.ndarray | None = None) -> Channels:
        """A kernel's results.

        Args:
            key: Of the weights: a layer that is called several times is one mixing.
            inputs: What it reads.
            kernel: The weights.
            outputs: The slots of the results; new ones unless given.
        """
        inputs = inputs if kernel.takes else inputs.only_zeros()
        unknown = kernel.nonzero[np.isnan(inputs.constants)].any(axis=0)
        values = kernel.times(inputs) + kernel.bias
        if key in self.mixings:
            mixing = self.mixings[key]
            self.tie(mixing.inputs.slots, inputs.slots)
            same = mixing.inputs.constants == inputs.constants
            mixing.inputs = mixing.inputs.with_constants(np.where(same, inputs.constants, np.nan))
        else:
            outputs = self.fresh(len(values)) if outputs is None else outputs
            self.mixings[key] = Mixing(kernel, inputs, outputs)
        return Channels(self.mixings[key].outputs, np.where(unknown, np.nan, values))

    def alive(self) -> np.ndarray:
        """For each slot whether it stays.

        What has to stay stays, and so does what is read for it, back to where nothing more is read. A tensor that
        would be left without a channel keeps its first one.
        """
        label = self.labels()
        alive = np.zeros(self._count, bool)  # of labels; a slot's label is a slot, too
        mixings = [
            dataclasses.replace(m, inputs=Channels(label[m.inputs.slots], m.inputs.constants), outputs=label[m.outputs])
            for m in reversed(self.mixings.values())
        ]
        for slots in self._kept:
            alive[label[slots]] = True
        self._spread(mixings, alive)
        while (empty := next((s for s in self._tensors if not alive[label[s]].any()), None)) is not None:
            alive[label[empty[0]]] = True
            self._spread(mixings, alive)
        return alive[label]

    @staticmethod
    def _spread(mixings: list[Mixing], alive: np.ndarray) -> None:
        """Goes backwards over the mixings until nothing more comes alive; often, only where ties lead forwards."""
        seen: dict[int, int] = {}
        changed = True
        while changed:
            changed = False
            for mixing in mixings:
                outputs = int(alive[mixing.outputs].sum())
                if seen.get(id(mixing)) != outputs:
                    seen[id(mixing)] = outputs
                    read = mixing.inputs.slots[mixing.read(alive)]
                    changed |= not alive[read].all()
                    alive[read] = True

    def labels(self) -> np.ndarray:
        """For each slot the lowest one that it is tied to, over however many ties."""
        label = np.arange(self._count)
        if not self._ties:
            return label
        one, other = (np.concatenate(side) for side in zip(*self._ties, strict=True))
        while True:
            lowest = np.minimum(label[one], label[other])
            before = label.copy()
            for side in (one, other):
                np.minimum.at(label, label[side], lowest)
                np.minimum.at(label, side, lowest)
            label = label[label]
            if np.array_equal(label, before):
                return label
