"""I-BAU: implicit backdoor adversarial unlearning (Zeng et al., ICLR 2022), Algorithm 1.

    for each round:
        delta = 0                                                  # one trigger for all images
        for each inner step:
            delta <- project(delta + step * d1 H(delta, params))   # ascend
        for each outer step:
            params <- params - rate * hypergradient(delta, params) # unlearn

    H(delta, params) = mean_i CE(logits(params, x_i + delta), y_i)                   (eq. 1)

`unlearn` takes any pure `logits(params, images)`. What differs between the paper's text, the
published code and our default is in `IBAUConfig` and nowhere else.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.devices import mesh, processes
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError, first_line
from ibau_jax.hypergradient import (
    Direct,
    Report,
    hypergradient,
    hypergradient_jaxopt,
    needs_reverse_mode,
)
from ibau_jax.hypergradient.solvers import all_finite
from ibau_jax.models.model import Logits, Params, closed, of_params, opened
from ibau_jax.progress import progress_bar
from ibau_jax.unlearning.ascent import make_ascent
from ibau_jax.unlearning.batches import (
    Batch,
    check_clean,
    first_rows,
    make_batches,
    resolve,
    shuffled,
)
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.objective import cross_entropy, make_inner, make_loss, patch, pick

ROUTES = {"explicit": hypergradient, "jaxopt": hypergradient_jaxopt}


class Result(NamedTuple):
    """What a defense returns.

    Attributes:
      params: the cleaned parameters, same structure and dtypes as those given.
      history: one dict a round: `round`, `delta_norm`, `inner_loss` (H on the last batch of the
        last ascent, before its final step), `outer_loss` (mean over the round), of the linear
        solves the mean `residual` and `contraction` (None where there is none), the sum of
        `products`, `failed_solves` (not finite, or no nearer to the solution than zero is, within
        0.1 % of the residual; the direct gradient by choice is none) and `fallbacks` (outer
        steps that took the direct gradient instead), `seconds` (without compiling and
        evaluating), and what `evaluate` gave.
      deltas: the last perturbation of each round, float [rounds, H, W, C].
      seconds: sum over the rounds.
      compile_seconds: tracing and compiling.
      found: triggers that a defense reconstructed, by a caption that names the label, as
        pictures float [H, W, C] in [0, 1].
      diagnostics: what a defense tells about its decisions, as JSON values; those that look for
        triggers have `flagged`, the labels that they hold for targets; I-BAU has `route` and
        `route_reason` where the model made it leave the route of its config.
    """

    params: Params
    history: list[dict[str, Any]]
    deltas: np.ndarray
    seconds: float
    compile_seconds: float
    found: Mapping[str, np.ndarray] = MappingProxyType({})
    diagnostics: Mapping[str, Any] = MappingProxyType({})


def unlearn(
    logits: Logits,
    params: Params,
    clean: Dataset,
    *,
    config: IBAUConfig = IBAUConfig(),  # noqa: B008  (frozen)
    key: jax.Array,
    evaluate: Callable[[Params], Mapping[str, Any]] | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
    devices: Devices | None = None,
) -> Result:
    """Remove a backdoor that is not known, with a small clean set.

    Args:
      logits: pure function `logits(params, images [N, H, W, C]) -> [N, num_classes]`, in
        evaluation mode (dropout off, batch statistics fixed); or a `models.model.Classifier`.
      params: pytree of floating-point arrays; of a `Classifier` the whole variables, of which
        only the collection `params` is trained. They come back in the dtypes they are given in.
      clean: correctly labelled images without trigger, [N, H, W, C] in [0, 1], any size and any
        order.
      config: how; the default is the preset `default`.
      key: random key (`jax.random.key(seed)`): draws the order of the clean images, and those that
        are patched.
      evaluate: `evaluate(params) -> mapping` is called before the first round and after each;
        what it gives is put into the round's record (for example ACC and ASR).
      on_round: called with the record of each round as it ends; round 0 is the model as given.
      progress: show a progress bar on stderr.
      devices: over which each batch is spread (`mesh.devices`); default: all of all
        processes. The result is the same but for rounding. With many processes all call this
        function with the same arguments.

    Returns:
      A `Result`, the same in each process.

    Raises:
      InputError: `clean` or `params` are not as described, `logits` refuses the images or has no
        derivatives, or the parameters diverge.
    """
    clean = check_clean(logits, params, clean)
    devices = devices or mesh.devices()
    model, variables = opened(logits, params)
    given, logits, params = params, of_params(model, variables), variables["params"]
    config = resolve(config, logits, params, clean.images, len(devices.all))
    config, why = choose_route(config, logits, params, clean, len(devices.all))
    if config.shuffle:
        order_key, key = jax.random.split(key)
        clean = shuffled(clean, order_key)
    batches, sizes = make_batches(clean, config, devices)
    rounds, num_batches = config.rounds or 0, len(sizes)
    schedule = config.schedule(num_batches)  # batches of each outer pass between two ascents
    optimizer = config.outer_transform(rounds * num_batches)
    zero = jnp.zeros(clean.images.shape[1:], clean.images.dtype)

    # Compiled once, apart from the work, so that its time can be told apart.
    started = time.perf_counter()
    state = devices.replicate((params, jax.jit(optimizer.init)(params), key))
    zero, first = devices.replicate((zero, jnp.int32(0)))
    ascent = make_ascent(logits, config, devices.axis)
    descent = make_descent(logits, config, optimizer, devices.axis)
    ascend = devices.compile(ascent, state[0], batches, first, rows=(1,))
    descend = devices.compile(descent, state, zero, batches, first, rows=(2,))
    compile_seconds = time.perf_counter() - started

    history: list[dict[str, Any]] = []
    deltas: list[np.ndarray] = []

    def cleaned() -> Params:
        return closed(model, {**variables, "params": devices.one(state[0])}, given)

    def record(**values):
        if evaluate is not None:
            values |= dict(evaluate(cleaned()))
        if on_round is not None:
            on_round(values)
        return values

    before = record(round=0, seconds=0.0)
    with progress_bar(rounds * num_batches, "I-BAU", progress) as advance:
        advance(0, _note(before))
        for round_ in range(1, rounds + 1):
            started = time.perf_counter()
            steps: list[Step] = []
            inner_loss, delta = jnp.zeros(()), zero
            for start, stop in schedule:
                with processes.watch():
                    delta, inner_loss = ascend(
                        state[0], batches, devices.replicate(np.int32(start))
                    )
                for index in devices.each(stop, start):
                    with processes.watch():
                        state, step = descend(state, delta, batches, index)
                        steps.append(jax.block_until_ready(devices.one(step)))
                    if not np.isfinite(steps[-1].loss):
                        raise _diverged(round_, len(steps), config)
                    advance(1, "")
            if not all_finite(devices.one(state[0])):
                raise _diverged(round_, len(steps), config)
            seconds = time.perf_counter() - started
            devices.check_equal(params=state[0], optimizer=state[1], delta=delta)
            delta, inner_loss = devices.one((delta, inner_loss))
            deltas.append(np.asarray(delta))
            history.append(
                record(
                    round=round_,
                    delta_norm=float(config.ball.size(delta)),
                    inner_loss=float(inner_loss),
                    outer_loss=float(np.mean([s.loss for s in steps])),
                    **_solves([s.report for s in steps]),
                    seconds=seconds,
                )
            )
            advance(0, _note(history[-1]))
    total = sum(r["seconds"] for r in history)
    told = {"route": config.route, "route_reason": why} if why else {}
    return Result(
        cleaned(),
        history,
        np.stack(deltas),
        total,
        compile_seconds,
        diagnostics=told,
    )


def choose_route(
    config: IBAUConfig, logits: Logits, params: Params, clean: Dataset, num_devices: int
) -> tuple[IBAUConfig, str | None]:
    """A config whose route the model and the devices allow, and why it is not the given one.

    A model that forward mode does not go through (a `jax.custom_vjp` inside) takes the route
    `jaxopt`, which gives the same gradient. Found out by tracing one image, before anything is
    compiled.
    """
    one = "computes on one device, found"
    if config.route != "explicit" and num_devices > 1:
        raise InputError(
            f"the route {config.route!r} {one} {num_devices}: choose the route 'explicit' (the "
            "same gradient) or one device"
        )
    if config.route != "explicit" or isinstance(config.solver, Direct):
        return config, None

    def inner(delta, params):
        return jnp.sum(cross_entropy(logits(params, clean.images[:1] + delta), clean.labels[:1]))

    try:
        why = needs_reverse_mode(inner, jnp.asarray(clean.images[0]), params)
    except Exception as error:  # whatever the user's own function raises
        raise InputError(
            f"the model has no second derivatives ({first_line(error)}): expected a function that "
            "JAX differentiates twice; the solver Direct() needs first derivatives only"
        ) from error
    if why and num_devices > 1:
        raise InputError(
            f"the model has no forward-mode derivatives ({why}): it needs the route 'jaxopt', "
            f"which {one} {num_devices}; choose one device"
        )
    return (replace(config, route="jaxopt") if why else config), why


class Step(NamedTuple):
    """What is known of one outer step: the outer loss, and how well the system was solved."""

    loss: jax.Array
    report: Report


def make_descent(
    logits: Logits,
    config: IBAUConfig,
    optimizer: optax.GradientTransformation,
    axis: str | None = None,
):
    """One outer step: `descend(state, delta, batches, index) -> (state, Step)`.

    `state` is (params, optimizer state, key).
    """
    loss = make_loss(logits, config, axis)
    inner_loss = make_inner(loss, config)
    implicit = ROUTES[config.route]

    def descend(state, delta, batches: Batch, index):
        params, opt_state, key = state
        key, subkey = jax.random.split(key)
        batch = patch(subkey, pick(batches, index), config.share, axis)
        hessian_batch = first_rows(
            pick(batches, 0) if config.hessian == "first" else batch,
            config.hessian_images,
            config.rows_multiple,
            axis,
        )
        value, gradient, report = implicit(
            lambda d, p: loss(d, p, batch),
            lambda d, p: inner_loss(d, p, hessian_batch),
            delta,
            params,
            solver=config.solver,
            ball=config.ball if config.constrained else None,
            keep_diverged=config.keep_diverged,
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), Step(value, report)

    return descend


def _diverged(round_: int, step: int, config: IBAUConfig) -> InputError:
    return InputError(
        f"the loss or the parameters are no longer finite at outer step {step} of round {round_}: "
        f"expected an outer rate that the model bears, found {config.outer_optimizer} with "
        f"{config.outer_rate:g}; choose a smaller outer_rate (or outer_clip=1.0)"
    )


def _solves(reports: list[Report]) -> dict[str, Any]:
    """How well the linear systems of a round were solved; means over the finite values."""

    def mean(values):
        finite = [float(v) for v in values if v is not None and np.isfinite(v)]
        return float(np.mean(finite)) if finite else None

    return {
        "residual": mean([r.residual for r in reports]),
        "contraction": mean([r.contraction for r in reports]),
        "products": int(sum(r.steps for r in reports)),
        "failed_solves": int(sum(bool(r.failed) for r in reports)),
        "fallbacks": int(sum(bool(r.dropped) for r in reports)),
    }


def _note(record: Mapping[str, Any]) -> str:
    """ACC and ASR of a record, for the progress bar."""
    shown = (("acc", "ACC"), ("asr", "ASR"), ("asr_excl", "excl."))
    return " ".join(f"{t} {record[k]:.3f}" for k, t in shown if record.get(k) is not None)
