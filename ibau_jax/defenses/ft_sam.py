"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning that looks for flat minima.

    e = rho * T^2 g / ||T g||,  T = diag |w|,  g = the gradient at w      (adaptive ascent)
    w <- w - rate * gradient at w + e

Neurons of a backdoor have large weights, which plain fine-tuning hardly moves; the neighbourhood,
weighed by |w|, moves them most.

rho is a norm over all weights, so that of the paper (2, for the 11 million of its ResNet-18) is
another one for a smaller model. On the paper's VGG of I-BAU (0.3 million) rho 2 leaves corner
patches in place at the authors' rate and at five times that; rho 8 removes them and costs 10 to 20
points of ACC (`experiments/baselines.md`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ibau_jax.defenses.finetune import Tuning, tune
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.devices import mesh
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.model import Model, Params, without_dropout
from ibau_jax.training.augment import augment
from ibau_jax.training.loop import batch_mean
from ibau_jax.training.optimizers import SGD


@dataclass(frozen=True)
class FTSAMConfig:
    """Settings of FT-SAM.

    Attributes:
      rho: size of the neighbourhood; None: `relative` * sqrt(number of weights).
      relative: change of a weight in proportion to itself, where `rho` is None. The paper's rho of
        2 is 6e-4 on its model; the default is a rho of 8 on the VGG.
      smoothing: of the labels.
      crop: shift images by up to so many pixels (zeros come in).
      flip: mirror half of the images. Right for CIFAR-10; a mirrored traffic sign is another sign.
      dropout: as the model was trained with, where it has any.
      tuning: the fine-tuning.
    """

    rho: float | None = None
    relative: float = 1.44e-2
    smoothing: float = 0.1
    crop: int = 0
    flip: bool = False
    dropout: bool = False
    tuning: Tuning = Tuning(  # noqa: RUF009  (frozen)
        epochs=12,
        steps=468,
        optimizer=SGD(0.05, momentum=0.9, decay=5e-4, schedule="cosine"),
    )

    def __post_init__(self):
        check_positive(self, "rho", "relative")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing is {self.smoothing}: expected a share in [0, 1)")
        if self.crop < 0:
            raise InputError(f"crop is {self.crop}: expected at least 0")

    @classmethod
    def cpu(cls, dataset: str = "cifar10") -> "FTSAMConfig":
        """Twelve epochs without augmentation, which would need more of them."""
        return cls()

    @classmethod
    def paper(cls, dataset: str = "cifar10") -> "FTSAMConfig":
        """The authors': 100 epochs, batches of 256, on GTSRB four times the rho, no smoothing."""
        traffic = dataset == "gtsrb"
        return cls(
            relative=2.4e-3 if traffic else 6e-4,
            smoothing=0.0 if traffic else 0.1,
            crop=4,
            dropout=True,
            flip=dataset == "cifar10",
            tuning=Tuning(
                epochs=100,
                batch_size=256,
                optimizer=SGD(0.01, momentum=0.9, decay=5e-4, schedule="cosine"),
            ),
        )


PRESETS = {"cpu": FTSAMConfig.cpu, "paper": FTSAMConfig.paper}


@method(FTSAMConfig())
def ft_sam(job: Job) -> Rounds:
    """Fine-tune on the clean set with sharpness-aware minimisation (Zhu et al., ICCV 2023).

    A `Classifier` is trained with batch statistics, as the authors do, a plain function as it is. A
    round is an epoch, with its mean `loss` (at w). The diagnostics have the `rho` that was used.
    """
    config = job.config
    weights = sum(leaf.size for leaf in jax.tree.leaves(job.variables["params"]))
    rho = config.relative * weights**0.5 if config.rho is None else config.rho
    yield job.variables, {}
    model = job.model if config.dropout else without_dropout(job.model)
    objective = sharpness_aware(model, config, rho, job.num_classes, job.devices.axis)
    yield from tune(
        job, job.variables, job.clean, config.tuning, key=job.key, objective=objective,
        title="FT-SAM",
    )  # fmt: skip
    return Told(diagnostics={"rho": rho})


def sharpness_aware(
    model: Model, config: FTSAMConfig, rho: float, num_classes: int, axis: str | None
):
    """The objective (see `training.loop`) whose gradient is the one at w + e.

    The statistics are those of the pass at w, and dropout is the same in both passes.
    """

    def objective(params, others, images, labels, weights, key):
        augment_key, key = jax.random.split(key)
        images = augment(augment_key, images, config.crop, config.flip, 0, axis)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), config.smoothing)

        def loss(params):
            logits, _, updated = model.train(
                {"params": params, **others}, images, key, weights, axis
            )
            losses = optax.losses.softmax_cross_entropy(logits, wanted.astype(logits.dtype))
            return batch_mean(losses, weights, axis), updated

        (value, updated), slope = jax.value_and_grad(loss, has_aux=True)(
            jax.lax.stop_gradient(params)
        )
        e = ascent(params, mesh.total(slope, axis), rho)
        moved, _ = loss(jax.tree.map(jnp.add, params, jax.lax.stop_gradient(e)))
        # The gradient of the loss at w + e, and the value of the one at w.
        return moved + jax.lax.stop_gradient(value - moved), updated

    return objective


def ascent(params: Params, slope: Params, rho: float) -> Any:
    """e = rho T^2 g / ||T g|| with T = |w|: the largest loss in the neighbourhood, to first order.

    The neighbourhood is ||T^-1 e|| <= rho (Kwon et al., ASAM, ICML 2021). No step where g is 0.
    """
    scaled = jax.tree.map(lambda w, g: jnp.abs(w) * g, params, slope)
    size = optax.tree.norm(scaled)
    unit = rho / jnp.where(size > 0, size, 1)
    return jax.tree.map(lambda w, s: unit * jnp.abs(w) * s, params, scaled)
