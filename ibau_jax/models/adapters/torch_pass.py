"""One pass through a PyTorch module in JAX's hands: torchax, and what it lacks.

torchax runs the module's own Python while JAX traces, each operation of torch as one of JAX. What
is mended here:

1. Batch norm in training mode leaves its running statistics as they are. Here it is computed with
   the weights of the images, over all devices, and moves the statistics.
2. Dropout would leak its random key out of the program. Here masks are drawn from the key of the
   pass, the same however many devices there are.
3. `torch.tensor([...])` in a forward makes a tensor that cannot be mixed with those of JAX.
4. A forward that tests a constant (torchvision's `Normalize`: is a deviation zero?) needs its value
   while it is traced.
5. Antialiased resizing has a lowering that fails.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.devices import mesh
from ibau_jax.errors import InputError, first_line

INSTALL = "run pip install 'ibau_jax[torch]'"


def need_torch() -> Any:
    """The module `torch`.

    Raises:
      InputError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(f"PyTorch is needed and not installed: {INSTALL}") from error
    return torch


def need_torchax() -> Any:
    """The module `torchax`; importing it leaves torch's fast path of attention as it was.

    Raises:
      InputError: it is not installed, or does not fit the version of PyTorch.
    """
    torch = need_torch()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        import torchax
        import torchax.tensor
    except ImportError as error:
        raise InputError(
            f"torchax is needed and not installed ({first_line(error)}): {INSTALL}"
        ) from error
    except Exception as error:  # of a torch that is too new for it
        raise InputError(
            f"torchax does not work with PyTorch {torch.__version__} ({first_line(error)[:80]}): "
            f"expected torch below 2.13; {INSTALL}"
        ) from error
    torch.backends.mha.set_fastpath_enabled(fast)
    return torchax


@dataclass
class Pass:
    """What one pass knows; it lives while a program is traced.

    Attributes:
      rows: images on this device.
      key: random key of training mode; None: evaluation mode.
      weights: [rows], of the images in batch statistics; None: all count the same.
      axis: the mapped axis of the devices.
      dropout: whether it drops.
      draws: masks drawn so far.
      places: of the rows in the whole batch, [rows]; width: of the axis; both set by `running`.
    """

    rows: int
    key: jax.Array | None = None
    weights: jax.Array | None = None
    axis: str | None = None
    dropout: bool = True
    draws: int = 0
    places: Any = None
    width: int = 1

    def batch_norm(
        self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
        eps=1e-5,
    ):  # fmt: skip
        """`torch.nn.functional.batch_norm`: x [N, C, ...]; moves the running statistics in place.

        Running variances are unbiased, as PyTorch keeps them.
        """
        values = x.jax()
        one = (1, -1) + (1,) * (values.ndim - 2)
        if training:
            mean, var, count = self._statistics(values)
            if running_mean is not None:
                unbiased = var * (count / jnp.maximum(count - 1, 1)).astype(var.dtype)
                for held, new in ((running_mean, mean), (running_var, unbiased)):
                    held._elem = (1 - momentum) * held.jax() + momentum * new
        else:
            mean, var = running_mean.jax(), running_var.jax()
        gain = lax.rsqrt(var + eps)
        gain = gain if weight is None else gain * weight.jax()
        # Of the batch's own mean first, since a large one would take digits of the small rest.
        found = (values - mean.reshape(one)) * gain.reshape(one)
        return _wrap(found if bias is None else found + bias.jax().reshape(one))

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean and variance [C] of x [N, C, ...] over all images and places, and their number."""
        places = tuple(range(2, x.ndim))
        weights, real = self.weights, jnp.ones(len(x))
        if weights is not None and len(x) % self.rows == 0:
            parts = len(x) // self.rows  # of an image, where the module has cut it
            weights = jnp.repeat(weights / parts, parts).astype(x.dtype)
            real = weights > 0
        else:
            weights = jnp.full(len(x), 1 / (len(x) * self.width), x.dtype)

        def mean(values):
            return mesh.total(jnp.tensordot(weights, values.mean(places), 1), self.axis)

        center = mean(x)
        var = mean(jnp.square(x - center.reshape((1, -1) + (1,) * len(places))))
        count = mesh.total(jnp.sum(real), self.axis) * (x.size // (len(x) * x.shape[1]))
        return center, var, count

    def drop(self, x, p=0.5, training=True, inplace=False):
        """`torch.nn.functional.dropout`."""
        if not training or not p or not self.dropout:
            return x
        assert self.key is not None, "evaluation mode drops nothing"
        self.draws += 1
        key, shape = jax.random.fold_in(self.key, self.draws), x.shape
        if shape[0] == self.rows:  # the mask of the whole batch, of which these rows are ours
            whole = (len(x) * self.width, *shape[1:])
            keep = jax.random.bernoulli(key, 1 - p, whole)[self.places]
        else:
            own = jax.random.fold_in(key, self.places[0])
            keep = jax.random.bernoulli(own, 1 - p, tuple(shape))
        values = jnp.where(keep, x.jax() / (1 - p), 0) if p < 1 else jnp.zeros_like(x.jax())
        return x.copy_(_wrap(values)) if inplace else _wrap(values)


@contextlib.contextmanager
def running(this: Pass) -> Iterator[None]:
    """Inside, operations of torch on tensors of `wrapped` are those of JAX."""
    torch, env = need_torch(), environment()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # What asks for the axis is asked before: the constants that are computed inside know of none.
    this.places, this.width = mesh.numbers(this.rows, this.axis), mesh.width(this.axis)
    key = this.key if this.key is None else jax.random.fold_in(this.key, 0)
    if key is not None and this.axis is not None:
        key = jax.random.fold_in(key, this.places[0])
    seed = contextlib.nullcontext() if key is None else env.override_property(prng=key)
    try:
        with warnings.catch_warnings():
            # torchax asks for PyTorch's int64 and float64, and gets 32 bits, as everything here.
            warnings.filterwarnings("ignore", "Explicitly requested dtype (int|float)64")
            with torch.no_grad(), jax.ensure_compile_time_eval(), seed, env, _mode(this):
                yield
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise InputError(
            "the module's forward asks for the value of a tensor (an 'if' on it, .item() or "
            ".numpy()): expected one that computes the same whatever the values"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def wrapped(tree: Any) -> Any:
    """Arrays of JAX as tensors; a dict, list or tuple of them too."""
    return environment().j2t_iso(tree)


@functools.cache
def environment() -> Any:
    """An environment of torchax of our own: what is mended in it changes no one else's."""
    torch, torchax = need_torch(), need_torchax()
    env = torchax.tensor.Environment()
    for name, method in (
        ("_upsample_bilinear2d_aa", "linear"),
        ("_upsample_bicubic2d_aa", "cubic"),
    ):
        operation = getattr(torch.ops.aten, name)
        env.override_op_definition(operation, functools.partial(_resize, method))
        env.override_op_definition(operation.default, functools.partial(_resize, method))
    return env


def _resize(method: str, x: Any, output_size: Any = None, *_: Any, **__: Any) -> Any:
    values = x.jax()
    shape = (*values.shape[:2], *output_size)
    return _wrap(jax.image.resize(values, shape, method, antialias=True))


def _wrap(values: jax.Array) -> Any:
    return environment().j2t_iso(values)


def _mode(this: Pass) -> Any:
    """What is done in place of single functions of torch."""
    torch = need_torch()
    constructors = need_torchax().tensor.TENSOR_CONSTRUCTORS
    functional = torch.nn.functional
    ours: Mapping[Callable, Callable] = {
        functional.batch_norm: this.batch_norm,
        functional.dropout: this.drop,
    }
    drops = {getattr(functional, n) for n in _DROPS} | {torch.dropout, torch.alpha_dropout}

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func in constructors and kwargs.get("device") is None:
                return func(*args, **{**kwargs, "device": "jax"})
            if func in drops and not this.dropout:
                return args[0] if args else kwargs["input"]
            if func in ours:
                bound = inspect.signature(func).bind(*args, **kwargs).arguments
                return _call(ours[func], bound)
            return func(*args, **kwargs)

    return Mode()


_DROPS = ("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def _call(function: Callable, named: Mapping[str, Any]) -> Any:
    """`function`, whose first argument torch calls `input`."""
    rest = {name: value for name, value in named.items() if name != "input"}
    return function(named["input"], **rest)
