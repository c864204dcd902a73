"""What TFLite has no single integer op for, written as what it has.

One rule per operation: it looks at the operation (and its arguments) and returns a callable on symbolic tensors that
does the same with primitive layers and keras.ops, or None to leave it alone. Trace opens the result like any layer, so a
rule may use whatever has a rule of its own. Each file here has the rules of one family in a dict `RULES`.
"""

from keras_qat.graph.lower import (
    activations,
    arithmetic,
    attention,
    convolutions,
    images,
    linear_maps,
    loops,
    norms,
    pooling,
    recurrent,
    scalings,
    shapes,
    truths,
    volumes,
    wrappers,
)
from keras_qat.graph.walk import key_of

_FAMILIES = [
    activations,
    arithmetic,
    attention,
    convolutions,
    images,
    linear_maps,
    loops,
    norms,
    pooling,
    recurrent,
    scalings,
    shapes,
    truths,
    volumes,
    wrappers,
]
RULES = {key: rule for family in _FAMILIES for key, rule in family.RULES.items()}


def lowering_of(operation, args, kwargs):
    """The rule's answer for this operation, or None."""
    rule = RULES.get(key_of(operation))
    return None if rule is None else rule(operation, args, kwargs)
