"""What the published procedure computes on the authors' models: one row for each model.

    python experiments/diagnosis.py --reference DIR

Needs CIFAR-10 and GTSRB (TFDS_DATA_DIR) and the folder of the published checkpoints. At the
perturbation of the published ascent: how far it is from a stationary point, the extreme
eigenvalues of the inner Hessian there (Lanczos), the contraction factor of the published fixed
point, in how many of the batches the one patched image gives a slope at all, and what the
published terms are worth against a long normal-CG solve (median over the first `--batches` with a
slope). Rows go to `experiments/results/diagnosis.jsonl`, in place of older ones of the same model;
the table is printed.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from grid import read
from jax.flatten_util import ravel_pytree
from published_models import MODELS

from ibau_jax import IBAUConfig, load
from ibau_jax.hypergradient import Direct, Neumann, NormalCG, hypergradient
from ibau_jax.hypergradient.solvers import arnoldi
from ibau_jax.models.architectures import build
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.torch_import import convert_pth
from ibau_jax.results.rows import write_rows
from ibau_jax.unlearning.batches import make_batches, resolve
from ibau_jax.unlearning.ibau import ibau
from ibau_jax.unlearning.objective import make_inner, make_loss, patch, pick

RESULTS = Path(__file__).parent / "results" / "diagnosis.jsonl"


@dataclass
class Settings:
    """Diagnose the published procedure."""

    reference: Path
    """Folder of the published models (checkpoints/)."""
    models: tuple[str, ...] = tuple(MODELS)
    lanczos: int = 40
    """Products for the extreme eigenvalues."""
    exact: int = 60
    """Steps of the normal-CG solve that counts as exact."""
    batches: int = 5
    """Outer batches to solve for."""
    out: Path = RESULTS


def diagnose(settings: Settings, name: str) -> dict[str, Any]:
    file, dataset, _, _ = MODELS[name]
    path = settings.reference / "checkpoints" / f"{file}_ckpt.pth"
    variables, classes, _ = convert_pth(path)
    logits, params = evaluation_logits(build("vgg", classes), variables), variables["params"]
    clean = load(dataset, "test[:5000]")
    config = resolve(IBAUConfig.published(dataset), logits, params, clean.images)
    batches, sizes = make_batches(clean, config)
    loss = make_loss(logits, config)
    inner_of = make_inner(loss, config)
    first = pick(batches, 0)

    def inner(d, p):
        return inner_of(d, p, first)

    @jax.jit
    def patched(number):
        return patch(
            jax.random.fold_in(jax.random.key(0), number), pick(batches, number), config.share
        )

    free = replace(config, radius=1e9)
    raw, _ = ibau(logits, free, len(sizes)).ascend(params, batches, 0)
    delta = config.ball.project(raw)
    value = jax.jit(jax.value_and_grad(inner))
    start_value, start_slope = value(jnp.zeros_like(delta), params)
    end_value, end_slope = value(delta, params)
    # On the sphere a maximum has its whole slope along delta; what is left is the distance to it.
    unit = delta / jnp.linalg.norm(delta)
    tangential = end_slope - jnp.sum(end_slope * unit) * unit

    @jax.jit
    def spectrum(d, p):
        _, hessian = jax.linearize(lambda d: jax.grad(inner)(d, p), d)
        start = jax.random.normal(jax.random.key(1), d.shape)
        return arnoldi(hessian, start, settings.lanczos)[1][:-1]

    small = np.asarray(spectrum(delta, params), np.float64)
    values = np.linalg.eigvalsh((small + small.T) / 2)

    slope = jax.jit(lambda d, p, batch: jnp.linalg.norm(jax.grad(loss)(d, p, batch)))
    slopes = np.array([slope(delta, params, patched(i)) for i in range(len(sizes))])
    chosen = np.flatnonzero(slopes)[: settings.batches]

    def solver(method):
        @jax.jit
        def run(d, p, batch):
            def outer(d, p):
                return loss(d, p, batch)

            _, gradient, report = hypergradient(
                outer, inner, d, p, solver=method, keep_diverged=True
            )
            return ravel_pytree(gradient)[0], report.residual

        def solve(number):
            gradient, residual = run(delta, params, patched(number))
            return np.asarray(gradient, np.float64), float(residual)

        return solve

    exact_solver = NormalCG(settings.exact, damping=0.1)
    methods = [solver(m) for m in (Direct(), exact_solver, Neumann(5, 0.1), Neumann(20, 0.1))]

    def terms(number) -> dict[str, float]:
        (direct, _), (exact, exact_residual), (five, residual_5), (twenty, residual_20) = (
            solve(number) for solve in methods
        )
        return {
            "residual_5": residual_5,
            "residual_20": residual_20,
            "residual_exact": exact_residual,
            "direct_norm": float(np.linalg.norm(direct)),
            "implicit_norm_5": float(np.linalg.norm(five - direct)),
            "implicit_norm_20": float(np.linalg.norm(twenty - direct)),
            "implicit_norm_exact": float(np.linalg.norm(exact - direct)),
            "cosine_5_exact": cosine(five - direct, exact - direct),
            "cosine_5_direct": cosine(five, direct),
        }

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    found = [terms(number) for number in chosen]
    return {
        "model": name,
        "ascent_norm": float(jnp.linalg.norm(raw)),
        "delta_norm": float(jnp.linalg.norm(delta)),
        "loss_at_zero": -float(start_value),
        "loss_at_delta": -float(end_value),
        "slope_at_zero": float(jnp.linalg.norm(start_slope)),
        "slope_at_delta": float(jnp.linalg.norm(end_slope)),
        "tangential_slope": float(jnp.linalg.norm(tangential)),
        "smallest_eigenvalue": float(values[0]),
        "largest_eigenvalue": float(values[-1]),
        "contraction": float(np.abs(1 - 0.1 * values[[0, -1]]).max()),
        "batches_without_slope": float(np.mean(slopes == 0)),
        "outer_slope": float(np.median(slopes)),
        **{key: float(np.median([row[key] for row in found])) for key in found[0]},
    }


def main(settings: Settings) -> None:
    rows = {row["model"]: row for row in read(settings.out)}
    for name in settings.models:
        rows[name] = diagnose(settings, name)
        write_rows(settings.out, [rows[n] for n in MODELS if n in rows])
        print(name, file=sys.stderr, flush=True)
    shown = [rows[name] for name in settings.models]
    print("| |", " | ".join(row["model"] for row in shown), "|")
    print("|---" * (len(shown) + 1) + "|")
    for key in list(shown[0])[1:]:
        print(f"| {key.replace('_', ' ')} |", " | ".join(f"{row[key]:.3g}" for row in shown), "|")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
