"""A function evaluated with its convolutions written as matrix products: any model, on a CPU.

`products` says what that is good for. It must be the function itself that is rewritten and then
differentiated: in the convolutions of its derivatives the windows are as large as the images.

A program (jaxpr) is walked equation by equation, and only into those that hold a convolution.
Loops and branches are built anew by the functions they were once made with. All else JAX evaluates
as it is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from ibau_jax.models.products import convolution_as_products, suits

Values = list[Any]


def on_cpu(function: Callable) -> Callable:
    """`with_products(function)` where JAX computes on a CPU, else the function."""
    products = with_products(function)

    def either(*args):  # asked when it is traced: the backend may not be chosen yet
        return (products if jax.default_backend() == "cpu" else function)(*args)

    return either


def with_products(function: Callable) -> Callable:
    """The same function of pytrees of arrays, each convolution in it as matrix products.

    Equal to rounding, also in its derivatives of any order. It goes through `jit` (what is inside
    becomes part of what is outside), `scan`, `fori_loop`, `while_loop`, `cond`, `switch`,
    `checkpoint`, and `custom_jvp` and `custom_vjp` with their rules. What stays: convolutions of
    whole numbers, those with groups of the batch, and those inside `shard_map` or `pmap`.
    """

    def rewritten(*args):
        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _evaluate(program.jaxpr, program.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return rewritten


def has_convolution(program: Jaxpr | ClosedJaxpr) -> bool:
    """Is there one that is not of whole numbers in a program, at any depth?"""
    return any(
        _is_convolution(eqn) or any(map(has_convolution, inside(eqn))) for eqn in program.eqns
    )


def _is_convolution(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "conv_general_dilated":
        return False
    x, kernel, y = (cast(Any, v.aval) for v in (*eqn.invars, *eqn.outvars))
    return suits(x, kernel, **eqn.params) and y.size > 0


def inside(eqn: JaxprEqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """The programs among the parameters of an equation."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            if isinstance(one, Jaxpr | ClosedJaxpr):
                yield one


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> Values:
    known: dict[Any, Any] = {}

    def read(atoms: Iterable[Any]) -> Values:
        return [a.val if isinstance(a, Literal) else known[a] for a in atoms]

    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _result(jaxpr, eqn, read(eqn.invars)), strict=True))
    return read(jaxpr.outvars)


def _result(jaxpr: Jaxpr, eqn: JaxprEqn, values: Values) -> Values:
    if _is_convolution(eqn):
        return [convolution_as_products(*values, **eqn.params)]
    rebuild = _REBUILT.get(eqn.primitive.name)
    if rebuild and any(map(has_convolution, inside(eqn))):
        typed = [_typed(v, x) for v, x in zip(eqn.invars, values, strict=True)]
        return [*rebuild(eqn.params, partial(_as_it_is, jaxpr, eqn), typed)]
    return _as_it_is(jaxpr, eqn, *values)


def _as_it_is(jaxpr: Jaxpr, eqn: JaxprEqn, *values: Any) -> Values:
    """One equation, by JAX's own evaluation."""
    variables = [
        (v, x) for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)
    ]
    alone = jaxpr.replace(
        constvars=[],
        invars=[v for v, _ in variables],
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*(x for _, x in variables))


def _typed(atom: Any, value: Any) -> Any:
    """An array also of a number of Python's, which has no type of its own."""
    return value if hasattr(value, "dtype") else np.asarray(value, atom.aval.dtype)


def _run(program: Jaxpr | ClosedJaxpr, values: Sequence[Any]) -> Values:
    if isinstance(program, ClosedJaxpr):
        return _evaluate(program.jaxpr, program.consts, values)
    return _evaluate(program, (), values)


# Each is given the parameters of an equation, the equation as a function of its values, and those.


def _inlined(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    del call
    return _run(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], values)


def _scan(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    del call
    start = params["num_consts"]
    end = start + params["num_carry"]
    fixed, carry, over = values[:start], values[start:end], values[end:]

    def body(carry, now):
        found = _run(params["jaxpr"], [*fixed, *carry, *now])
        return found[: len(carry)], found[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, carry, over, **options)
    return [*carry, *stacked]


def _while(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    del call
    start = params["cond_nconsts"]
    end = start + params["body_nconsts"]
    ask, fixed, carry = values[:start], values[start:end], values[end:]
    return lax.while_loop(
        lambda carry: _run(params["cond_jaxpr"], [*ask, *carry])[0],
        lambda carry: _run(params["body_jaxpr"], [*fixed, *carry]),
        carry,
    )


def _cond(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    del call
    index, *operands = values
    branches = [lambda *given, b=branch: _run(b, given) for branch in params["branches"]]
    return lax.switch(index, branches, *operands)


def _checkpoint(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    del call
    options = {name: params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *given: _run(params["jaxpr"], given), **options)(*values)


def _custom_jvp(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    if not _floats(values, params["call_jaxpr"].out_avals):
        return call(*values)
    value = jax.custom_jvp(lambda *given: _run(params["call_jaxpr"], given))
    # The program of the derivative is that of the rule.
    value.defjvp(with_products(partial(jax.jvp, call)))
    return value(*values)


def _custom_vjp(params: Mapping[str, Any], call: Callable, values: Values) -> Values:
    if not _floats(values, params["call_jaxpr"].out_avals):
        return call(*values)
    value = jax.custom_vjp(lambda *given: _run(params["call_jaxpr"], given))
    pull = with_products(lambda pull, slopes: pull(slopes))
    value.defvjp(with_products(partial(jax.vjp, call)), pull)
    return value(*values)


def _floats(*arrays: Iterable[Any]) -> bool:
    """Whole numbers have no tangents that a program could be given."""
    return all(jnp.issubdtype(a.dtype, jnp.floating) for some in arrays for a in some)


# By the names that a printed program has, which are older than `jax.extend.core.primitives`.
_REBUILT: dict[str, Callable[[Mapping[str, Any], Callable, Values], Values]] = {
    "jit": _inlined,
    "closed_call": _inlined,
    "call": _inlined,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _checkpoint,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}
