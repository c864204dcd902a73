"""Recurrent layers and wrappers, unrolled: the same numbers, the same weights, and what is refused."""

import numpy as np
import pytest
from cases import inputs_for
from cases_recurrent import RECURRENT

from keras_qat.graph.lower import lowering_of
from keras_qat.graph.trace import trace
from keras_qat.operations import row_of


def _flattened(model):
    flat, problems = trace(model, lambda operation: row_of(operation) is not None, lowering_of)
    assert not problems, problems
    return flat.model()


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_unrolled_computes_the_same(case):
    model = case.one_op()
    x = inputs_for(model, 4)
    np.testing.assert_allclose(_flattened(model)(x), model(x), rtol=1e-5, atol=1e-5)
