"""A PyTorch module made ready: unwrapped, checked, copied; and what it says, as logits."""

import copy
from typing import Any

import jax
import jax.numpy as jnp

from ibau_jax.errors import InputError, first_line
from ibau_jax.models.adapters.torch_pass import environment, need_torch


def unwrapped(module: Any) -> Any:
    """The user's module without `DataParallel` and `torch.compile` around it, checked.

    Raises:
      InputError: it is no module, a script, not initialised, in double precision, or a weight is
        not finite.
    """
    torch = need_torch()
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, found {type(module).__name__}")
    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    while True:
        if isinstance(module, parallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            break
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            "the module is a TorchScript, whose code cannot be traced by JAX: expected the Python "
            "module that it was made of, with its weights loaded"
        )
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        _check(name, value)
    return module


def _check(name: str, value: Any) -> None:
    torch = need_torch()
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin) or value.is_meta:
        raise InputError(f"{name} has no values yet: expected a module with its weights loaded")
    if value.dtype == torch.float64:
        raise InputError(
            f"{name} is in double precision: expected float32 or less; convert the module with "
            ".float()"
        )
    if value.is_complex() or value.is_quantized:
        raise InputError(f"{name} is {value.dtype}: expected plain floating point")
    if value.is_floating_point() and bool(torch.isnan(value).any()):
        raise InputError(f"{name} holds NaN: expected finite weights; take another checkpoint")
    if isinstance(value, torch.nn.Parameter) and not bool(torch.isfinite(value).all()):
        raise InputError(
            f"{name} holds infinite values: expected finite weights; take another checkpoint"
        )


def own_copy(module: Any) -> Any:
    """A copy that `torch_pass.running` can run: float32, eval mode, on the CPU.

    Tensors that are no variables become constants of JAX. The counters of batch norms are left out;
    a momentum that they decide (`momentum=None`) stays what it is now.
    """
    torch = need_torch()
    memo: dict[int, Any] = {}
    for one in module.modules():  # computed tensors, as `weight_norm` has, refuse to be copied
        for value in vars(one).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        own = copy.deepcopy(module, memo)
    except Exception as error:  # whatever an attribute of the user's raises
        raise InputError(f"the module cannot be copied: {first_line(error)}") from error
    own = own.cpu().float().eval()
    for one in own.modules():
        if isinstance(one, torch.nn.modules.batchnorm._NormBase):
            if one.momentum is None and one.num_batches_tracked is not None:
                one.momentum = 1 / (int(one.num_batches_tracked) + 1)
            one.num_batches_tracked = None
        if isinstance(one, torch.nn.SyncBatchNorm):  # refuses to be trained on a CPU
            one.__class__ = _any_batch_norm()
        for name, value in one._buffers.items():
            if value is not None and not is_variable(one, name, value):
                one._buffers[name] = _constant(value)
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor) or (
                type(value) in (list, tuple, dict) and not name.startswith("_")
            ):
                vars(one)[name] = torch.utils._pytree.tree_map_only(torch.Tensor, _constant, value)
    return own


def tied_names(module: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of names of one parameter: another one, and the first."""
    first = {id(value): name for name, value in module.named_parameters()}
    return tuple(
        (name, first[id(value)])
        for name, value in module.named_parameters(remove_duplicate=False)
        if first[id(value)] != name
    )


def is_variable(module: Any, name: str, value: Any) -> bool:
    """Is a module's own buffer one of the variables: of floats, and in the state dict?"""
    return value.is_floating_point() and name not in module._non_persistent_buffers_set


def _constant(value: Any) -> Any:
    """A tensor of torchax with the same numbers (whole ones as wide as JAX has them)."""
    return environment().j2t_iso(jnp.asarray(value.detach().cpu().numpy()))


def _any_batch_norm() -> type:
    torch = need_torch()

    class AnyBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, input):
            del input

    return AnyBatchNorm


def outcome(found: Any) -> jax.Array:
    """The logits in what a module returns.

    Raises:
      InputError: there are none.
    """
    torch = need_torch()
    given: Any = found
    if isinstance(found, dict):
        found = found.get("logits", found)
    elif not isinstance(found, torch.Tensor):
        found = getattr(found, "logits", found)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    logits: Any = found
    if not isinstance(logits, torch.Tensor):
        raise InputError(
            f"the module gives {type(given).__name__}: expected logits [N, classes], or an object "
            "that has them as 'logits'"
        )
    return logits.jax()
