"""What `softmax_kl` on Triton computes of single classes; csrc/softmax_kl has the formulas.

a and b are logits of the two rows, p and q their probabilities: a and p of the student, b and q of
the teacher, or the other way round where a divergence is another one with the two exchanged.

A `row` is what is known of a whole row: max_a, max_b, log2 of sum_a / sum_b (NaN: it has no
divergence), 1 / sum_b, and the mean slopes under p and under q; sum_a is that of
exp((a - max_a) / T). Kept apart for the reason that softmax_kl.h gives. `rate` is log2(e) / T.
"""

import triton
import triton.language as tl

KULLBACK_LEIBLER = tl.constexpr(0)
JENSEN_SHANNON = tl.constexpr(1)
SKEWED_KL = tl.constexpr(2)
TOTAL_VARIATION = tl.constexpr(3)
# How logits are seen.
AS_THEY_ARE = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)

INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_ZERO_BELOW = tl.constexpr(-127.0)  # a power of 2 of less counts as 0


def _constants(*hexadecimal: str) -> list[tl.constexpr]:
    return [tl.constexpr(float.fromhex(digits)) for digits in hexadecimal]


# The minimax polynomials of exponential.h and divergences.h: (2^x - 1) / x from -1/2 to 0, and
# -log(1 + x) / x from sqrt(1/2) - 1 to 0.
_P0, _P1, _P2 = _constants("0x1.62e430p-1", "0x1.ebfbdep-3", "0x1.c6af6ep-5")
_P3, _P4, _P5 = _constants("0x1.3b2ba0p-7", "0x1.5f07b4p-10", "0x1.4308fap-13")
_L0, _L1, _L2 = _constants("-0x1p0", "0x1.fffff8p-2", "-0x1.555792p-2")
_L3, _L4, _L5 = _constants("0x1.000574p-2", "-0x1.98b6fcp-3", "0x1.53317ep-3")
_L6, _L7, _L8 = _constants("-0x1.323b02p-3", "0x1.26454ap-3", "-0x1.655140p-4")


@triton.jit
def exp2_minus_1(x):
    """Of x <= 0, with a small relative error everywhere; NaN counts as -inf."""
    x = tl.where(x > _ZERO_BELOW, x, _ZERO_BELOW)
    p = ((((x * _P5 + _P4) * x + _P3) * x + _P2) * x + _P1) * x + _P0
    return tl.where(x > -0.5, x * p, tl.exp2(x) - 1.0)


@triton.jit
def minus_log_plus_1(x):
    """Of -1 < x <= 0, with a small relative error everywhere."""
    p = (((x * _L8 + _L7) * x + _L6) * x + _L5) * x + _L4
    p = (((p * x + _L3) * x + _L2) * x + _L1) * x + _L0
    return tl.where(x > -0.29, x * p, -tl.log(1.0 + x))


@triton.jit
def seen(x, scale, cap, HOW: tl.constexpr):
    """cap * tanh(scale * x / cap), or scale * x."""
    if HOW == CAPPED:
        u = x * (scale / cap)
        minus_1 = exp2_minus_1(tl.abs(u) * (-2.0 * LOG2_E))
        size = cap * (-minus_1 / (minus_1 + 2.0))
        return tl.where(x == x, tl.where(u < 0, -size, size), x)
    elif HOW == SCALED:
        return x * scale
    else:
        return x


@triton.jit
def slope_of_seen(x, scale, cap, HOW: tl.constexpr):
    """How what is seen of x changes with x: scale / cosh(scale * x / cap)^2, or scale."""
    if HOW == CAPPED:
        power = tl.exp2(tl.abs(x * (scale / cap)) * (-2.0 * LOG2_E))
        return scale * 4.0 * power / ((1.0 + power) * (1.0 + power))
    else:
        return scale


@triton.jit
def _quotients(a, b, row, rate, scale):
    """log2(p / q), NaN where both are 0, and the larger of p and q, times `scale`."""
    max_a, max_b, log2_ratio, inverse_sum_b, _, _ = row
    x = a - max_a
    y = b - max_b
    bits = (x - y) * rate - log2_ratio
    scale_b = scale * inverse_sum_b
    scale_of = tl.where(bits > 0, scale_b * tl.exp2(-log2_ratio), scale_b)
    return bits, tl.exp2(tl.where(bits > 0, x, y) * rate) * scale_of


@triton.jit
def probabilities_and_slopes(a, b, row, rate, scale, beta, KIND: tl.constexpr):
    """p and q, times `scale`, and how a divergence but KL changes with p and with q: finite for
    all of them, and 0 where p = q."""
    bits, larger = _quotients(a, b, row, rate, scale)
    p_larger = bits > 0
    down = -tl.abs(bits)  # log2 of smaller / larger
    down = tl.where(down > _ZERO_BELOW, down, _ZERO_BELOW)
    smaller = larger * tl.exp2(down)  # not larger * (1 + e), which cancels
    p = tl.where(p_larger, larger, smaller)
    q = tl.where(p_larger, smaller, larger)
    if KIND == TOTAL_VARIATION:
        of_p = tl.where(p_larger, 0.5, tl.where(bits < 0, -0.5, 0.0))
        return p, q, of_p, -of_p
    else:
        e = exp2_minus_1(down)
        z = tl.where(p_larger, beta, 1.0 - beta) * e  # m / larger - 1, m the mixture
        of_larger = minus_log_plus_1(z)  # log(larger / m)
        of_smaller = of_larger + down * LN_2
        log_q = tl.where(p_larger, of_smaller, of_larger)
        if KIND == JENSEN_SHANNON:
            log_p = tl.where(p_larger, of_larger, of_smaller)
            return p, q, (1.0 - beta) * log_p, beta * log_q
        else:
            gap = e / (1.0 + z)  # -|p - q| / m
            common = (1.0 - beta) * tl.where(p_larger, gap, -gap)
            return p, q, -(1.0 - beta) * common, log_q - beta * common


@triton.jit
def divergence_gradient(a, b, row, rate, scale, beta, KIND: tl.constexpr, OF_B: tl.constexpr):
    """`scale` * T times the divergence's gradient with respect to b, or to a."""
    max_a, max_b, _, inverse_sum_b, mean_a, mean_b = row
    if KIND != KULLBACK_LEIBLER:
        p, q, of_p, of_q = probabilities_and_slopes(a, b, row, rate, scale, beta, KIND)
        return q * (of_q - mean_b) if OF_B else p * (of_p - mean_a)
    elif OF_B:
        power = tl.exp2((b - max_b) * rate)
        gradient = power * ((b - max_b) - (a - max_a) - mean_b) * (inverse_sum_b * rate * LN_2)
        return tl.where(power == 0, 0.0, gradient) * scale
    else:
        # p - q = sign * larger * (1 - smaller / larger): nothing cancels.
        bits, larger = _quotients(a, b, row, rate, scale)
        gap = larger * exp2_minus_1(-tl.abs(bits))
        return tl.where(bits > 0, -gap, gap)
