"""int8_linear: every instruction set against the reference."""

import pytest
from linear_inputs import DTYPES, SHAPES, assert_same_bits
from trine.ops import int8_linear
from trine.ops.int8_linear import reference


def assert_matches_reference(*args, **kwargs) -> None:
    assert_same_bits(int8_linear(*args, **kwargs), reference.int8_linear(*args, **kwargs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(isa, dtype, m, n, k):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype))
