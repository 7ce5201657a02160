"""DP-SGD: train anew on the poisoned set, with no image given much of a say (Du et al. 2019).

    g_i <- g_i * min(1, C / ||g_i||)          each image's gradient, all parameters together
    theta <- theta - rate * (sum_i g_i + N(0, (sigma C)^2)) / B

A backdoor is learned from few images, whose gradients stand out; clipping and noise hide them.
What is left of the accuracy is another matter: with the paper's sigma of 50 the weights are noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told, finite
from ibau_jax.devices.losses import Losses
from ibau_jax.devices.microbatch import accumulate
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.model import Model, Params, Variables, needs_init
from ibau_jax.progress import note_of
from ibau_jax.training.loop import Rows, batches_of, shuffled
from ibau_jax.unlearning.batches import check_clean

DELTA = 1e-5  # of the privacy that is reported, as in the code of Du et al.


@dataclass(frozen=True)
class DPSGD:
    """How to train; `DPSGD()` is the preset `cpu` for CIFAR-10.

    Attributes:
      epochs: passes over the poisoned set.
      batch_size: B; a last partial batch of an epoch is left out.
      rate: learning rate of plain SGD.
      l2_norm_clip: C, the largest norm of one image's gradient.
      noise_multiplier: sigma; the noise has the deviation sigma * C / B. 0: none.
      chunk: images whose gradients a device holds at once (1.2 MB each for the paper's VGG); it
        does not change the result. None: 10 on a CPU, where they stay in the cache, else all.
    """

    epochs: int = 1
    batch_size: int = 200
    rate: float = 0.15
    l2_norm_clip: float = 1.0
    noise_multiplier: float = 50.0
    chunk: int | None = None

    def __post_init__(self):
        check_positive(self, "epochs", "batch_size", "rate", "l2_norm_clip", "chunk")
        for name in ("l2_norm_clip", "noise_multiplier"):
            if not 0 <= (value := getattr(self, name)) < np.inf:
                raise InputError(f"{name} is {value}: expected a finite number, at least 0")


# The paper tells sigma (A.3.2) and refers to Du et al. for the rest, which is from their code.
SIGMAS = {"gtsrb": 1.5}
PRESETS = {
    "cpu": lambda dataset: DPSGD(noise_multiplier=SIGMAS.get(dataset, 50.0)),
    "paper": lambda dataset: DPSGD(epochs=60, noise_multiplier=SIGMAS.get(dataset, 50.0)),
}


@method(DPSGD(), data=("train_set",))
def dp_sgd(job: Job) -> Rounds:
    """Train the network anew on the poisoned set with DP-SGD (paper A.3.2).

    Min Du, Ruoxi Jia, Dawn Song, "Robust Anomaly Detection and Backdoor Attack Detection Via
    Differential Privacy", ICLR 2020 (arXiv:1911.07116).

    Batch norm would mix the images of a batch, and no gradient would belong to one image. So it
    is frozen at identity statistics (mean 0, variance 1; scale and offset are trained), which the
    result keeps, and the forward pass is that of evaluation mode, without dropout. The paper does
    not say what it did. A round is an epoch, with its mean `loss` (None: not finite).

    It needs `train_set`, the poisoned training set: images [N, H, W, C] in [0, 1], labels [N]. Of
    the variables only shapes and dtypes are used (and round 0 measures them); the clean set is
    checked and not used. The diagnostics tell the privacy (`epsilon` for `delta`) and of what it
    comes.

    Raises:
      InputError: there is no training set or it is not as described, or the model has no
        `init` (a `Classifier` and a linen module have it).
    """
    model, config, devices = job.model, job.config, job.devices
    init = needs_init(model, "dp-sgd", "initialises the network anew")
    data = _checked(model, job.variables, job.data.get("train_set"))
    job.advice = (
        f"expected a rate and a noise that the model bears, found {config.rate:g} and "
        f"{config.noise_multiplier:g}: choose smaller ones"
    )
    row: dict[str, Any] = {}
    yield job.variables, row
    init_key, noise_key, order_key = jax.random.split(job.key, 3)
    with job.compiling():
        variables = jax.jit(init)(init_key, data.images[:1])  # statistics 0 and 1
    kinds = jax.tree.map(jnp.result_type, job.variables)
    variables = jax.tree.map(np.asarray, variables, kinds)
    count = len(data.labels)
    batch_size, per_epoch = batches_of(count, config.batch_size)
    noise = optax.contrib.differentially_private_aggregate(
        config.l2_norm_clip, config.noise_multiplier, noise_key
    )
    fixed = {name: value for name, value in variables.items() if name != "params"}
    state = devices.replicate((variables["params"], noise.init(variables["params"])))
    images, labels = devices.replicate((data.images, data.labels))
    devices.check_equal(images=images, labels=labels)  # processes may have made other triggers
    step = make_step(model, fixed, config, noise, batch_size, devices.axis)
    step = job.program(step, rows=(3,), donate=(0,))
    with job.progress(config.epochs * per_epoch, "DP-SGD") as advance:
        for epoch in range(1, config.epochs + 1):
            rows = shuffled(order_key, epoch, count, per_epoch, batch_size, devices)
            losses = Losses(devices)
            for i in range(per_epoch):
                state, loss = step(state, images, labels, rows, i)
                losses.add(loss)
                advance(1, note_of(row))
            devices.check_equal(state=state)
            row = {"loss": finite(np.mean(losses.read()))}
            # A copy: the next step takes the memory of the state.
            yield {"params": jax.tree.map(jnp.copy, devices.one(state[0])), **fixed}, row
        advance(0, note_of(row))
    steps = config.epochs * per_epoch
    return Told(
        diagnostics={
            "epsilon": epsilon(config.noise_multiplier, batch_size / count, steps),
            "delta": DELTA,
            "noise_multiplier": config.noise_multiplier,
            "l2_norm_clip": config.l2_norm_clip,
            "steps": steps,
            "sampling_probability": batch_size / count,
            "batch_norm": "frozen at identity",
        }
    )


def make_step(
    model: Model,
    fixed: Variables,
    config: DPSGD,
    noise: optax.GradientTransformation,
    batch_size: int,
    axis: str | None = None,
):
    """`step(state, images, labels, rows, i) -> (state, loss)`: batch number i of `Rows`.

    To be mapped over the devices. `state` is (parameters, state of `noise`), `loss` the mean over
    the batch before the step, `fixed` the variables that are not trained.
    """

    def loss_of(params, row):
        image, label, real = row
        found = model({"params": params, **fixed}, image[None])[0]
        return real * optax.losses.softmax_cross_entropy_with_integer_labels(found, label)

    def step(state, images, labels, rows: Rows, i):
        params, noise_state = state
        index, weights = jax.tree.map(lambda a: a[i], rows)
        chunk = config.chunk or (10 if jax.default_backend() == "cpu" else len(index))
        chunk = min(chunk, len(index))
        # Rows of padding, up to a whole number of chunks, have a gradient of 0.
        real = jnp.ones(len(index)) if weights is None else weights > 0
        index, real = (jnp.pad(a, (0, -len(a) % chunk)) for a in (index, real))
        batch = images[index], labels[index], real.astype(images.dtype)
        loss, total = clipped_sum(loss_of, params, batch, config.l2_norm_clip, chunk, axis)
        # Optax's aggregate wants all gradients at once; of a single gradient of 0 it gives the
        # noise alone. The key is the same on all devices, so the noise is, and is not summed.
        nothing = jax.tree.map(lambda g: jnp.zeros((1, *g.shape), g.dtype), total)
        drawn, noise_state = noise.update(nothing, noise_state)
        rate = config.rate / batch_size
        params = jax.tree.map(lambda p, g, n: p - rate * (g + n), params, total, drawn)
        return (params, noise_state), loss / batch_size

    return step


def clipped_sum(
    loss: Callable[[Any, Any], jax.Array],
    params: Params,
    batch: Any,
    clip: float,
    chunk: int,
    axis: str | None = None,
) -> tuple[jax.Array, Params]:
    """The sums of the losses and of the clipped gradients of each row, over all devices.

    Args:
      loss: `loss(params, row) -> scalar`.
      batch: a pytree whose leaves have the rows as their first axis.
      clip: the largest l2 norm of a row's gradient, all parameters together.
      chunk: rows whose gradients exist at once; it must divide the batch.
    """
    gradients = jax.vmap(jax.value_and_grad(loss), (None, 0))

    def part(rows):
        values, grads = gradients(params, rows)
        leaves, structure = jax.tree.flatten(grads)
        clipped: Any = optax.per_example_global_norm_clip(leaves, clip)[0]
        return jnp.sum(values), jax.tree.unflatten(structure, clipped)

    return accumulate(part, batch, chunk, axis)


def epsilon(noise_multiplier: float, sampling_probability: float, steps: int) -> float | None:
    """The epsilon of (epsilon, DELTA)-differential privacy; None: no bound, as without noise.

    By Renyi differential privacy of the Gaussian mechanism on Poisson samples, composed `steps`
    times (dp-accounting), for sets that differ by one image more or less. Our batches are parts
    of a shuffled set. To account them as Poisson samples is usual, but no proof: the privacy of
    shuffling can be worse. Nor is it counted that settings were chosen by looking at the data.
    """
    import dp_accounting  # takes a second
    from dp_accounting.rdp import RdpAccountant

    mechanism = dp_accounting.GaussianDpEvent(noise_multiplier)
    sampled = dp_accounting.PoissonSampledDpEvent(sampling_probability, mechanism)
    found = float(RdpAccountant().compose(sampled, steps).get_epsilon(DELTA))
    return found if np.isfinite(found) else None


def _checked(model: Model, variables: Variables, train_set: Dataset | None) -> Dataset:
    """`check_clean` for the training set."""
    if train_set is None:
        raise InputError(
            "dp-sgd trains on the poisoned training set: expected train_set, found none",
            argument="train_set",
        )
    try:
        return check_clean(model, variables, train_set)
    except InputError as error:
        raise InputError(f"train_set: {str(error).replace('clean', 'training')}") from error
