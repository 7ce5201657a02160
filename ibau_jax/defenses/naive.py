"""Adversarial training with universal perturbations: the paper's "naive" method (section 4).

    for each round:
        v = a universal perturbation of some clean images           # see deepfool.py
        for each clean batch:
            params <- params - rate * d2 H(v, params)                # H: equation (1)

What I-BAU is compared with in Figure 1, of which the paper gives no details ("the same setting for
the two"). So the outer step is like that of I-BAU's published code, with patched images kept in
[0, 1] (there on GTSRB only) and at `cpu` a tenth of a batch patched (there a hundredth). What
differs in kind is how the perturbation is found, and that its dependence on the parameters is
ignored.

The perturbations need not have to do with the trigger: on the authors' BadNets model (target 8)
the first one of 500 images sends three quarters of what it fools to class 2 and nearly none to 8.
So it lies in the method that ASR falls slowly and erratically.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from ibau_jax.defenses.deepfool import Universal, chunks, make_search
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.devices.losses import Losses
from ibau_jax.errors import check_positive
from ibau_jax.hypergradient import Direct
from ibau_jax.models.model import fixed_of, of_params
from ibau_jax.progress import note_of
from ibau_jax.training.optimizers import Adam, Optimizer, shown
from ibau_jax.unlearning.batches import make_batches, resolve, shuffled
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.ibau import ibau


@dataclass(frozen=True)
class Naive:
    """How to train against universal perturbations.

    Attributes:
      rounds: perturbations, and passes over the clean set.
      images: clean images, drawn anew in each round, that a perturbation is made of (all, where
        there are fewer).
      universal: how it is made.
      batch_size: clean images in a batch (a smaller clean set is one batch).
      share: share of each batch that carries the perturbation; at least one image always does.
        The paper's equation (1) has 1, I-BAU's published code 0.01.
      outer_optimizer: of the parameters.
    """

    rounds: int = 5
    images: int = 500
    universal: Universal = Universal()  # noqa: RUF009  (frozen)
    batch_size: int = 100
    share: float = 1.0
    outer_optimizer: Optimizer = Adam(1e-3)  # noqa: RUF009

    def __post_init__(self):
        check_positive(self, "images")
        _ = self.outer  # checks the rest

    @property
    def outer(self) -> IBAUConfig:
        """The training step: I-BAU's own without its implicit term; patched images are clipped."""
        return replace(
            IBAUConfig.untargeted(),
            rounds=self.rounds,
            batch_size=self.batch_size,
            share=self.share,
            outer_optimizer=self.outer_optimizer,
            solver=Direct(),
        )


PRESETS = {
    "cpu": lambda dataset: Naive(rounds=3, images=100, share=0.1),
    # "The same setting for the two" (section 6.2), and ACC is only slightly below I-BAU's there:
    # so the share is that of I-BAU's published code. With 1, ACC on BadNets falls by 0.15 in the
    # first round.
    "paper": lambda dataset: Naive(share=0.01),
}


@method(Naive(rounds=3, images=100, share=0.1))
def naive(job: Job) -> Rounds:
    """Train on clean images with a universal perturbation, again and again.

    Batch statistics and dropout are as in evaluation, also of a `Classifier`. The perturbation is
    computed on one device of each process, the training is spread; see `deepfool.make_search` for
    what rounding can do.

    A row has `fooling_rate`, `unconverged` and `passes` of the perturbation (see `deepfool.Found`),
    its `delta_norm` in the norm of its ball, and `loss`, the mean over the pass. `deltas` are the
    perturbations.
    """
    config, devices, clean = job.config, job.devices, job.clean
    logits, params = of_params(job.model, job.variables), job.variables["params"]
    with job.compiling():
        outer = resolve(config.outer, logits, params, clean.images, len(devices.all))
    job.advice = (
        "expected an outer_optimizer that the model bears, found "
        f"{shown(config.outer_optimizer)}; choose a smaller rate"
    )
    count = min(config.images, len(clean.images))
    order_key, batch_key, key = jax.random.split(job.key, 3)
    batches, sizes = make_batches(shuffled(clean, batch_key), outer, devices)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
    fixed = devices.replicate(fixed_of(job.variables))
    algorithm = ibau(job.model, outer, len(sizes), devices.axis, job.program, fixed)
    with job.compiling():
        state = devices.replicate(jax.jit(algorithm.init)(params, key))
        search = make_search(
            logits, devices.one(state.params), clean.images[:count], config.universal
        )
    row: dict[str, Any] = {}
    yield job.variables, row
    deltas: list[np.ndarray] = []
    in_search = config.universal.passes * chunks(count)
    steps = config.rounds * (in_search + len(sizes))
    with job.progress(steps, "adversarial training") as advance:
        for _ in range(config.rounds):
            chosen = clean.images[rng.choice(len(clean.images), count, replace=False)]
            found = search(devices.one(state.params), chosen, rng, advance)
            advance(in_search - found.passes * chunks(count), note_of(row))
            delta = devices.replicate(found.delta)
            losses = Losses(devices, partial(job.check_finite, "the loss"))
            for index in range(len(sizes)):
                state, step = algorithm.descend(state, delta, batches, index)
                losses.add(step.loss)
                advance(1)
            devices.check_equal(state=state, delta=delta)
            deltas.append(np.asarray(found.delta))
            row = {
                "delta_norm": float(config.universal.ball.size(found.delta)),
                "fooling_rate": found.fooling_rate,
                "unconverged": found.unconverged,
                "passes": found.passes,
                "loss": float(np.mean(losses.read())),
            }
            yield {**job.variables, "params": devices.one(state.params)}, row
        advance(0, note_of(row))
    return Told(deltas=np.stack(deltas))
