"""A model of PyTorch's from code and a file of weights, and back into such a file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibau_jax.errors import InputError, first_line
from ibau_jax.models.adapters.torch_model import TorchModel, from_torch, to_state_dict
from ibau_jax.models.adapters.torch_modules import module_by_name
from ibau_jax.models.adapters.torch_own import tied_names, unwrapped
from ibau_jax.models.adapters.torch_pass import need_torch
from ibau_jax.models.checkpoints.names import check_fit, prefix_of
from ibau_jax.models.checkpoints.reading import Container, read_checkpoint
from ibau_jax.models.checkpoints.writing import write_checkpoint
from ibau_jax.models.model import Variables


def load_torch(
    path: str | Path, spec: str, args: Mapping[str, Any] | None = None
) -> tuple[TorchModel, Variables, Container]:
    """The weights of a file in the module of a name, as a model and its variables.

    Args:
      path: see `read_checkpoint`.
      spec, args: see `module_by_name`.

    Returns:
      Model, variables, and the container for `save_torch`.

    Raises:
      InputError: the file cannot be read or does not fit the module, or one of these refuses.
    """
    torch = need_torch()
    container = read_checkpoint(path)  # before any code of the user's is run
    module = unwrapped(module_by_name(spec, args))
    wanted = module.state_dict()
    tensors = {k: v for k, v in container.state.items() if isinstance(v, torch.Tensor)}
    prefix = prefix_of(container.state, wanted)
    found = {name.removeprefix(prefix): value for name, value in tensors.items()}
    double = next((name for name, value in tensors.items() if value.dtype == torch.float64), None)
    if double is not None:
        raise InputError(
            f"{str(path)!r} holds {double!r} in double precision: expected float32 or less; "
            "convert the weights first"
        )
    tied = tied_names(module)
    lent = {a: b for a, b in tied if a not in found} | {b: a for a, b in tied if b not in found}
    shapes = {n: tuple(v.shape) for n, v in wanted.items() if isinstance(v, torch.Tensor)}
    check_fit({n: tuple(v.shape) for n, v in found.items()}, shapes, str(path), lent)
    given = {**wanted, **{n: found[m] for n, m in lent.items() if m in found}, **found}
    try:
        module.load_state_dict(given)
    except Exception as error:  # hooks of the user's, extra state
        raise InputError(f"the module refuses the weights: {first_line(error)}") from error
    model, variables = from_torch(module)
    return model, variables, replace(container, tied=model.tied)


def save_torch(path: str | Path, container: Container, variables: Variables) -> str:
    """Write cleaned variables as `container` held the poisoned ones; see `write_checkpoint`.

    Returns:
      A line for the user on what differs from the file that was read; "" where nothing does.
    """
    state = to_state_dict(variables, container.state, container.tied)
    return write_checkpoint(path, container, state)
