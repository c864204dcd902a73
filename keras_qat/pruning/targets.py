"""What of a model is pruned: which kernels, and which vectors go with a channel."""

import dataclasses
import fnmatch
from collections.abc import Sequence

import keras

from keras_qat.graph.walk import nodes_of, producers_of, readers_of
from keras_qat.layers import Quantized
from keras_qat.pruning import criteria
from keras_qat.pruning.patterns import Channels, NofM, Pattern, Weights
from keras_qat.pruning.shrink import coupled_channels
from keras_qat.schedules import Schedule, of_sparsity
from keras_qat.spec import Rule
from keras_qat.weighted import (
    Layout,
    WeightedLayer,
    first_matches,
    is_depthwise,
    layout_of,
    matches_layer,
    weighted_layers,
)

_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)

# In others (gates of a recurrent cell, heads of attention) a channel means nothing without its likes in other kernels.
_WITH_CHANNELS = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """How layers are pruned. In a rule, what is None is as the callback has it.

    Args:
        schedule: Of `kq.schedules`, or a number.
        pattern: `Weights()`, `Blocks(a, b)`, `NofM(n, m)` or `Channels()`.
        criterion: "magnitude", "taylor" or "movement".
    """

    schedule: Schedule | float | None = None
    pattern: Pattern | None = None
    criterion: str | None = None

    def over(self, default: "Policy") -> "Policy":
        """With the default's values where this one has none, and checked."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        full = dataclasses.replace(default, **own)
        full = dataclasses.replace(full, schedule=of_sparsity(full.schedule))
        criteria.resolve(full.criterion)
        if not isinstance(full.pattern, Pattern):
            raise ValueError(
                "The pattern is Weights(), Blocks(a, b), NofM(n, m) or Channels() of kq.pruning. Received: "
                f"{full.pattern!r}"
            )
        final = full.schedule.final
        if (
            isinstance(full.pattern, NofM)
            and final is not None
            and round(final * full.pattern.m) != (full.pattern.m - full.pattern.n)
        ):
            raise ValueError(
                f"{full.pattern.n} of {full.pattern.m} is a sparsity of {full.pattern.sparsity:.4g}, and the schedule "
                f"ends at {final:.4g}. Let it end at {full.pattern.sparsity:.4g}."
            )
        return full


def policy_of(value, default: Policy) -> Policy | None:
    """What stands in a rule: a `Policy`, or a schedule, a pattern or a sparsity by itself, or None."""
    if value is None:
        return None
    if isinstance(value, Pattern):
        value = Policy(pattern=value)
    elif not isinstance(value, Policy):
        value = Policy(schedule=of_sparsity(value))
    return value.over(default)


@dataclasses.dataclass(frozen=True)
class Target:
    """A variable that is pruned.

    Args:
        path: Of its layer.
        variable: The kernel.
        layout: How it lies in memory.
        policy: How it is pruned.
        companions: Vectors with an entry for each output channel, which go with a channel that is removed as a whole.
        coupled: Numbers of the output channels; what has the same ones elsewhere goes together with them. None: nothing.
    """

    path: str
    variable: keras.Variable
    layout: Layout
    policy: Policy
    companions: tuple[keras.Variable, ...] = ()
    coupled: tuple[int, ...] | None = None


def find_targets(model: keras.Model, default: Policy, rules: Sequence[tuple[Rule, Policy | None]]) -> list[Target]:
    """What is pruned, layer by layer.

    Without a rule these are the kernels of all layers but depthwise ones, norms and the last of the model; whole channels
    only of dense layers and convolutions. A rule on a layer takes all of its kernels, or if it has none its vectors; one
    that ends in a variable's name ("*/bias") takes that variable.
    """
    layers = [layer for layer in weighted_layers(model) if not layer.is_range]
    chosen = first_matches([rule for rule, _ in rules], layers, _matches_layer_or_variable)
    policies = {id(rule): policy for rule, policy in rules}
    last, norms = last_layers(model), following_norms(model)
    targets = []
    for item, rule in zip(layers, chosen, strict=True):
        policy = default if rule is None else policies[id(rule)]
        if policy is None or (rule is None and _left_alone(item, policy, last)):
            continue
        named = rule is not None and not matches_layer(rule.pattern, item)
        for variable in _variables_of(item, rule, named):
            targets.append(_target(item, variable, policy, norms))
    targets = _coupled(targets, model)
    if not targets:
        raise ValueError(
            f"Model {model.name!r} has no layer to prune: norms, biases, depthwise kernels and the last layer are left "
            "alone unless a rule names them, and frozen layers always. The layers with weights are: "
            f"{', '.join(layer.path for layer in layers)}"
        )
    return targets


def _target(item, variable, policy, norms) -> Target:
    layout = layout_of(item.layer, variable)
    if len(variable.shape) < 2:
        return Target(item.path, variable, layout, dataclasses.replace(policy, pattern=Weights()))
    if not isinstance(policy.pattern, Channels):
        return Target(item.path, variable, layout, policy)
    norm = norms.get(id(item.layer))
    vectors = [getattr(item.layer, "bias", None), getattr(norm, "gamma", None), getattr(norm, "beta", None)]
    return Target(item.path, variable, layout, policy, tuple(vector for vector in vectors if vector is not None))


def _coupled(targets: list[Target], model) -> list[Target]:
    """The targets; those whose channels go know which of other targets' channels go with them."""
    if not any(isinstance(target.policy.pattern, Channels) for target in targets):
        return targets
    numbers = coupled_channels(model)

    def coupled(target):
        by_one_axis = isinstance(target.policy.pattern, Channels) and len(target.layout.channels) == 1  # not depthwise
        return dataclasses.replace(target, coupled=numbers.get(target.path) if by_one_axis else None)

    return list(map(coupled, targets))


def _matches_layer_or_variable(pattern, item) -> bool:
    return matches_layer(pattern, item) or any(_names(pattern, item, variable) for variable in item.variables)


def _names(pattern, item, variable) -> bool:
    own_name = isinstance(pattern, str) and pattern.rsplit("/", 1)[-1] == variable.name
    return own_name and fnmatch.fnmatchcase(f"{item.path}/{variable.name}", pattern)


def _variables_of(item: WeightedLayer, rule, named) -> list[keras.Variable]:
    if named:
        return [variable for variable in item.trained if _names(rule.pattern, item, variable)]
    if rule is None:
        return [v for v in item.trained if _is_kernel(v) and not is_depthwise(item.layer, v)]
    matrices = [v for v in item.trained if len(v.shape) >= 2 and "bias" not in v.name]
    return matrices or list(item.trained)


def _is_kernel(variable) -> bool:
    return len(variable.shape) >= 2 and (variable.name.endswith("kernel") or variable.name == "embeddings")


def _left_alone(item: WeightedLayer, policy: Policy, last: set[int]) -> bool:
    without_channels = isinstance(policy.pattern, Channels) and not isinstance(item.layer, _WITH_CHANNELS)
    return without_channels or isinstance(item.layer, _NORMS) or id(item.layer) in last


def last_layers(model: keras.Model) -> set[int]:
    """Ids of the layers with a kernel that no other such layer follows on the way to an output."""
    graph = _graph_of(model)
    if graph is None:
        with_kernels = [layer for layer in weighted_layers(model) if any(map(_is_kernel, layer.variables))]
        return {id(layer.layer) for layer in with_kernels[-1:]}
    producers, found, seen = producers_of(graph), set(), set()

    def visit(tensor):
        node = producers.get(id(tensor))
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        operation = getattr(node.operation, "layer", node.operation)
        inside = [operation] if isinstance(operation, keras.Layer) else []
        kernels = [layer for layer in _flat(inside) if any(map(_is_kernel, layer._trainable_variables))]
        if isinstance(operation, keras.Model) and kernels:
            found.update(last_layers(operation))
        elif kernels:
            found.update(map(id, kernels))
        else:
            for source in node.input_tensors:
                visit(source)

    for tensor in graph.outputs:
        visit(tensor)
    return found


def _flat(layers) -> list[keras.Layer]:
    return [each for layer in layers for each in layer._flatten_layers()]


def _graph_of(model):
    """The functional graph of a model, or None if it is defined by its `call`."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def following_norms(model: keras.Model) -> dict[int, keras.layers.BatchNormalization]:
    """Layer id → the batch norm that alone reads its output; in a QAT model the one folded into `Quantized`."""
    found = {}
    for layer in model._flatten_layers():
        if isinstance(layer, Quantized) and layer.batch_norm is not None:
            found[id(layer.layer)] = layer.batch_norm
        graph = _graph_of(layer) if isinstance(layer, keras.Model) else None
        if graph is None:
            continue
        readers = readers_of(graph)
        for node in nodes_of(graph):
            following = readers.get(id(node.outputs[0]), ())
            after = following[0].operation if len(following) == 1 and following[0] is not None else None
            if isinstance(after, keras.layers.BatchNormalization) and after.axis in (
                -1,
                len(node.outputs[0].shape) - 1,
            ):
                found[id(node.operation)] = after
    return found
