"""Every network of keras.applications, as it is and as a frozen backbone: the runs of `benchmarks/applications.py`."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from applications import NETWORKS, ROLES, measured  # noqa: E402


@pytest.mark.full
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", NETWORKS)
def test_application(name, role):
    result = measured(name, role)
    assert not result.reason, result.reason
    assert result.is_int8 and result.passed, result
