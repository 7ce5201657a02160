"""Universal perturbations towards a label, each the best of a set: where a backdoor shows itself.

The untargeted ascent of Algorithm 1 in a ball runs to natural weaknesses and misses triggers that
lie elsewhere. Here delta is a vertex of one of several sets (a window or a few pixels of extreme
colours, a cosine, a field that changes slowly, a point of a sphere), and the ascent goes towards
each label: Frank-Wolfe, which needs of a set no more than its vertex in a direction (Jaggi, ICML
2013).

At clean images the gradient says little of a trigger, but models answer to much less than the
whole of it. So a search starts from the best of many vertices drawn at random, looked at with one
forward pass for all labels (measured in experiments/default_trials.md).

Images of 64 x 64 and more are searched on a grid of 32 and more pixels a side, each a block of the
image's own: a window keeps its share of the image, and a search its cost in memory.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ibau_jax.data import Dataset
from ibau_jax.devices.microbatch import accumulate
from ibau_jax.errors import InputError
from ibau_jax.models.at_once import at_once, divisor
from ibau_jax.models.model import Logits, Params
from ibau_jax.models.predict import in_threads, predict
from ibau_jax.unlearning.batches import shuffled
from ibau_jax.unlearning.geometries import GEOMETRIES, Geometry, lift_of
from ibau_jax.unlearning.grid import enlarged, on_grid
from ibau_jax.unlearning.objective import clip_images
from ibau_jax.unlearning.strength import Label, check_count, height, kept_of, rule_of, share

STARTS_A_CALL = 50  # that one call looks at, at most: on a CPU a call is one core's


class Found(NamedTuple):
    """What a search found, for each geometry G and label L that was asked for.

    Attributes:
      deltas: [G, L, H, W, C], to be added to images in [0, 1] and clipped.
      strength: [G, L], share of held-back images of other labels that get the label; of
        `UNTARGETED` the share that is not given its true label.
      given: int32 [G, L, N], the labels that the held-back images get.
      true: int32 [N], their true labels.
    """

    deltas: np.ndarray
    strength: np.ndarray
    given: np.ndarray
    true: np.ndarray


class Search:
    """A search whose programs are compiled once and used for the parameters of any moment.

    Args:
      logits: `logits(params, images)`, in evaluation mode. Only `params` are an argument of the
        programs; so a `Model` with all of its variables lets what was compiled serve other models.
      geometries: the sets to search.
      steps: of an ascent, each on `batch` images.
      starts: how many random perturbations are drawn for a geometry, looked at on `few` images.
      compiling: entered while it compiles, for example to take the time.

    `label(params, images)` are the labels that the model gives.
    """

    def __init__(
        self,
        logits: Logits,
        geometries: Sequence[Geometry] = GEOMETRIES,
        *,
        steps: int = 10,
        batch: int = 20,
        starts: int = 300,
        few: int = 10,
        compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        for name, value in (("steps", steps), ("batch", batch), ("starts", starts), ("few", few)):
            if value < 1:
                raise InputError(f"{name} is {value}: expected a whole number of at least 1")
        # JAX keeps what it traces by a weak reference, which not every callable object allows.
        self.logits: Logits = lambda params, images: logits(params, images)
        self.geometries = tuple(geometries)
        self.steps, self.batch, self.starts, self.few = steps, batch, starts, few
        self.label, self._compiling = predict(logits), compiling
        self._programs: dict[Any, Callable] = {}

    def __call__(
        self,
        params: Params,
        clean: Dataset,
        labels: Sequence[Label],
        *,
        key: jax.Array,
        among: Sequence[Geometry] | None = None,
        most: int | None = None,
        starts: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Found:
        """Search towards each of `labels`.

        Args:
          labels: each 0 .. classes - 1, or `UNTARGETED`, or a rule: an int array [classes] of such,
            for the images of each class (all-to-all).
          clean: correctly labelled images [N, H, W, C] in [0, 1]; half of them, but at most 200,
            are held back to measure the strength.
          key: random key; decides the images and the starts.
          among: of the `geometries`; None: all.
          most: so many labels at most are ascended towards, in each geometry those that the random
            perturbations lead to best; of the others the best of these is measured. None: all.
          starts: in the place of the search's own.
          advance: called with 1 after each ascent.
        """
        check_count(clean)
        count = len(clean.labels)
        order, key = jax.random.split(key)
        images, true = shuffled(clean, order)
        kept = kept_of(count)
        held, held_true, images, true = images[:kept], true[:kept], images[kept:], true[kept:]
        rules = np.array([rule_of(label, self._classes(params, images)) for label in labels])
        few, few_true = images[: self.few], true[: self.few]
        size = min(self.batch, len(true))
        batches = min(5, len(true) // size)
        stack = [a[: batches * size].reshape(batches, size, *a.shape[1:]) for a in (images, true)]
        rows = divisor(size, at_once(self.logits, params, images[:size]))
        ascend = partial(self._ascend, rows=rows)
        lift = lift_of(images)
        raised = np.asarray(lift, images.dtype)
        deltas, given = [], []
        names = [g.name for g in self.geometries]
        among = self.geometries if among is None else among
        for geometry in among:
            number = names.index(geometry.name)
            apart = jax.random.fold_in(key, number)
            drawn = self._starts(geometry, apart, images, starts or self.starts, lift)
            seen = self._seen(params, drawn, few)
            heights = [self._heights(seen, few_true, rule[few_true]) for rule in rules]
            shortlist = np.argsort([-h.max() for h in heights], kind="stable")[:most]
            begin = [drawn[h.argmax()] for h in heights]
            ends = self._each(
                ascend,
                [
                    (params, *stack, rule[stack[1]], np.int32(number), begin[i], raised)
                    for i, rule in enumerate(rules)
                    if i in shortlist
                ],
            )
            for i, start in enumerate(begin):
                delta = np.asarray(next(ends) if i in shortlist else start)
                deltas.append(enlarged(delta, images.shape[1:]))
                given.append(self.label(params, np.clip(held + deltas[-1], 0, 1)))
                advance(1)
        shape = len(among), len(labels)
        found = np.asarray(given, np.int32).reshape(*shape, kept)
        wanted = rules[:, held_true]
        strength = [[share(g, held_true, t) for g, t in zip(r, wanted, strict=True)] for r in found]
        arrays = np.asarray(deltas).reshape(*shape, *images.shape[1:])
        return Found(arrays, np.asarray(strength), found, np.asarray(held_true, np.int32))

    def drawn(
        self,
        params: Params,
        clean: Dataset,
        labels: Sequence[Label],
        geometry: Geometry,
        *,
        key: jax.Array,
        starts: int,
        best: int,
    ) -> np.ndarray:
        """Of `starts` random perturbations of a geometry the `best` towards each label, as drawn.

        No ascent makes them alike: they show what else leads to a label.

        Returns:
          [L, best, H, W, C].
        """
        images, true = (a[: self.batch] for a in shuffled(clean, key))
        drawn = self._starts(geometry, jax.random.fold_in(key, 1), images, starts, lift_of(images))
        seen = self._seen(params, drawn, images)
        rules = [rule_of(label, seen.shape[-1])[true] for label in labels]
        best_of = [drawn[np.argsort(-self._heights(seen, true, r))[:best]] for r in rules]
        return enlarged(np.asarray(best_of), images.shape[1:])

    def warm(self, params: Params, clean: Dataset) -> None:
        """Compile what reads the labels."""
        self.label(params, clean.images[: kept_of(len(clean.labels))])

    def _run(self, function: Callable, *args: Any, name: str = "") -> Any:
        """`function(*args)`; see `_program`."""
        return self._program(function, *args, name=name)(*args)

    def _each(self, function: Callable, calls: Sequence[tuple[Any, ...]]) -> Iterator[jax.Array]:
        """`_run` for each of the arguments, in their order; on a CPU in threads."""
        programs = [self._program(function, *args) for args in calls]  # before the threads begin
        pairs = zip(programs, calls, strict=True)
        return in_threads(lambda pair: pair[0](*pair[1]), pairs)

    def _program(self, function: Callable, *args: Any, name: str = "") -> Callable:
        """A function, compiled once for arguments of these shapes.

        `name` tells functions of the same name apart.
        """
        shapes = jax.eval_shape(lambda *args: args, *args)
        key = getattr(function, "func", function).__name__, name, str(shapes)
        if key not in self._programs:
            with self._compiling():
                self._programs[key] = jax.jit(function).lower(*args).compile()
        return self._programs[key]

    def _starts(
        self, geometry: Geometry, key: jax.Array, images: np.ndarray, count: int, lift: float
    ) -> np.ndarray:
        shape = on_grid(images.shape[1:])
        if geometry.draw is None:
            return np.zeros((1, *shape), images.dtype)
        draw = partial(_draw, geometry=geometry, count=count, shape=shape)
        raised = np.asarray(lift * geometry.lift, images.dtype)
        return np.asarray(self._run(draw, key, raised, name=f"{geometry.name} {count} {shape}"))

    def _seen(self, params: Params, drawn: np.ndarray, images: np.ndarray) -> np.ndarray:
        """The logits of images under each start: [starts, N, classes]."""
        parts = np.array_split(drawn, -(-len(drawn) // STARTS_A_CALL))  # of one shape, or two
        seen = self._each(self._look_at, [(params, part, images) for part in parts])
        return np.concatenate([np.asarray(one) for one in seen])

    def _heights(self, seen: np.ndarray, true: np.ndarray, towards: np.ndarray) -> np.ndarray:
        """How well each start does: what `_seen` gave -> [starts]."""
        return np.asarray(self._run(_heights, seen, true, towards))

    def _classes(self, params: Params, images: np.ndarray) -> int:
        return jax.eval_shape(self.logits, params, images[:1]).shape[1]

    def _look_at(self, params, drawn, images):
        """A part of `_seen`."""

        def look(delta):
            return self.logits(params, clip_images(images + enlarged(delta, images.shape[1:])))

        return lax.map(look, drawn)

    def _ascend(self, params, images, true, towards, which, start, lift, *, rows):
        """Frank-Wolfe from `start`, over batches [S, B, ...] in turn; the better of both ends."""
        vertices = [geometry.vertex for geometry in self.geometries]
        lifts = jnp.array([geometry.lift for geometry in self.geometries], start.dtype)

        def vertex(direction):
            return lax.switch(which, vertices, direction) + lift * lifts[which]

        def loss(delta, images, true, towards):
            moved = images + enlarged(delta, images.shape[1:])
            # What is clipped keeps its gradient, or a saturated pixel could never be left.
            moved = moved + lax.stop_gradient(clip_images(moved) - moved)
            return jnp.sum(height(self.logits(params, moved), true, towards))

        def over(function, delta, index):
            batch = images[index], true[index], towards[index]
            return accumulate(lambda part: function(delta, *part), batch, rows)

        def step(t, carry):
            momentum, delta = carry
            momentum = 0.8 * momentum + over(jax.grad(loss), delta, t % len(images))
            return momentum, delta + 2 / (t + 2) * (vertex(momentum) - delta)

        zero = jnp.zeros_like(start)
        end = vertex(lax.fori_loop(0, self.steps, step, (zero, start))[1])
        return jnp.where(over(loss, end, 0) >= over(loss, start, 0), end, start)


def _draw(
    key: jax.Array, lift: jax.Array, *, geometry: Geometry, count: int, shape: tuple[int, int, int]
) -> jax.Array:
    """Random perturbations, raised by `lift`: [count, H, W, C]."""
    assert geometry.draw is not None
    return geometry.draw(key, count, shape).astype(lift.dtype) + lift


def _heights(seen: jax.Array, true: jax.Array, towards: jax.Array) -> jax.Array:
    """The height of each start over the images: [starts, N, classes] -> [starts]."""
    return jax.vmap(lambda logits: height(logits, true, towards).sum())(seen)
