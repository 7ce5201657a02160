"""I-BAU as a defense: Algorithm 1 (`unlearning/ibau.py`) in the hands of the driver."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.defenses.guard import bearable, roll_back
from ibau_jax.defenses.hunt import Hunt
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.devices.losses import Losses
from ibau_jax.errors import InputError, first_line
from ibau_jax.hypergradient import Direct, Report, needs_reverse_mode
from ibau_jax.models.model import Logits, Params, fixed_of, of_params
from ibau_jax.models.predict import predict, probabilities, usual_batch
from ibau_jax.progress import note_of
from ibau_jax.training.optimizers import shown
from ibau_jax.unlearning.batches import make_batches, make_mixtures, parted, resolve, shuffled
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.ibau import Step, ibau
from ibau_jax.unlearning.objective import cross_entropy
from ibau_jax.unlearning.strength import check_count


@method(IBAUConfig())
def unlearn(job: Job) -> Rounds:
    """Remove a backdoor that is not known, with a small clean set: I-BAU (Zeng et al. 2022).

    A row has `delta_norm`, `inner_loss` (H on the last batch of the last ascent, before its final
    step), `outer_loss` (mean over the round), and of the linear solves the mean `residual` and
    `contraction` (None where there is none), the sum of `products`, `failed_solves` (not finite, or
    no nearer to the solution than zero is, within 0.1 % of the residual; the direct gradient by
    choice is none) and `fallbacks` (outer steps that took the direct gradient instead). `deltas`
    are the last perturbations of the rounds. The diagnostics have `route` and `route_reason` where
    the model made it leave the route of its config.

    Where the config searches (`searched`), there are `stages` of all rounds, and `flagged` are the
    labels that they unlearned, `found` the strongest perturbations towards them (see `Hunt`). The
    diagnostics have `verdict` (`cleaned`, `was-clean`, `not-cleaned`) and `reason`; `suspects`, all
    labels that stood out; `late`, how near to a level what led to the others still came when most
    of the way was gone; `misled` and `alike` of `unlearning.evidence.Evidence`; `searched`, how
    many perturbations the rounds had; `left`, how near a fresh search comes to a level in the end;
    `kept`, the share of the way that was gone: as far as the accuracy on held-back images allows. A
    row has `held_acc`, that accuracy.
    """
    devices, clean, key = job.devices, job.clean, job.key
    logits, params = of_params(job.model, job.variables), job.variables["params"]
    with job.compiling():
        config = resolve(job.config, logits, params, clean.images, len(devices.all))
        config, why = choose_route(config, logits, params, clean, len(devices.all))
    job.advice = (
        "expected an outer_optimizer that the model bears, found "
        f"{shown(config.outer_optimizer)}; choose a smaller rate, or clip=1.0"
    )
    given, held = params, None
    if back := config.held(len(clean.labels)):
        held_key, key = jax.random.split(key)
        held, clean = parted(clean, held_key, back)
    if config.shuffle:
        order_key, key = jax.random.split(key)
        clean = shuffled(clean, order_key)
    if config.searched:
        check_count(clean)
    rounds, row = config.rounds or 1, {}
    yield job.variables, row
    teach = probabilities(job.model)
    if config.distilled or config.mixed:
        with job.compiling():
            teach(job.variables, clean.images[: usual_batch()])
    taught = teach(job.variables, clean.images) if config.distilled else None
    batches, sizes = make_batches(clean, config, devices, taught)
    fixed = devices.replicate(fixed_of(job.variables))
    algorithm = ibau(job.model, config, len(sizes), devices.axis, job.program, fixed)
    with job.compiling():
        init = jax.jit(algorithm.init)
        state = devices.replicate(init(params, key))
        size = jax.jit(config.ball.size).lower(clean.images[0]).compile()
    label, kept = predict(job.model), 1.0

    def right(params: Params) -> np.ndarray:
        if held is None:
            return np.ones(0, bool)
        return label({**job.variables, "params": params}, held.images) == held.labels

    seen = right if held else None
    hunt = Hunt(job, clean, config, len(sizes), seen) if config.searched else None
    deltas: list[np.ndarray] = []
    if hunt:
        hunt.look(params)
    for stage in itertools.count(1):
        title = "I-BAU" if stage == 1 else f"I-BAU, stage {stage}"
        with job.progress(rounds * len(sizes), title) as advance:
            losses = Losses(devices, partial(job.check_finite, "the loss"))

            def told(step: Step, advance=advance, losses=losses) -> None:
                losses.add(step.loss)
                advance(1)

            for number in range(rounds):
                advance(0, note_of(row))
                aims = hunt.aims(number) if hunt else ()
                if config.mixed:  # of each round others
                    say = partial(teach, job.variables)
                    mixed = make_mixtures(clean, config, number, say, devices)
                    batches = batches._replace(mixed=mixed)
                state, info = algorithm.round(state, batches, told, aims)
                losses.read()
                devices.check_equal(state=state, deltas=info.deltas)
                found, height, steps = devices.read(info)
                delta = found[-1]
                deltas.append(delta)
                row = {
                    "delta_norm": float(size(delta)),
                    "inner_loss": float(height),
                    "outer_loss": float(np.mean([step.loss for step in steps])),
                    **_solves([step.report for step in steps]),
                }
                params = devices.one(state.params)
                ends = number == rounds - 1
                if hunt:
                    hunt.met(found)
                if hunt and not ends:
                    hunt.between(params)
                goes_on = ends and hunt is not None and hunt.goes_on(params)
                if ends and not goes_on and hunt and held is not None:
                    params = hunt.settled(params)
                    bears = partial(bearable, right, right(given), budget=hunt.budget)
                    params, kept = roll_back(bears, given, params)
                if held is not None:
                    row["held_acc"] = float(right(params).mean())
                yield {**job.variables, "params": params}, row
            advance(0, note_of(row))
        if not goes_on:
            break
        begin = given if hunt and hunt.anew else params
        state = devices.replicate(init(begin, devices.one(state.key)))
    diagnostics = {"route": config.route, "route_reason": why} if why else {}
    if hunt is None:
        return Told(deltas=np.stack(deltas), diagnostics=diagnostics)
    diagnostics |= hunt.told(params, kept)
    return Told(np.stack(deltas), hunt.pool.pictures(), diagnostics)


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
