"""Any `torch.nn.Module` as a `Model`, and its cleaned weights back in the module's own names.

model, variables = from_torch(module)
result = unlearn(model, variables, clean, key=jax.random.key(0))
module.load_state_dict(to_state_dict(result.params, module.state_dict()))
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.errors import InputError
from ibau_jax.models.adapters.torch_own import outcome, own_copy, tied_names, unwrapped
from ibau_jax.models.adapters.torch_pass import Pass, need_torch, need_torchax, running, wrapped
from ibau_jax.models.adapters.watch import Feeds, Path
from ibau_jax.models.checkpoints.names import prefix_of
from ibau_jax.models.model import Variables
from ibau_jax.models.rewrite import on_cpu

STATISTICS = ("running_mean", "running_var")
TINY = 1e-30  # of a probability, so that its logarithm is finite


@dataclass(frozen=True)
class TorchModel:
    """A PyTorch module as pure functions of its variables; `from_torch` makes it.

    Variables are nested dicts by the parts of torch's dotted names, in torch's layouts, float32:
    `params` (what is trained), `batch_stats` (`running_mean`, `running_var` of batch norms) and
    `state` (other buffers of floats, parameters with `requires_grad=False` beside others without).
    Whole numbers among the buffers, and what is in no state dict, are constants of the module.

    Attributes:
      module: a copy of the user's, in eval mode between calls.
      probabilities: the module ends in a softmax, whose logarithm stands for logits.
      dropout: whether training drops anything (layers of dropout; stochastic depth always does).
      tied: pairs of names of one tensor, the second is that of the variables.
    """

    module: Any
    probabilities: bool = False
    dropout: bool = True
    tied: tuple[tuple[str, str], ...] = ()

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        """[N, H, W, C] in [0, 1] -> [N, num_classes], in evaluation mode."""

        def logits(variables, images):
            return self._run(variables, images, Pass(len(images)))[0]

        return on_cpu(logits)(variables, images)

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and maps [N, h, w, c] in evaluation mode.

        A map is the last output of a module at each size of an image [h, w] that a convolution
        (`Conv2d`) gives: of a ResNet those of its stages, of a VGG those before its poolings. 1x1
        is none.
        """

        def maps(variables, images):
            return self._run(variables, images, Pass(len(images)), look=True)[:2]

        return on_cpu(maps)(variables, images)

    def train(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array,
        weights: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Variables]:
        """Logits, maps, and the other collections with the statistics moved, in training mode."""

        def trained(variables, images, key, weights):
            this = Pass(len(images), key, weights, axis, self.dropout)
            return self._run(variables, images, this, look=True)

        return on_cpu(trained)(variables, images, key, weights)

    def without_dropout(self) -> "TorchModel":
        """The model whose training drops nothing."""
        return replace(self, dropout=False)

    def fed_by(self, variables: Variables, images: jax.Array) -> dict[Path, Path]:
        """Of each module, the one whose output it is given as it is (their paths)."""
        feeds = Feeds()

        def note(name: str, _: Any, inputs: Any, output: Any) -> None:
            if inputs and hasattr(inputs[0], "jax") and hasattr(output, "jax"):
                feeds.note(tuple(name.split(".")), inputs[0].jax(), output.jax())

        hooks = [
            one.register_forward_hook(partial(note, name))
            for name, one in self.module.named_modules()
            if name
        ]
        try:
            jax.eval_shape(lambda v, x: self(v, x), variables, images)
        finally:
            for hook in hooks:
                hook.remove()
        return feeds.found

    def _run(
        self, variables: Variables, images: jax.Array, this: Pass, look: bool = False
    ) -> tuple[jax.Array, list[jax.Array], Variables]:
        torch = need_torch()
        kind = jnp.result_type(*jax.tree.leaves(variables["params"]))
        named = {
            collection: {name: jnp.asarray(leaf, kind) for name, leaf in _flat(tree).items()}
            for collection, tree in variables.items()
        }
        held = wrapped({k: v for tree in named.values() for k, v in tree.items()})
        x = wrapped(images.astype(kind).transpose(0, 3, 1, 2))
        seen: list[tuple[bool, jax.Array]] = []
        self.module.train(this.key is not None)
        hooks = _watch(self.module, seen) if look else []
        try:
            with running(this):
                found = torch.func.functional_call(self.module, held, (x,))
        finally:
            self.module.eval()
            for hook in hooks:
                hook.remove()
        logits = outcome(found)
        if self.probabilities:
            logits = jnp.log(jnp.maximum(logits, TINY))
        others = {
            collection: _nested({name: held[name].jax() for name in tree})
            for collection, tree in named.items()
            if collection != "params"
        }
        return logits, _maps(seen), others


def from_torch(module: Any) -> tuple[TorchModel, Variables]:
    """A module as a model, and its variables.

    One that wants normalised images goes behind `models.normalised.normalised`.

    Args:
      module: a `torch.nn.Module` of images [N, C, H, W], of any size and on any device, that gives
        logits [N, classes], or an object or dict that has them as `logits`. It is copied and stays
        as it is. `DataParallel` and `torch.compile` are taken off. Half precision is computed in
        float32. (torchax, once imported, is a device `jax` of torch's, to which a `DataParallel`
        that is made later would move.)

    Raises:
      InputError: PyTorch or torchax is missing, or it is no such module, has weights in another
        precision (double), or that are not finite.
    """
    torch = need_torch()
    module = unwrapped(module)
    own = own_copy(module)
    any_trained = any(p.requires_grad for p in module.parameters())
    named: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}, "state": {}}
    for name, value in [*own.named_parameters(), *own.named_buffers()]:
        if isinstance(value, need_torchax().tensor.Tensor):
            continue  # a constant
        if isinstance(value, torch.nn.Parameter):
            collection = "params" if value.requires_grad or not any_trained else "state"
        else:
            collection = "batch_stats" if name.split(".")[-1] in STATISTICS else "state"
        # A copy: the memory is the module's
        named[collection][name] = np.array(value.detach().numpy())
    if not named["params"]:
        raise InputError("the module has no parameters: expected a trained classifier")
    variables = {name: _nested(found) for name, found in named.items() if found}
    return TorchModel(own, tied=tied_names(module)), variables


def to_state_dict(
    variables: Mapping[str, Any],
    original: Mapping[str, Any],
    tied: Sequence[tuple[str, str]] = (),
) -> "OrderedDict[str, Any]":
    """The variables as a state dict like `original`: its keys, order, dtypes, devices, buffers.

    Args:
      variables: of `from_torch`, cleaned.
      original: the state dict of the module, or of its file; keys may have a prefix (`module.`).
      tied: `TorchModel.tied`; names that share memory in `original` are found without it.

    Raises:
      InputError: names of the variables are not in `original`, or values are too large for its
        precision.
    """
    torch = need_torch()
    named = {n: v for tree in variables.values() for n, v in _flat(tree).items()}
    prefix = prefix_of(original, named)
    others = {prefix + a: b for a, b in tied} | _shared(original, prefix, named)
    there = {key.removeprefix(prefix) for key in original}
    there |= {b for a, b in others.items() if a in original}
    lacking = [name for name in _flat(variables["params"]) if name not in there]
    if lacking:
        raise InputError(
            f"the state dict has no {prefix + lacking[0]!r}: expected that of the module which the "
            "variables are of"
        )
    found: OrderedDict[str, Any] = OrderedDict()
    for key, old in original.items():
        name = others.get(key, key.removeprefix(prefix))
        if not isinstance(old, torch.Tensor) or name not in named or not old.is_floating_point():
            found[key] = old.detach().clone() if isinstance(old, torch.Tensor) else old
            continue
        new = torch.empty_like(old, requires_grad=False)  # of the same dtype, device and strides
        new.copy_(torch.from_numpy(np.array(named[name], np.float32)))
        if not bool(torch.isfinite(new).all()) and np.isfinite(named[name]).all():
            raise InputError(f"{key!r} holds values too large for {old.dtype}: use float32")
        kept = isinstance(old, torch.nn.Parameter)
        found[key] = torch.nn.Parameter(new, old.requires_grad) if kept else new
    if hasattr(original, "_metadata"):  # versions, which load_state_dict looks at
        found._metadata = original._metadata  # type: ignore[attr-defined]
    return found


def _shared(original: Mapping[str, Any], prefix: str, named: Mapping[str, Any]) -> dict[str, str]:
    """Keys whose tensor is that of a name that the variables have."""
    torch = need_torch()

    def place(value):
        return value.data_ptr(), tuple(value.shape), value.stride()

    tensors = {k: v for k, v in original.items() if isinstance(v, torch.Tensor) and v.numel()}
    owners = {place(v): k.removeprefix(prefix) for k, v in reversed(tensors.items())}
    owners |= {place(tensors[prefix + n]): n for n in named if prefix + n in tensors}
    return {
        key: owners[place(value)]
        for key, value in tensors.items()
        if key.removeprefix(prefix) not in named and owners[place(value)] in named
    }


def _watch(module: Any, seen: list[tuple[bool, jax.Array]]) -> list[Any]:
    """Note all outputs [N, C, h, w] of modules inside: are they a convolution's, and what."""
    torch = need_torch()

    def note(one: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            seen.append((isinstance(one, torch.nn.Conv2d), output.jax()))  # type: ignore

    return [one.register_forward_hook(note) for one in module.modules() if one is not module]


def _maps(seen: list[tuple[bool, jax.Array]]) -> list[jax.Array]:
    last = {found.shape[2:]: found for _, found in seen}
    sizes = dict.fromkeys(found.shape[2:] for convolved, found in seen if convolved)
    return [last[size].transpose(0, 2, 3, 1) for size in sizes if size != (1, 1)]


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict({tuple(name.split(".")): value for name, value in named.items()})
