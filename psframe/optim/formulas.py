"""The update rules, one scalar function each: the only place where a formula stands.

Each takes one parameter `w`, its gradient `g`, its slots and the rule's scalars, and returns the
new parameter and slots. From these functions numba compiles the loops for the CPU (`cpu.py`) and
`cuda.py` writes the kernels for the GPU.

So they may hold only assignments, + - * /, `sqrt` and one comparison in a conditional expression;
every operand has the array's dtype, and there are no literals in the arithmetic (one float64
literal would turn a float32 loop into a float64 one). Every rule but `average` begins with
`g * scale`, the clipping, and `decay * w`, the L2 penalty; with `scale` 1 and `decay` 0 both change
no value.
"""

from __future__ import annotations

from math import sqrt

__all__ = [
    "SCALARS_MAX",
    "adagrad",
    "adam",
    "add",
    "average",
    "delayed_nesterov",
    "first",
    "momentum",
    "rmsprop",
    "sgd",
    "share",
]

# The length of the array in which the scalars reach a kernel: Adam's number.
SCALARS_MAX = 10


def average(w: float, g: float, mu: float, one_minus_mu: float) -> float:
    """Average an observation g in: mu w + (1 - mu) g. It is no gradient: nothing scales it."""
    return mu * w + one_minus_mu * g


def sgd(w: float, g: float, scale: float, decay: float, lr: float) -> float:
    """Step against the gradient: w - lr g."""
    return w - lr * (g * scale + decay * w)


def momentum(
    w: float,
    g: float,
    m: float,
    scale: float,
    decay: float,
    lr: float,
    mu: float,
    nesterov: float,
) -> tuple[float, float]:
    """Step against the velocity m = mu m + g, or with Nesterov against g + mu m."""
    g = g * scale + decay * w
    m = mu * m + g
    step = g + mu * m if nesterov != 0 else m
    return w - lr * step, m


def delayed_nesterov(
    w: float,
    g: float,
    m: float,
    d: float,
    scale: float,
    decay: float,
    lr: float,
    mu: float,
    part: float,
    ahead: float,
    full: float,
) -> tuple[float, float, float]:
    """Step against part g + ahead m; the velocity m takes in d, the sum of part g, if it is full.

    d - d is 0 where d is finite; where it is not, neither is m, and the update is refused.
    """
    g = (g * scale + decay * w) * part
    d = d + g
    m = mu * m + d if full != 0 else m
    return w - lr * (ahead * m + g), m, d - d if full != 0 else d


def adagrad(
    w: float, g: float, s: float, scale: float, decay: float, lr: float, eps: float
) -> tuple[float, float]:
    """Divide the step by the root of s, the sum of all squared gradients."""
    g = g * scale + decay * w
    s = s + g * g
    return w - lr * (g / (sqrt(s) + eps)), s


def rmsprop(
    w: float,
    g: float,
    v: float,
    scale: float,
    decay: float,
    lr: float,
    rho: float,
    one_minus_rho: float,
    eps: float,
) -> tuple[float, float]:
    """Divide the step by the root of v, the running mean of the squared gradients."""
    g = g * scale + decay * w
    v = rho * v + one_minus_rho * (g * g)
    return w - lr * (g / (sqrt(v) + eps)), v


def adam(
    w: float,
    g: float,
    m: float,
    v: float,
    scale: float,
    decay: float,
    lr_decay: float,
    step: float,
    beta1: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    unbias: float,
    eps: float,
) -> tuple[float, float, float]:
    """Step along the running mean over the root of the running mean square.

    step = lr / (1 - beta1^t) and unbias = 1 / sqrt(1 - beta2^t) carry the bias corrections;
    `decay` is Adam's L2 penalty, `lr_decay` = lr * weight_decay is AdamW's decoupled one.
    """
    g = g * scale + decay * w
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    return w - (step * (m / (sqrt(v) * unbias + eps)) + lr_decay * w), m, v


# What a server on a GPU makes the mean of a round with; on the CPU it is NumPy that does.


def first(t: float, g: float, scale: float) -> float:
    """Begin a sum."""
    return g * scale


def add(t: float, g: float, scale: float) -> float:
    """Add to a sum."""
    return t + g * scale


def share(g: float, count: float) -> float:
    """Make a sum of so many a mean."""
    return g / count
