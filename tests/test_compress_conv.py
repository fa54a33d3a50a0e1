"""Convolutions in compress: measured and swapped like linear layers, saved and loaded."""

import pytest
import torch
import trine
from fake_timers import says
from torch import nn
from trine import Recipe
from trine.nn import Int8Conv2d

IMAGES = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
RECIPE = Recipe("float", conv="int8")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, 2, padding="valid")
        self.second = nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False)
        self.circular = nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu())
        return self.head(self.circular(x).relu().mean((2, 3)))


def test_each_is_measured_at_the_images_it_saw():
    shapes = []

    def timer(calls):
        shapes.append(calls["float"]().shape)
        return says(2)(calls)

    model = Network()
    small = trine.compress(model, RECIPE, [IMAGES, IMAGES, IMAGES[:1]], timer=timer)
    assert shapes == [(3, 6, 4, 3), (1, 6, 4, 3), (3, 6, 4, 3), (1, 6, 4, 3)]
    first, second, circular, head = small.report.layers
    assert [(t.rows, t.image, t.calls) for t in first.timings] == [(3, (9, 7), 2), (1, (9, 7), 1)]
    assert first.swapped
    assert second.swapped
    assert first.ratio == pytest.approx(2)
    assert "padding_mode is 'circular'; only 'zeros' has a kernel" in circular.reason
    assert head.reason == "the recipe leaves it float"
    expected = Int8Conv2d.from_conv(model.first)(IMAGES)
    assert torch.equal(small.first(IMAGES), expected)
    again = type(small.report).from_dict(small.report.to_dict())
    assert again == small.report


def test_a_slower_one_is_kept_and_a_smaller_one_swapped():
    model = Network()
    kept = trine.compress(model, RECIPE, IMAGES, timer=says(0.9))
    assert kept.report.swapped == 0
    small = trine.compress(model, Recipe("float", "size", "int8"), IMAGES, timer=says(0.9))
    assert isinstance(small.first, Int8Conv2d)
    first, second, *_ = small.report.layers
    assert first.bytes_after < first.bytes_before
    assert second.reason.startswith("not smaller")  # few channels in a group, padded to 16


def test_channels_last_is_measured_as_it_is():
    seen = []

    def timer(calls):
        seen.append(calls["float"]().is_contiguous(memory_format=torch.channels_last))
        return says(2)(calls)

    images = IMAGES.contiguous(memory_format=torch.channels_last)
    trine.compress(Network(), Recipe("float", conv={"first": "int8"}), images, timer=timer)
    assert seen == [True]


@pytest.mark.parametrize("like", [Network, None])
def test_saved_and_loaded(like, tmp_path):
    torch.manual_seed(1)
    model = Network() if like else nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), nn.Flatten())
    small = trine.compress(model, RECIPE, IMAGES, timer=says(2))
    assert small.report.swapped
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine", like=like)
    assert torch.equal(again(IMAGES), small(IMAGES))
    assert again.report == small.report


def test_another_convolution_is_refused(tmp_path):
    small = trine.compress(nn.Sequential(nn.Conv2d(4, 6, 3)), RECIPE, IMAGES, timer=says(2))
    trine.save(small, tmp_path / "a.trine")
    with pytest.raises(ValueError, match=r"layer '0' has stride = \(2, 2\) in the model, \(1, 1\)"):
        trine.load(tmp_path / "a.trine", like=lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2)))


def test_errors():
    model = Network()
    model.second.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight of layer 'second' holds NaN"):
        trine.compress(model, RECIPE, IMAGES)
    with pytest.raises(ValueError, match="to be 'int8-static', whose scale is found from data"):
        trine.compress(Network(), Recipe("float", conv="int8-static"), IMAGES)
    with pytest.raises(ValueError, match="holds no linear layer"):
        trine.compress(nn.Sequential(nn.Conv2d(4, 6, 3)), Recipe(), IMAGES)
