"""One small module for each way in which dimensions are coupled, cut or mixed."""

import torch
from structured_models import Case
from torch import Tensor, nn
from torch.nn import functional as F


class Module(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


IMAGE, ROWS, WORDS = (2, 6, 8, 8), (5, 12), (2, 7, 12)


def concatenated() -> Case:
    def forward(self, x):
        a = self.a(x).relu()
        return self.c(torch.cat([a, self.b(a).sigmoid(), x], 1))

    model = Module(
        forward,
        a=nn.Conv2d(6, 8, 3, padding=1),
        b=nn.Conv2d(8, 8, 3, padding=1),
        c=nn.Conv2d(22, 5, 1),
    )
    return Case(model, torch.randn(IMAGE), {"a": [("b", 1, 0), ("c", 1, 0)], "b": [("c", 1, 8)]})


def grouped() -> Case:
    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())

    model = Module(
        forward,
        a=nn.Conv2d(6, 8, 1),
        b=nn.Conv2d(8, 16, 3, groups=4),
        c=nn.Conv2d(16, 5, 1),
    )
    return Case(model, torch.randn(IMAGE), {"a": [("c", 4)]})


def shuffled() -> Case:
    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.b(x.relu())

    model = Module(forward, a=nn.Conv2d(6, 12, 1), b=nn.Conv2d(12, 5, 1))
    # Channels i and i + 6 stand side by side in what b reads.
    return Case(model, torch.randn(IMAGE), {"a": [("b", 2)]})


def group_norm() -> Case:
    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())

    model = Module(
        forward,
        a=nn.Conv2d(6, 12, 1),
        norm=nn.GroupNorm(4, 12),
        b=nn.Conv2d(12, 5, 1),
    )
    nn.init.normal_(model.norm.weight)
    return Case(model, torch.randn(IMAGE), {"a": [("b", 3)]})


def gated() -> Case:
    def forward(self, x):
        gate, value = self.a(x).chunk(2, -1)
        return self.c(self.b(F.glu(self.a2(gate.sigmoid() * value))).relu())

    model = Module(
        forward,
        a=nn.Linear(12, 16),
        a2=nn.Linear(8, 20),
        b=nn.Linear(10, 6),
        c=nn.Linear(6, 3),
    )
    readers = {"a": [("a2", 1)], "a2": [("b", 1)], "b": [("c", 1)]}
    return Case(model, torch.randn(ROWS), readers)


def squeeze_excite() -> Case:
    def forward(self, x):
        x = self.bn(self.a(x)).relu()
        weight = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.c(F.max_pool2d(x * weight, 2).flatten(1))

    model = Module(
        forward,
        a=nn.Conv2d(6, 8, 1),
        bn=nn.BatchNorm2d(8),
        down=nn.Conv2d(8, 4, 1),
        up=nn.Conv2d(4, 8, 1),
        c=nn.Linear(8 * 16, 5),
    )
    readers = {"a": [("down", 1), ("c", 16)], "down": [("up", 1)]}
    return Case(model, torch.randn(IMAGE), readers)


class Attention(nn.Module):
    """As written by hand, with sizes in attributes and one projection for all three."""

    def __init__(self, dim: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, 3).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) / 3**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, self.dim))


def attention() -> Case:
    return Case(Attention(), torch.randn(WORDS), {"qkv": [("out", 3)]})


def padded_shortcut() -> Case:
    """The other half of the channels comes from a convolution alone (ResNet's option A)."""

    def forward(self, x):
        x = self.a(x).relu()
        wide = self.c(self.b(x).relu()) + F.pad(x, (0, 0, 0, 0, 0, 8))
        return self.d(wide.relu())

    model = Module(
        forward,
        a=nn.Conv2d(6, 8, 1),
        b=nn.Conv2d(8, 8, 1),
        c=nn.Conv2d(8, 16, 1),
        d=nn.Conv2d(16, 5, 1),
    )
    readers = {"a": [("b", 1), ("d", 1)], "b": [("c", 1)]}
    return Case(model, torch.randn(IMAGE), readers)


def in_place() -> Case:
    def forward(self, x):
        a = self.a(x).relu_()
        a += self.b(x)
        a[:, :2] = 0.5
        return self.c(a.mul_(2))

    model = Module(forward, a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(8, 3))
    return Case(model, torch.randn(2, 5, 12), {"a": [("c", 1)]})


def transposed() -> Case:
    def forward(self, x):
        return self.c(self.act(self.b(self.a(x).relu())))

    model = Module(
        forward,
        a=nn.Conv2d(6, 8, 3, 2),
        b=nn.ConvTranspose2d(8, 10, 2, 2),
        act=nn.PReLU(10),
        c=nn.Conv2d(10, 3, 1),
    )
    return Case(model, torch.randn(IMAGE), {"a": [("b", 1)], "b": [("c", 1)]})


def used_twice() -> Case:
    """One layer in two places: what it reads and what it makes are the same units."""

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(self.b(x).relu()).relu() + x)

    model = Module(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    return Case(model, torch.randn(ROWS), {"a": [("b", 1), ("c", 1)]})


class GroupedQuery(nn.Module):
    """Eager attention with fewer key-value heads than queries, and rotated by position."""

    def __init__(self, heads: int, kv_heads: int, dim: int = 12, width: int = 4) -> None:
        super().__init__()
        self.width, self.times = width, heads // kv_heads
        self.q = nn.Linear(dim, heads * width)
        self.k, self.v = (nn.Linear(dim, kv_heads * width) for _ in "kv")
        self.o = nn.Linear(heads * width, dim)
        self.register_buffer("angles", torch.rand(width // 2))

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * torch.cat([self.angles, self.angles])
        first, second = x[..., : self.width // 2], x[..., self.width // 2 :]
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, -1, self.width).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = self.rotated(q), self.rotated(k)
        k, v = (y.repeat_interleave(self.times, 1) for y in (k, v))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, t, -1))


def multi_query() -> Case:
    """One key-value head serves all, and so stays."""
    return Case(GroupedQuery(4, 1), torch.randn(WORDS), {"q": [("o", 4)]})


def grouped_query_eager() -> Case:
    return Case(GroupedQuery(6, 3), torch.randn(WORDS), {"q": [("o", 8)]})


MODULES = [
    concatenated, grouped, shuffled, group_norm, gated, squeeze_excite, attention, padded_shortcut,
    in_place, transposed, used_twice, multi_query, grouped_query_eager,
]  # fmt: skip
