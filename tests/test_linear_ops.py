"""What holds for every linear op and layer alike: devices, layouts, gradients that are refused."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from trine import nn as packed_nn
from trine import ops
from trine.quantize.qat import QatLinear

CHOICES = ("int8", "int8-weight", "ternary", "sparse24", "sparse24-int8", "ternary24")


def packed(choice: str) -> packed_nn.PackedLinear:
    return packed_nn.pack_linear(nn.Linear(36, 5), choice)


@pytest.mark.parametrize("choice", CHOICES)
class TestEveryLayer:
    def test_one_tensor_elsewhere(self, choice):
        """PyTorch calls the fake for a meta tensor: its result would be uninitialised memory."""
        for name, buffer in packed(choice).named_buffers():
            layer = packed(choice)
            setattr(layer, name, buffer.to("meta"))
            with pytest.raises(ValueError, match="on one device, they are on cpu and meta"):
                layer(torch.randn(2, 36))

    def test_meta(self, choice):
        y = packed(choice).to("meta")(torch.empty(2, 3, 36, device="meta", dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), torch.bfloat16, "meta")

    def test_training_on_meta(self, choice):
        x = torch.empty(2, 36, device="meta", requires_grad=True)
        for layer in (packed(choice).to("meta"), QatLinear(36, 5, device="meta", choice=choice)):
            (grad,) = torch.autograd.grad(layer(x).sum(), x)
            assert grad.shape == x.shape

    def test_sparse_input(self, choice):
        """Its backend has no kernel, as a device without one."""
        for x in (torch.randn(2, 36).to_sparse(), torch.randn(2, 36).to_sparse_csr()):
            with pytest.raises(ValueError, match=r"must be dense, one is torch\.sparse_"):
                packed(choice)(x)

    def test_scalar(self, choice):
        with pytest.raises(ValueError, match=r"has shape \[\], expected \[\.\.\., 36\]"):
            packed(choice)(torch.tensor(1.0))

    def test_autocast_leaves_float64_alone(self, choice):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="it is Double"):
            packed(choice)(torch.randn(2, 36).double())

    def test_scales_get_no_gradient(self, choice):
        layer = packed(choice)
        scale = layer.values if choice == "sparse24" else layer.weight_scale
        scale.requires_grad_()
        with pytest.raises(ValueError, match="gives no gradient to a packed weight"):
            layer(torch.randn(2, 36))
        with torch.no_grad():
            layer(torch.randn(2, 36))

    def test_tangents_are_refused(self, choice):
        x = torch.randn(2, 36)
        for layer in (packed(choice), QatLinear(36, 5, choice=choice).eval()):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.func.jvp(layer, (x,), (x,))
            with forward_ad.dual_level():
                layer(x)  # no tangent


def test_softmax_kl_refuses_tangents():
    s = torch.randn(2, 5)
    with pytest.raises(NotImplementedError, match="softmax_kl has no forward-mode derivative"):
        torch.func.jvp(lambda s: ops.softmax_kl(s, s), (s,), (s,))


def test_softmax_kl_elsewhere():
    with pytest.raises(ValueError, match="on one device, they are on cpu and meta"):
        ops.softmax_kl(torch.randn(2, 5), torch.randn(2, 5, device="meta"))


def test_an_op_without_a_kernel_for_the_device_says_so(monkeypatch):
    """What `torch.ops.trine.*` does on any device but the CPU and CUDA, called as PyTorch does."""
    kernels = {}
    monkeypatch.setattr(torch.library, "impl", lambda op, kind, f: kernels.update({(op, kind): f}))
    ops._checks.explain_missing_kernel("int8_linear")
    refuse = kernels["trine::int8_linear", "default"]
    elsewhere = torch.empty(2, 2, device="meta")
    with pytest.raises(ValueError, match="int8_linear has no kernel for the device 'meta' here"):
        refuse(elsewhere, elsewhere, bias=None)
    with pytest.raises(ValueError, match="on one device, they are on cpu and meta"):
        refuse(elsewhere, torch.empty(2))
