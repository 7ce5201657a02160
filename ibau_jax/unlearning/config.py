"""`IBAUConfig`: everything in which the paper, the published code and our default differ."""

from dataclasses import dataclass, replace
from typing import Literal

import optax

from ibau_jax.errors import InputError, check_name, check_positive
from ibau_jax.hypergradient import Ball, Neumann, NormalCG, Solver
from ibau_jax.training.optimizers import SGD, Adam, Optimizer, transform


@dataclass(frozen=True)
class Relative:
    """Steps of an ascent that are measured by the ball, whatever the size of the gradient.

    Along the gradient (l2) or its sign (linf). Their lengths grow in proportion to their number,
    and are rate * radius on average: the first steps decide which of the maxima is found.
    """

    rate: float = 0.05

    def __post_init__(self):
        check_positive(self, "rate")

    def within(self, ball: Ball, steps: int) -> optax.GradientTransformation:
        """For `steps` steps in a ball."""
        linf = ball.norm == "linf"
        direction = optax.scale_by_sign() if linf else optax.normalize_by_update_norm()
        length = self.rate * ball.radius
        return optax.chain(
            direction, optax.scale_by_schedule(lambda i: -length * (2 * i + 1) / steps)
        )


@dataclass(frozen=True)
class IBAUConfig:
    """Settings of I-BAU; `IBAUConfig()` is the preset `default`.

    Attributes:
      rounds: passes over the clean set; None: 2, or as many as make 80 outer steps.
      batch_size: images in a batch (a smaller clean set is one batch); None: 100, or a tenth of
        a clean set below 1000 images, but at least 10.
      shuffle: draw the order of the clean images once, before they are cut into batches; False:
        take them as they come.
      microbatch: images that are differentiated at a time; None: the whole batch; `auto`: as many
        as suit the cache and the memory (see `models.at_once`). Only speed and memory depend on it.
      norm: ball of the perturbation, `l2` or `linf`.
      radius: its radius C, in the units of images in [0, 1]; where something is searched, that of
        images of 32 x 32 pixels, and in proportion to the side of images of 64 and more.
      inner_steps: T, steps of an ascent; None: one pass over the batches, a batch a step.
      inner_optimizer: alpha, of delta: a `Relative`, or any `Optimizer`, such as `SGD(0.1)`.
      inner_labels: `true`, or `predicted` by the model for the clean image.
      penalty: factor of ||delta||^2 in the inner loss.
      project: onto the ball after `every-step` or `at-end` of the ascent.
      clip: keep patched images in [0, 1].
      outer_steps: outer steps after each ascent; None: a pass over all batches.
      share: share of each outer batch that carries delta; at least one image always does.
      searched: share of each outer batch that carries what a search found (`unlearning.evidence`),
        and delta then leads to the labels that stand out in it; 0: nothing is searched.
      stages: most passes through all rounds, where something is searched: what still stands out
        after one is the matter of the next.
      distilled: share of the outer loss that is against the given model's own probabilities for
        the clean image.
      mixed: weight of a further loss, of mixtures of two clean images (half as many as a batch has
        images) against the given model's own probabilities for them: it keeps the model as it was
        between the few clean images too.
      held_back: share of the clean set that nothing is trained on, to measure the accuracy; see
        `held`.
      budget: of the accuracy on it, what may be lost where something was found, beside one standard
        error; of more, the way is gone back. Half as much again where there may be several targets;
        where nothing stands out, none.
      outer_optimizer: beta, of the parameters: any `Optimizer`, such as `Adam(1e-3)` or
        `optax.adamw(1e-3)`.
      hessian: batch of the inner loss in the hypergradient: `first` or the `same` as the outer.
      hessian_images: how many images of that batch; None: all.
      solver: of the linear system with the inner Hessian.
      keep_diverged: use a solution that is worse than none, as the published code does.
      constrained: the hypergradient of the projected fixed point, which also holds where delta
        is on the border of the ball; False: equation (4), which ignores the border.
      route: `explicit` (jvp and vjp) or `jaxopt`, the same gradient; a model that forward mode
        does not go through (a `jax.custom_vjp` inside) takes `jaxopt` by itself.
    """

    rounds: int | None = None
    batch_size: int | None = None
    shuffle: bool = True
    microbatch: int | Literal["auto"] | None = "auto"
    norm: str = "l2"
    radius: float = 10.0
    inner_steps: int | None = 25
    inner_optimizer: Optimizer | Relative = Relative(0.05)  # noqa: RUF009  (frozen)
    inner_labels: str = "true"
    penalty: float = 0.0
    project: str = "every-step"
    clip: bool = True
    outer_steps: int | None = 25
    share: float = 0.05
    searched: float = 0.1
    stages: int = 3
    distilled: float = 0.5
    mixed: float = 1.0
    held_back: float = 0.1
    budget: float = 0.04
    outer_optimizer: Optimizer = Adam(1.5e-3, "cosine", clip=1.0, small=0.04)  # noqa: RUF009
    hessian: str = "same"
    hessian_images: int | None = 10
    solver: Solver = NormalCG(steps=2, damping=0.1)  # noqa: RUF009  (frozen)
    keep_diverged: bool = False
    constrained: bool = False
    route: str = "explicit"

    def __post_init__(self):
        for name, options in _CHOICES.items():
            check_name(name, getattr(self, name), options)
        counts = ("rounds", "batch_size", "inner_steps", "outer_steps", "hessian_images", "stages")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: expected a whole number of at least 1")
        check_positive(self, "radius")
        for name in ("inner_optimizer", "outer_optimizer"):
            found = getattr(self, name)
            if not (callable(found) or isinstance(found, Relative | optax.GradientTransformation)):
                raise InputError(
                    f"{name} is {found!r}: expected for example Adam(1e-3) or optax.adamw(1e-3)"
                )
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}: expected a share of a batch in (0, 1]")
        for name in ("searched", "distilled", "budget"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} is {value}: expected a share in [0, 1]")
        if not 0 <= self.mixed < float("inf"):
            raise InputError(f"mixed is {self.mixed}: expected a weight of at least 0")
        if not 0 <= self.held_back <= 0.5:
            raise InputError(f"held_back is {self.held_back}: expected a share in [0, 0.5]")
        if isinstance(self.microbatch, int) and self.microbatch < 1:
            raise InputError(f"microbatch is {self.microbatch}: expected at least 1, auto or None")

    @property
    def rows_multiple(self) -> int:
        """Batches have a multiple of this many rows (padded with weight 0)."""
        return self.microbatch if isinstance(self.microbatch, int) else 1

    def held(self, count: int) -> int:
        """How many of `count` clean images are held back: of few twice the share, up to 200.

        On 100 images the error of an accuracy is up to five points, more than the budget.
        """
        return max(int(self.held_back * count), min(200, int(2 * self.held_back * count)))

    @classmethod
    def untargeted(cls) -> "IBAUConfig":
        """Without a search: the paper's delta alone, away from the true labels. Was the default."""
        return cls(
            inner_steps=50,
            outer_steps=None,
            searched=0.0,
            distilled=0.0,
            mixed=0.0,
            held_back=0.0,
            outer_optimizer=Adam(2e-3, schedule="cosine", clip=1.0),
        )

    @classmethod
    def algorithm1(cls) -> "IBAUConfig":
        """The paper's text to the letter: Algorithm 1, every image of a batch patched.

        Where the letter cannot be run: the exact inverse of the inner Hessian is damped normal
        CG, as in the default (the Hessian is indefinite and nearly singular). Of "SGD or Adam,
        learning rate 0.1" (A.3) the outer step is Adam with 1e-3, the rate of the authors' code:
        SGD with 0.1 ended in NaN with every inner rate and solver tried. The inner rate is the
        one with which BadNets did best.
        """
        return replace(
            cls.untargeted(),
            rounds=1,
            batch_size=100,
            shuffle=False,
            radius=10.0,
            inner_steps=10,
            inner_optimizer=SGD(0.1),
            clip=False,
            outer_steps=1,
            share=1.0,
            outer_optimizer=Adam(1e-3),
        )

    @classmethod
    def published(cls, dataset: str = "cifar10") -> "IBAUConfig":
        """The authors' code as it ran: their notebook for `cifar10` or the one for `gtsrb`.

        Another data set gets the settings of CIFAR-10.
        """
        config = replace(
            cls.untargeted(),
            rounds=1,
            batch_size=100,
            shuffle=False,
            radius=10.0,
            inner_steps=None,
            inner_optimizer=SGD(10.0),
            inner_labels="predicted",
            penalty=0.001,
            project="at-end",
            clip=False,
            outer_steps=None,
            share=0.01,
            outer_optimizer=Adam(1e-3),
            hessian="first",
            hessian_images=None,
            solver=Neumann(terms=5, step=0.1),
            keep_diverged=True,
        )
        if dataset == "gtsrb":
            return replace(config, inner_optimizer=Adam(1.0), clip=True)
        return config

    @property
    def ball(self) -> Ball:
        """The set that delta is held in."""
        return Ball(self.radius, self.norm)

    def inner_transform(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of an ascent of so many steps; it descends on the inner loss."""
        optimizer = self.inner_optimizer
        if isinstance(optimizer, Relative):
            return optimizer.within(self.ball, steps)
        return transform(optimizer, steps)

    def outer_transform(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of the parameters over `steps` outer steps."""
        return transform(self.outer_optimizer, steps)

    def schedule(self, num_batches: int, ascents: int = 0) -> list[tuple[int, int]]:
        """Ranges of outer batches in a round, an ascent before each; or so many `ascents`."""
        if ascents:
            ends = [num_batches * i // ascents for i in range(ascents + 1)]
            return [*zip(ends, ends[1:], strict=False)]
        stride = self.outer_steps or num_batches
        return [(i, min(i + stride, num_batches)) for i in range(0, num_batches, stride)]


PRESETS = {
    "default": lambda dataset: IBAUConfig(),
    "untargeted": lambda dataset: IBAUConfig.untargeted(),
    "algorithm1": lambda dataset: IBAUConfig.algorithm1(),
    "published": IBAUConfig.published,
}

_CHOICES = {
    "norm": ("l2", "linf"),
    "inner_labels": ("true", "predicted"),
    "project": ("every-step", "at-end"),
    "hessian": ("first", "same"),
    "route": ("explicit", "jaxopt"),
}
