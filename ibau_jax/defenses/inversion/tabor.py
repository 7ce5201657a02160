"""TABOR (Guo et al. 2019): trigger search under four regularisers, and a score of its own.

Neural Cleanse accepts any small mask; TABOR also asks that a trigger be small in mask and
pattern, in one piece, that it neither cover what the image shows nor rest on the image, and it
scores what was found by how well it explains the attack.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.defenses.finetune import SHORT, Tuning
from ibau_jax.defenses.inversion.neural_cleanse import CostSchedule, cleansed, norms_of
from ibau_jax.defenses.inversion.outliers import LARGE, check_labels, judge, low_outliers
from ibau_jax.defenses.inversion.search import (
    Found,
    Step,
    Terms,
    label_loss,
    reverse_engineer,
    stamp,
)
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, finite
from ibau_jax.errors import InputError, check_name, check_positive
from ibau_jax.models.model import Model, Variables
from ibau_jax.models.predict import predict

# (lambda 1 to 6.) The only public list, used by TrojanZoo with patterns in [0, 1], and the same
# converted from patterns in 0..255, for which it was written: lambda 2 stands before an l1 norm
# (times 255) and a squared l2 norm (times 255^2); one factor cannot serve both, the first is kept.
TROJANZOO = (1e-6, 1e-5, 1e-7, 1e-8, 0.0, 1e-2)
RAW255 = (1e-6, 1e-5 * 255, 1e-7, 1e-8 * 255**2, 0.0, 1e-2)


@dataclass(frozen=True)
class TaborConfig:
    """Settings of TABOR.

    Attributes:
      weights: lambda 1 to 6 of the regularisers.
      adaptive: scale all weights together while the search goes on, from 0 until the trigger
        works, then up while it does and down while it does not, as the paper describes it; else
        they are fixed.
      scale: factor of the weights when they first count.
      steps, batches, batch_size, rate, patience, multiplier, success, labels_at_once, share,
        tuning: see `neural_cleanse.NeuralCleanseConfig`.
      score: `metric` (the paper's) or `norm` (of the mask, as in Neural Cleanse).
      threshold: of the anomaly index.
      gap: a flagged label's metric, a logarithm, is at least so far below the median. The paper has
        no such rule, and its threshold flags labels of clean models, whose metrics lie close
        together. On small VGGs for digits, six with a backdoor and six without, the label with the
        backdoor was 2.0 to 5.2 below the median (index 2.5 to 8.4), others with an index above 2 at
        most 0.7.
    """

    weights: tuple[float, ...] = (1e-3, 1e-3, 1e-4, 1e-4, 0.0, 1e-2)
    adaptive: bool = True
    scale: float = 10.0
    steps: int = 60
    batches: int = 5
    batch_size: int = 32
    rate: float = 0.1
    patience: int = 2
    multiplier: float = 1.5
    success: float = 0.99
    labels_at_once: int | None = None
    score: str = "metric"
    threshold: float = 2.0
    gap: float = 1.4  # a fourth
    share: float = 0.2
    tuning: Tuning = SHORT

    def __post_init__(self):
        check_positive(self, "scale", "steps", "batches", "batch_size", "rate", "patience")
        check_positive(self, "labels_at_once", "threshold", "share")
        check_name("score", self.score, ("metric", "norm"))
        if self.gap < 0:
            raise InputError(f"gap is {self.gap}: expected at least 0")
        if len(self.weights) != 6 or min(self.weights) < 0:
            raise InputError(
                f"weights are {self.weights}: expected six numbers of at least 0, lambda 1 to 6"
            )

    @property
    def works(self) -> float:
        """Share of the stamped images that have to get the label for a trigger to count as found.

        With fixed weights no step is asked for a success, and the metric weighs it; but what leads
        fewer than half of the images to the label is no trigger.
        """
        return self.success if self.adaptive else 0.5

    @classmethod
    def paper(cls, dataset: str = "cifar10") -> "TaborConfig":
        """30 passes over 5000 images, fixed weights (as TrojanZoo, probably what I-BAU ran)."""
        del dataset
        return cls(
            weights=TROJANZOO, adaptive=False, scale=1.0, steps=30, batches=156, gap=0.0,
            tuning=Tuning(epochs=1),
        )  # fmt: skip


PRESETS = {"cpu": lambda dataset: TaborConfig(), "paper": TaborConfig.paper}


@dataclass
class LowestLoss:
    """Fixed weights, and the trigger with the lowest loss of a step."""

    cost: float
    best: float = np.inf
    ended: bool = False

    def after(self, step: Step) -> bool:
        """See `search.Schedule`."""
        improved = step.loss < self.best
        if improved:
            self.best = step.loss
        return improved


def elastic_net(z: jax.Array) -> jax.Array:
    """E(z) = ||z||_1 + ||z||_2^2."""
    return jnp.sum(jnp.abs(z)) + jnp.sum(z**2)


def roughness(z: jax.Array) -> jax.Array:
    """s(z): squared differences of neighbours in a picture [H, W, C], in both directions."""
    return jnp.sum((z[1:] - z[:-1]) ** 2) + jnp.sum((z[:, 1:] - z[:, :-1]) ** 2)


def overly_large(mask, pattern, weights) -> jax.Array:
    """R1 = lambda1 E(M) + lambda2 E((1 - M) Delta): small, and nothing outside of the mask."""
    return weights[0] * elastic_net(mask) + weights[1] * elastic_net((1 - mask) * pattern)


def scattered(mask, pattern, weights) -> jax.Array:
    """R2 = lambda3 s(M) + lambda4 s((1 - M) Delta): in one piece."""
    return weights[2] * roughness(mask) + weights[3] * roughness((1 - mask) * pattern)


def blocking(model: Model, variables: Variables, mask, images, labels) -> jax.Array:
    """R3 without its weight, one value an image [B]: CE(f(x (1 - M)), y).

    What the mask leaves of an image has to show what it shows.
    """
    logits = model(variables, images * (1 - mask))
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def overlaying(model: Model, variables: Variables, mask, pattern, target) -> jax.Array:
    """R4 without its weight: CE(f(M Delta), target): the trigger alone has to be enough."""
    logits = model(variables, (mask * pattern)[None])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, target[None])[0]


def terms(weights: tuple[float, ...]) -> Terms:
    """The cross-entropy and the regularisers with their weights."""

    def rows(model, variables, mask, pattern, images, labels, target, cost):
        losses, logits = label_loss(model, variables, mask, pattern, images, labels, target, cost)
        if weights[4]:
            losses += cost * weights[4] * blocking(model, variables, mask, images, labels)
        return losses, logits

    def penalty(model, variables, mask, pattern, target):
        small = overly_large(mask, pattern, weights) + scattered(mask, pattern, weights)
        if not weights[5]:
            return small
        return small + weights[5] * overlaying(model, variables, mask, pattern, target)

    return Terms(rows, penalty)


def tabor_score(region: np.ndarray, attack: float, explain: float, crop: float) -> float:
    """The paper's metric A of one trigger; small: a backdoor.

    A = log(|F| / d^2) + log(s(F) / (d (d - 1))) - log(attack) - log(explain) - log(crop), all
    weights 1 (the paper's are not known). On pictures that are not square d^2 is H W.

    Args:
      region: F, bool [H, W], where the trigger is.
      attack: share of the stamped images that get the label.
      explain: 1 if the trigger alone gets it.
      crop: accuracy of the stamped images with the trigger's region cut out.

    Returns:
      NaN where the region is empty or everything: then there is no trigger to score. (Its size
      or its border would be 0, and the score of this nothing the lowest of all.)
    """
    height, width = region.shape
    border = float(roughness(jnp.asarray(region, jnp.float32)[..., None]))
    if not region.any() or not border:
        return float("nan")
    edges = (height * (width - 1) + width * (height - 1)) / 2  # d (d - 1) on a square
    rates = np.log(np.maximum([attack, explain, crop], 1e-3)).sum()
    return float(np.log(region.mean()) + np.log(border / edges) - rates)


def large(shape: tuple[int, int]) -> float:
    """The metric of a square too large for a trigger, `LARGE` of a picture [H, W], that works."""
    side = max(1, round((LARGE * shape[0] * shape[1]) ** 0.5))
    region = np.zeros(shape, bool)
    region[1 : 1 + side, 1 : 1 + side] = True
    return tabor_score(region, attack=1, explain=1, crop=1)


def scores_of(job: Job, found: list[Found], count: int = 500) -> list[float]:
    """`tabor_score` of each label's trigger, on the first `count` clean images."""
    classify = predict(job.model)
    images, labels = job.clean.images[:count], job.clean.labels[:count]
    with job.compiling():
        for shape in (images, images[:1]):
            classify(job.variables, shape)
    scores = []
    for label, trigger in enumerate(found):
        region = trigger.mask[..., 0] > 0.5
        stamped = stamp(images, trigger.mask, trigger.pattern).astype(images.dtype)
        alone = classify(job.variables, trigger.picture[None].astype(images.dtype))
        cropped = classify(job.variables, stamped * ~region[..., None])
        scores.append(
            tabor_score(
                region,
                attack=float(np.mean(classify(job.variables, stamped) == label)),
                explain=float(np.mean(alone == label)),
                crop=float(np.mean(cropped == labels)),
            )
        )
    return scores


@method(TaborConfig())
def tabor(job: Job) -> Rounds:
    """Find the labels with a backdoor and unlearn their triggers.

    Rounds and unlearning are those of `neural_cleanse`; the diagnostics have `metric` too, the
    paper's score of each label (None: nothing found that could be scored).
    """
    config = job.config
    check_labels(job.num_classes, job.clean.labels)
    yield job.variables, {}
    search_key, *keys = jax.random.split(job.key, 3)

    def schedule():
        if not config.adaptive:
            return LowestLoss(config.scale)
        return CostSchedule(config.scale, config.patience, config.multiplier, config.success)

    found = reverse_engineer(
        job,
        terms(config.weights),
        schedule,
        optimizer=optax.adam(config.rate, 0.5, 0.9),
        key=search_key,
        title="TABOR",
    )
    scores = scores_of(job, found)
    judged = judge([f.success >= config.works for f in found], job.clean.labels)
    if config.score == "metric":
        compared = judged.comparable(np.array(scores), large(job.clean.images.shape[1:3]))
        outliers = low_outliers(compared, config.threshold, config.gap)
    else:
        outliers = low_outliers(norms_of(found, judged), config.threshold)
    metric = [finite(score) for score in scores]
    return (yield from cleansed(job, found, judged, outliers, keys, metric=metric))
