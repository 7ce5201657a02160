"""SAU (Wei et al., NeurIPS 2023): unlearn adversarial examples that the given model shares.

For each image a perturbation d that misleads the model as it was given and the one that is tuned
towards the same wrong label (where backdoors lie); then the tuned one learns "not that label":

    d: minimise  (-weight / 2) (CE_f + CE_f0) + JS(p_f(x + d), p_f0(x + d))       |d| <= radius
    f: minimise  CE(f(x), y) + mean over misled f0 of -log(1 - p_f[label that f0 gives x + d])

That asks for less than robustness, so accuracy stays.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ibau_jax.defenses.finetune import Tuning, tune
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.devices import mesh
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.model import Model, Variables
from ibau_jax.training.loop import batch_mean
from ibau_jax.training.optimizers import Adam
from ibau_jax.unlearning.objective import clip_images, cross_entropy, not_that_label


@dataclass(frozen=True)
class SAUConfig:
    """Settings of SAU.

    Attributes:
      radius: largest |d| of a pixel, images being in [0, 1].
      steps, rate: of the search for d: steps of so much along the sign of its slope.
      weight: of the two cross-entropies in the search.
      shared: weight of the term that unlearns (the authors' 1 costs more accuracy in two epochs).
      tuning: of the model. Its statistics and dropout are as in evaluation.
    """

    radius: float = 0.2
    steps: int = 5
    rate: float = 0.2
    weight: float = 0.01
    shared: float = 0.3
    tuning: Tuning = Tuning(  # noqa: RUF009  (frozen)
        epochs=2, steps=100, batch_size=100, optimizer=Adam(1e-3, schedule="cosine")
    )

    def __post_init__(self):
        check_positive(self, "radius", "steps", "rate", "weight")
        if self.shared < 0:
            raise InputError(f"shared is {self.shared}: expected at least 0")


PRESETS = {
    "cpu": lambda dataset: SAUConfig(),
    "paper": lambda dataset: SAUConfig(
        shared=1.0,
        tuning=Tuning(epochs=100, batch_size=256, optimizer=Adam(1e-4)),
    ),
}


@method(SAUConfig())
def sau(job: Job) -> Rounds:
    """Unlearn the adversarial examples that the given model shares (Wei et al., NeurIPS 2023).

    Statistics and dropout are as in evaluation, also of a `Classifier` (frozen statistics keep more
    accuracy, say its authors). A round is an epoch, with its mean `loss`.
    """
    yield job.variables, {}
    given = jax.tree.map(np.asarray, job.variables)  # constants of the program
    objective = shared_unlearning(job.model, given, job.config, job.devices.axis)
    yield from tune(
        job, job.variables, job.clean, job.config.tuning, key=job.key, objective=objective,
        title="SAU",
    )  # fmt: skip
    return Told()


def shared_unlearning(model: Model, given: Variables, config: SAUConfig, axis: str | None):
    """The objective of the tuned model; see `training.loop`."""

    def objective(params, others, images, labels, weights, key):
        del key
        variables = {"params": params, **others}
        fixed = lax.stop_gradient(variables)
        added = search(model, fixed, given, images, labels, config)
        wrong = jnp.argmax(model(given, clip_images(images + added)), -1)
        logits = model(variables, clip_images(images + added))
        misled = wrong != labels
        unlearned = jnp.where(misled, not_that_label(logits, wrong), 0)
        clean = batch_mean(cross_entropy(model(variables, images), labels), weights, axis)
        share = mesh.total(batch_mean(misled.astype(images.dtype), weights, axis), axis)
        mean = batch_mean(unlearned, weights, axis) / jnp.maximum(share, 1e-6)
        return clean + config.shared * mean, others

    return objective


def search(
    model: Model,
    tuned: Variables,
    given: Variables,
    images: jax.Array,
    labels: jax.Array,
    config: SAUConfig,
) -> jax.Array:
    """What is added to each image, [N, H, W, C] in [-radius, radius].

    A model that an image misleads already is not pushed further; nor are two models that it leads
    to the same wrong label pulled together.
    """

    def height(added):
        shown = clip_images(images + added)
        one, two = model(tuned, shown), model(given, shown)
        first, second = jnp.argmax(one, -1), jnp.argmax(two, -1)
        losses = jnp.where(first == labels, cross_entropy(one, labels), 0)
        losses += jnp.where(second == labels, cross_entropy(two, labels), 0)
        done = (first == second) & (first != labels)
        apart = jnp.where(done, 0, divergence(one, two))
        return jnp.sum(apart - config.weight / 2 * losses)

    def step(_, added):
        moved = added - config.rate * jnp.sign(jax.grad(height)(added))
        return jnp.clip(moved, -config.radius, config.radius)

    return lax.fori_loop(0, config.steps, step, jnp.full_like(images, config.radius))


def divergence(one: jax.Array, two: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence of the softmaxes of logits: [N, C], [N, C] -> [N]."""
    p, q = jax.nn.log_softmax(one), jax.nn.log_softmax(two)
    middle = jnp.logaddexp(p, q) - jnp.log(2.0).astype(p.dtype)
    terms = jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle)
    return jnp.sum(terms, -1) / 2
