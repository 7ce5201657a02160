"""I-BAU: implicit backdoor adversarial unlearning (Zeng et al., ICLR 2022), Algorithm 1.

`params` are theta, `C` the ball that delta is held in, `T` the steps of an ascent, `K` the outer
steps of all rounds, `alpha` and `beta` the optimisers of the two problems, and

    H(delta, params) = mean_i CE(logits(params, x_i + delta), y_i)                   (eq. 1)

What differs between the paper's text, the published code and our default is in `IBAUConfig` and
nowhere else. `defenses.ibau.unlearn` runs it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ibau_jax.errors import InputError
from ibau_jax.hypergradient import Report, hypergradient, hypergradient_jaxopt
from ibau_jax.models.model import Logits, Params
from ibau_jax.unlearning.batches import Batch, first_rows
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.objective import (
    Aim,
    aimed,
    make_inner,
    make_leading,
    make_loss,
    patch,
    pick,
    predicted,
    spread,
)

ROUTES = {"explicit": hypergradient, "jaxopt": hypergradient_jaxopt}


class State(NamedTuple):
    """What the next round needs: theta, what its optimiser keeps, and a random key."""

    params: Params
    opt_state: optax.OptState
    key: jax.Array


class Step(NamedTuple):
    """What is known of an outer step: the outer loss, and how well the system was solved."""

    loss: jax.Array
    report: Report


class Info(NamedTuple):
    """What is known of a round: each delta [H, W, C], H near the last one, the outer steps."""

    deltas: list[jax.Array]
    height: jax.Array
    steps: list[Step]


class Algorithm(NamedTuple):
    """Algorithm 1 in parts, pure functions all of them (`ascend` and `descend` compiled).

    Attributes:
      init: `init(params, key) -> State`.
      ascend: `ascend(params, batches, first, aim) -> (delta, height)`: the inner problem on the
        batches in turn, from number `first`; `height` is minus what delta minimises (H, if `aim` is
        None) on its last batch, before its final step.
      descend: `descend(state, delta, batches, index, aim) -> (state, Step)`: an outer step.
      round: `round(state, batches, told, aims) -> (state, Info)`: a pass over the clean batches;
        `told(Step)` is called after each outer step. `aims`: what a search said, for as many
        ascents (see `Aim`); the paper's algorithm has none.
    """

    init: Callable[[Params, jax.Array], State]
    ascend: Callable[..., tuple[jax.Array, jax.Array]]
    descend: Callable[..., tuple[State, Step]]
    round: Callable[..., tuple[State, Info]]


def on_one_device(function: Callable, rows: tuple[int, ...]) -> Callable:
    """`function` compiled for one device, which has all rows."""
    del rows
    return jax.jit(function)


def ibau(
    logits: Logits,
    config: IBAUConfig,
    num_batches: int,
    axis: str | None = None,
    program: Callable[..., Callable] = on_one_device,
    fixed: Params | None = None,
) -> Algorithm:
    """Algorithm 1 for a model and a stack of `num_batches` clean batches.

    Args:
      logits: `logits(params, images)`, in evaluation mode; with `fixed`, of all variables.
      config: from `batches.resolve`.
      axis: name of the mapped axis that the rows of a batch are spread over.
      program: `program(function, rows=)` compiles; `rows` are the arguments that are spread.
      fixed: what there is beside the parameters, as `{"params": params, **fixed}`, on the devices.
        Of a model that `logits` closes over, it would be compiled into the programs, and those that
        were kept would serve no other model.
    """
    C, T = config.ball, config.inner_steps or num_batches
    K = (config.rounds or 1) * num_batches
    alpha, beta = config.inner_transform(T), config.outer_transform(K)
    implicit = ROUTES[config.route]

    def losses(fixed: Params | None) -> tuple[Logits, Callable, Callable]:
        """`logits` of the parameters alone, H(delta, params, batch), and what delta minimises."""

        def of_params(params: Params, images: jax.Array) -> jax.Array:
            return logits(params if fixed is None else {"params": params, **fixed}, images)

        H = make_loss(of_params, config, axis)
        # -H, or what leads to a label
        inner = make_leading(of_params, config, axis) if config.searched else make_inner(H, config)
        return of_params, H, inner

    def init(params: Params, key: jax.Array) -> State:
        return State(params, beta.init(params), key)

    def ascend(
        params: Params, batches: Batch, first: Any, aim: Aim | None = None
    ) -> tuple[jax.Array, jax.Array]:
        return ascend_with(fixed, params, batches, first, aim)

    def descend(
        state: State, delta: jax.Array, batches: Batch, index: Any, aim: Aim | None = None
    ) -> tuple[State, Step]:
        return descend_with(fixed, state, delta, batches, index, aim)

    @partial(program, rows=(2,))
    def ascend_with(
        fixed: Params | None, params: Params, batches: Batch, first: Any, aim: Aim | None
    ) -> tuple[jax.Array, jax.Array]:
        if config.searched and aim is None:
            raise InputError(
                "the config searches (searched > 0) and no aim of a search was given: call "
                "unlearn, or take IBAUConfig.untargeted() for Algorithm 1 alone"
            )
        of_params, _, inner = losses(fixed)
        if config.inner_labels == "predicted":  # of the clean images: they do not change here
            batches = batches._replace(labels=predicted(of_params, params, batches.images, config))

        def step(t, carry):
            delta, alpha_state, _ = carry
            batch = pick(batches, (first + t) % num_batches)
            batch = batch if aim is None else aimed(batch, aim.rule)
            value, slope = jax.value_and_grad(inner)(delta, params, batch)
            height = config.penalty * jnp.sum(delta**2) - value  # H, at the delta it belongs to
            move, alpha_state = alpha.update(slope, alpha_state, delta)
            delta = optax.apply_updates(delta, move)  # line 4
            if config.project == "every-step":
                delta = C.project(delta)  # line 5
            return delta, alpha_state, height

        zero = jnp.zeros(batches.images.shape[2:], batches.images.dtype)  # line 2
        delta = zero if aim is None else C.project(aim.start)
        start = delta, alpha.init(delta), jnp.zeros((), delta.dtype)
        delta, _, height = lax.fori_loop(0, T, step, start)  # line 3
        return (C.project(delta) if config.project == "at-end" else delta), height

    @partial(program, rows=(3,))
    def descend_with(
        fixed: Params | None,
        state: State,
        delta: jax.Array,
        batches: Batch,
        index: Any,
        aim: Aim | None,
    ) -> tuple[State, Step]:
        _, H, inner = losses(fixed)
        key, subkey = jax.random.split(state.key)
        batch = pick(batches, index)
        if aim is None:
            batch = patch(subkey, batch, config.share, axis)
        else:
            batch = spread(subkey, batch, aim, config, axis)
        few = (pick(batches, 0) if config.hessian == "first" else batch)._replace(mixed=None)
        few = first_rows(few, config.hessian_images, config.rows_multiple, axis)
        few = few if aim is None else aimed(few, aim.rule)
        value, gradient, report = implicit(  # line 7
            lambda delta, params: H(delta, params, batch),
            lambda delta, params: inner(delta, params, few),
            delta,
            state.params,
            solver=config.solver,
            ball=C if config.constrained else None,
            keep_diverged=config.keep_diverged,
        )
        move, beta_state = beta.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, move)  # line 8
        return State(params, beta_state, key), Step(value, report)

    def round(
        state: State,
        batches: Batch,
        told: Callable[[Step], None] = lambda step: None,
        aims: Sequence[Aim] = (),
    ) -> tuple[State, Info]:
        deltas: list[jax.Array] = []
        steps: list[Step] = []
        ascents = config.schedule(num_batches, len(aims))
        for (first, end), aim in zip_longest(ascents, aims):  # line 1
            delta, height = ascend(state.params, batches, first, aim)
            deltas.append(delta)
            for index in range(first, end):
                state, step = descend(state, delta, batches, index, aim)
                told(step)
                steps.append(step)
        return state, Info(deltas, height, steps)

    return Algorithm(init, ascend, descend, round)
