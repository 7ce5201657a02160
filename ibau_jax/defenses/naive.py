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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.defenses.deepfool import Universal, chunks, make_search
from ibau_jax.defenses.run import Run, check_positive
from ibau_jax.devices import mesh, processes
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError
from ibau_jax.hypergradient import Direct
from ibau_jax.models.model import Logits, Params, of_params, opened
from ibau_jax.progress import progress_bar
from ibau_jax.unlearning.batches import check_clean, make_batches, resolve, shuffled
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.ibau import Result, make_descent


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
      outer_rate: learning rate of Adam.
    """

    rounds: int = 5
    images: int = 500
    universal: Universal = Universal()  # noqa: RUF009  (frozen)
    batch_size: int = 100
    share: float = 1.0
    outer_rate: float = 1e-3

    def __post_init__(self):
        check_positive(self, "images")
        _ = self.outer  # checks the rest

    @property
    def outer(self) -> IBAUConfig:
        """The training step: I-BAU's own without its implicit term; patched images are clipped."""
        return IBAUConfig(
            rounds=self.rounds,
            batch_size=self.batch_size,
            share=self.share,
            outer_optimizer="adam",
            outer_rate=self.outer_rate,
            outer_clip=None,
            outer_decay="none",
            solver=Direct(),
        )


PRESETS = {
    "cpu": lambda dataset: Naive(rounds=3, images=100, share=0.1),
    # "The same setting for the two" (section 6.2), and ACC is only slightly below I-BAU's there:
    # so the share is that of I-BAU's published code. With 1, ACC on BadNets falls by 0.15 in the
    # first round.
    "paper": lambda dataset: Naive(share=0.01),
}


def naive(
    logits: Logits,
    params: Params,
    clean: Dataset,
    *,
    config: Naive = Naive(rounds=3, images=100, share=0.1),  # noqa: B008  (frozen)
    key: jax.Array,
    evaluate: Callable[[Params], Mapping[str, Any]] | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
    devices: Devices | None = None,
) -> Result:
    """Train on clean images with a universal perturbation, again and again.

    Arguments and result are those of `ibau_jax.unlearn`. Batch statistics and dropout are as in
    evaluation, also of a `Classifier`. The perturbation is computed on one device of each
    process, the training is spread; see `deepfool.make_search` for what rounding can do.

    Records of a round: `fooling_rate`, `unconverged` and `passes` of the perturbation (see
    `deepfool.Found`), its `delta_norm` in the norm of its ball, and `loss`, the mean over the
    pass. `deltas` are the perturbations.

    Raises:
      InputError: as `unlearn`.
    """
    clean = check_clean(logits, params, clean)
    devices = devices or mesh.devices()
    model, variables = opened(logits, params)

    frozen = of_params(model, variables)
    outer = resolve(
        config.outer, frozen, variables["params"], clean.images, num_devices=len(devices.all)
    )
    count = min(config.images, len(clean.images))
    order_key, batch_key, key = jax.random.split(key, 3)
    batches, sizes = make_batches(shuffled(clean, batch_key), outer, devices)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
    run = Run(model, params, evaluate, on_round)

    optimizer = outer.outer_transform(config.rounds * len(sizes))
    with run.compiling():
        opt_state = jax.jit(optimizer.init)(variables["params"])
    state = devices.replicate((variables["params"], opt_state, key))
    zero, first = devices.replicate((jnp.zeros_like(clean.images[0]), np.int32(0)))
    descent = make_descent(frozen, outer, optimizer, devices.axis)
    descend = run.compile(devices, descent, state, zero, batches, first, rows=(2,))
    with run.compiling():
        search = make_search(frozen, devices.one(state[0]), clean.images[:count], config.universal)

    deltas: list[np.ndarray] = []
    in_search = config.universal.passes * chunks(count)
    title, steps = "adversarial training", config.rounds * (in_search + len(sizes))
    run.record(variables)
    with progress_bar(steps, title, progress) as advance:
        for round_ in range(1, config.rounds + 1):
            chosen = clean.images[rng.choice(len(clean.images), count, replace=False)]
            found = search(devices.one(state[0]), chosen, rng, lambda n: advance(n, ""))
            advance(in_search - found.passes * chunks(count), "")
            delta = devices.replicate(found.delta)
            losses: list[float] = []
            for index in devices.each(len(sizes)):
                with processes.watch():
                    state, step = descend(state, delta, batches, index)
                    losses.append(float(devices.one(step).loss))
                if not np.isfinite(losses[-1]):
                    raise InputError(
                        f"the loss is {losses[-1]} at step {len(losses)} of round {round_}: "
                        "expected a rate that the model bears, found Adam with an outer_rate of "
                        f"{config.outer_rate:g}; choose a smaller one"
                    )
                advance(1, "")
            devices.check_equal(params=state[0], optimizer=state[1], delta=delta)
            deltas.append(np.asarray(found.delta))
            record = run.record(
                {**variables, "params": devices.one(state[0])},
                delta_norm=float(config.universal.ball.size(found.delta)),
                fooling_rate=found.fooling_rate,
                unconverged=found.unconverged,
                passes=found.passes,
                loss=float(np.mean(losses)),
            )
            shown = ("fooling_rate", "acc", "asr")
            values = [f"{k} {record[k]:.3f}" for k in shown if record.get(k) is not None]
            advance(0, " ".join(values))
    result = run.result({**variables, "params": devices.one(state[0])})
    return result._replace(deltas=np.stack(deltas))
