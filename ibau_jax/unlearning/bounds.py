"""The paper's three theorems as numbers: a diagnostic of a model, not a guarantee in practice.

Theorem 1 bounds the error of the hypergradient after t inner steps and t terms, Theorem 2 the
risk under a universal perturbation for linear models, Theorem 3 the same for networks (a margin
bound after Bartlett, Foster, Telgarsky 2017). For a real network the third is far above 1, that
is, vacuous; `Bound.vacuous` says so.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.errors import InputError
from ibau_jax.hypergradient.solvers import arnoldi
from ibau_jax.models.convolution import convolve


class Convergence(NamedTuple):
    """Constants of Theorem 1 at one parameter vector; the inner loss is strongly convex in delta.

    Attributes:
      mu, smoothness: smallest and largest eigenvalue of the inner Hessian anywhere.
      outer_delta: Lipschitz constant of d1 outer in delta (eta_1).
      outer_params: Lipschitz constant of d2 outer in delta (eta_2).
      slope: bound of ||d1 outer|| in the ball (L_{H,theta}).
      mixed: bound of ||d21 inner|| (L_h).
      radius: bound of ||delta(params)|| (C_delta).
      hessian_drift, mixed_drift: Lipschitz constants of d11 and d21 inner in delta (rho_1, rho_2).
      step_slope: ||d alpha / d params||, 0 where the step does not depend on the parameters.
    """

    mu: float
    smoothness: float
    outer_delta: float
    outer_params: float
    slope: float
    mixed: float
    radius: float
    hessian_drift: float = 0.0
    mixed_drift: float = 0.0
    step_slope: float = 0.0

    @property
    def step(self) -> float:
        """alpha = 2 / (L + mu), the step that contracts best."""
        return 2 / (self.smoothness + self.mu)

    @property
    def factor(self) -> float:
        """q = max(1 - alpha mu, alpha L - 1), the contraction of one step."""
        return max(1 - self.step * self.mu, self.step * self.smoothness - 1)

    def bound(self, t: int) -> float:
        """Equation (5): error of the hypergradient after t steps from 0 and t terms.

        The inner error falls by `factor` a step, so rho(t) = q^t.
        """
        q, alpha = self.factor, self.step
        c1 = (self.outer_params + self.outer_delta * self.mixed * alpha / (1 - q)) * self.radius
        drift = self.smoothness * self.step_slope + self.mixed_drift * alpha
        drift += self.hessian_drift * self.mixed * alpha**2 / (1 - q)
        c2 = self.slope * self.radius * drift
        c3 = self.slope * self.mixed * alpha / (1 - q)
        return (c1 + c2 * (1 - q**t) / (1 - q)) * q**t + c3 * q**t


class Bound(NamedTuple):
    """An upper bound of the error rate under any perturbation of norm at most C, by its terms."""

    empirical_risk: float
    complexity: float
    confidence: float
    details: dict[str, Any]

    @property
    def total(self) -> float:
        return self.empirical_risk + self.complexity + self.confidence

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing: an error rate is at most 1 anyway."""
        return self.total >= 1


def linear_bound(
    empirical_risk: float, weight_norm: float, input_norm: float, radius: float, n: int, xi: float
) -> Bound:
    """Theorem 2 (equation 6), with probability 1 - xi over n clean images.

    `weight_norm` bounds the weights, `input_norm` each image, `radius` the perturbation (l2).
    """
    complexity = 2 * weight_norm * (input_norm + radius) / math.sqrt(n)
    return Bound(empirical_risk, complexity, _confidence(n, xi), {})


def network_bound(
    empirical_risk: float,
    spectral: np.ndarray,
    two_one: np.ndarray,
    *,
    widest: int,
    first_width: int,
    data_norm: float,
    radius: float,
    margin: float,
    n: int,
    xi: float,
) -> Bound:
    """Theorem 3 (equation 7), with probability 1 - xi over n clean images.

    Args:
      spectral: s_i, spectral norm of each layer.
      two_one: a_i, (2, 1) norm of each layer; the first becomes a_0 (1 + m_1 sqrt(n) C).
      widest: W, the largest number of units of any layer, the input included.
      first_width: m_1, units of the first layer.
      data_norm: ||X||, Frobenius norm of the n images.

    Nonlinearities are 1-Lipschitz and 0 at 0 (ELU and max pooling are). The theorem knows no
    biases; those of the model are left out of its norms.
    """
    if not margin > 0:
        raise InputError(f"the margin is {margin}: expected a positive number")
    norms = np.array(two_one, np.float64)
    norms[0] *= 1 + first_width * math.sqrt(n) * radius
    spectral = np.asarray(spectral, np.float64)
    product = float(np.prod(spectral))
    ratio = float(np.sum((norms / spectral) ** (2 / 3)) ** 1.5)
    data = (data_norm + math.sqrt(n)) * math.sqrt(math.log(2 * widest * (widest + n)))
    complexity = 8 / n + 48 * math.log(n) * data / (margin * n) * product * ratio
    details = {"spectral_product": product, "norm_ratio": ratio, "data_term": data}
    return Bound(empirical_risk, complexity, _confidence(n, xi), details)


def margin_risk(logits: np.ndarray, labels: np.ndarray, margin: float) -> float:
    """Share of rows whose true logit is not above every other by more than `margin`."""
    logits, rows = np.asarray(logits), np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return float(np.mean(logits[rows, labels] <= margin + others.max(-1)))


def spectral_norm(
    linear: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], steps: int = 40
) -> float:
    """Largest singular value of a linear map on arrays of `shape`, by Lanczos' method.

    (Power iteration with memory: it needs far fewer products where the largest values lie close
    together.) The map itself is iterated, a convolution with its padding and at its real size,
    never a reshaped kernel, whose norm is another number.
    """
    start = jax.random.normal(jax.random.key(0), shape)
    transpose = jax.linear_transpose(linear, start)
    _, small = jax.jit(lambda v: arnoldi(lambda x: transpose(linear(x))[0], v, steps))(start)
    square = np.asarray(small[:-1], np.float64)
    return math.sqrt(max(np.linalg.eigvalsh((square + square.T) / 2)[-1], 0.0))


def two_one_norm(kernel: Any, size: int = 1) -> float:
    """Sum over the units of a layer of the l2 norm of each one's weights, ||A^T||_(2,1).

    For a convolution [3, 3, C, D] at size x size, units at the border have fewer weights.
    """
    if kernel.ndim == 2:
        return float(np.linalg.norm(kernel, axis=0).sum())
    ones = jnp.ones((1, size, size, kernel.shape[2]))
    return float(jnp.sqrt(convolve(ones, jnp.square(kernel))).sum())


class Layer(NamedTuple):
    """One linear layer: its name, map, input shape, weights and number of units."""

    name: str
    linear: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...]
    kernel: Any
    units: int


def vgg_layers(variables: Any, size: int = 32) -> Iterator[Layer]:
    """The linear layers of our VGG, batch norm folded in (its scale is part of the map)."""
    params, statistics = variables["params"], variables["batch_stats"]
    for name in sorted(statistics, key=lambda n: int(n.removeprefix("conv"))):
        weights, var = params[name], statistics[name]["var"]
        kernel = jnp.asarray(weights["kernel"] * (weights["scale"] / np.sqrt(var + 1e-5)))
        units = size * size * kernel.shape[-1]
        yield Layer(
            name,
            lambda x, k=kernel: convolve(x, k),
            (1, size, size, kernel.shape[2]),
            kernel,
            units,
        )
        if int(name.removeprefix("conv")) % 2 == 0:  # max pooling after each second one
            size //= 2
    kernel = jnp.asarray(params["classifier"]["kernel"])
    yield Layer("classifier", lambda x: x @ kernel, (1, kernel.shape[0]), kernel, kernel.shape[1])


def vgg_bound(
    variables: Any,
    logits: Callable[[Any, jax.Array], jax.Array],
    clean: Dataset,
    delta: np.ndarray,
    *,
    radius: float,
    margin: float = 1.0,
    xi: float = 0.05,
) -> Bound:
    """Theorem 3 for a trained VGG: its empirical risk at one perturbation, and its norms.

    The theorem's risk is the largest over all perturbations; `delta` [H, W, C], from an ascent,
    makes it a lower estimate of that. `details["layers"]` lists name, spectral norm, (2, 1) norm
    and units of each layer.
    """
    images, labels = np.asarray(clean.images), np.asarray(clean.labels)
    size, n = images.shape[1], len(images)
    layers = list(vgg_layers(variables, size))
    spectral = np.array([spectral_norm(layer.linear, layer.shape) for layer in layers])
    two_one = np.array([two_one_norm(layer.kernel, layer.shape[1]) for layer in layers])
    run = jax.jit(lambda x: logits(variables["params"], x + delta))
    found = np.concatenate([run(images[i : i + 100]) for i in range(0, n, 100)])
    bound = network_bound(
        margin_risk(found, labels, margin),
        spectral,
        two_one,
        widest=max(images[0].size, *(layer.units for layer in layers)),
        first_width=layers[0].units,
        data_norm=float(np.linalg.norm(images)),
        radius=radius,
        margin=margin,
        n=n,
        xi=xi,
    )
    columns = zip(layers, spectral, two_one, strict=True)
    rows = [
        {"layer": layer.name, "spectral": float(s), "two_one": float(a), "units": layer.units}
        for layer, s, a in columns
    ]
    return bound._replace(details={**bound.details, "layers": rows})


def _confidence(n: int, xi: float) -> float:
    if not 0 < xi < 1:
        raise InputError(f"xi is {xi}: expected a probability in (0, 1)")
    return 3 * math.sqrt(math.log(1 / xi) / (2 * n))
