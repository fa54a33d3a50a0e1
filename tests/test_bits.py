"""What a mask chooses, against PyTorch's own functions: every bit of it, and nothing else."""

import pytest
import torch
from trine._bits import clear, only, put

DTYPES = (
    *(torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-8, 1.0)


def some(dtype: torch.dtype, strides: str) -> torch.Tensor:
    values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (7, 9))].to(dtype)
    return {"plain": values, "transposed": values.T, "every other": values[:, ::2]}[strides]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("strides", ["plain", "transposed", "every other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_pytorch_chooses(dtype, strides):
    torch.manual_seed(0)
    tensor, values = some(dtype, strides), some(dtype, strides)
    mask = torch.rand(tensor.shape) < 0.5
    cleared, filled = tensor.clone(), tensor.clone()
    clear(mask, cleared)
    put(mask, filled, values)
    zeros = torch.zeros((), dtype=dtype).expand_as(tensor)
    for found, chosen in ((cleared, zeros), (filled, values), (only(~mask, tensor), zeros)):
        assert found.dtype == dtype
        assert same_bits(found[mask], chosen[mask])
        assert same_bits(found[~mask], tensor[~mask])


def test_several_are_cleared_by_one_mask():
    mask = torch.tensor([True, False, True])
    tensors = [torch.ones(3, dtype=dtype) for dtype in (*DTYPES[1:], torch.float32)]
    clear(mask, *tensors)
    assert all(tensor.tolist() == [0, 1, 0] for tensor in tensors)
    assert mask.tolist() == [True, False, True]
    clear(mask)


def test_a_view_of_more_is_changed_where_it_is():
    whole = torch.ones(4, 6)
    clear(torch.tensor([[True, False, True], [False, True, False]]), whole[1:3, ::2])
    assert whole.sum() == 24 - 3
    assert (whole[:, 1::2] == 1).all()


def test_values_of_another_type_and_nothing_at_all():
    tensor, mask = torch.zeros(3), torch.tensor([True, False, True])
    put(mask, tensor, torch.tensor([1.5, 2.5, 3.5], dtype=torch.float64))
    assert tensor.tolist() == [1.5, 0.0, 3.5]
    empty = torch.zeros(0, 4)
    clear(empty.bool(), empty)
    put(empty.bool(), empty, empty)
    assert only(empty.bool(), empty).shape == (0, 4)


def test_a_parameter_keeps_its_history_apart():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    version = weight._version
    with torch.no_grad():
        clear(torch.eye(2).bool(), weight)
    assert weight._version > version  # autograd notices
    assert weight.requires_grad
    assert weight.tolist() == [[0, 1], [1, 0]]
