"""What every defense is given: a model, and its variables in one form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.errors import InputError
from ibau_jax.models.rewrite import on_cpu

Params = Any
Variables = dict[str, Any]
Logits = Callable[[Params, jax.Array], jax.Array]


def evaluation_logits(module: nn.Module, variables: Mapping[str, Any]) -> Logits:
    """The pure function `logits(params, images)` in evaluation mode.

    Dropout is off and the running statistics of batch norm are fixed at those of
    `variables`; scale and offset of batch norm are among `params` (`variables["params"]`).
    """
    return of_params(Classifier(module), variables)


@runtime_checkable
class Model(Protocol):
    """What every defense is given: pure functions of the variables.

    Variables are a dict: `params`, a pytree of floating-point arrays, is what is unlearned; other
    collections, such as `batch_stats`, are state. All three are traced by JAX, also in loops.
    `Classifier` is that of flax; any object with these methods will do.
    """

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Logits in evaluation mode: [N, H, W, C] in [0, 1] -> [N, num_classes]."""
        ...

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and maps [N, h, w, c] in evaluation mode."""
        ...

    def train(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array,
        weights: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Variables]:
        """Logits, maps and the other collections updated, in training mode.

        `weights` [N] are those of the images in batch statistics (zero: padding), taken over all
        devices of the mapped axis `axis`.
        """
        ...


@dataclass(frozen=True)
class Classifier:
    """A flax module as `logits(variables, images)` that can also be trained and looked into.

    For defenses that train with batch statistics and dropout, or need what is inside. What
    they call parameters are then the whole `variables` (`params` and `batch_stats`).

    Attributes:
      module: a `VGG`, or another flax module that takes the same arguments and has the same
        collections; its maps are what it sows as intermediates (it may sow nothing).
    """

    module: Any

    def __call__(self, variables: Params, images: jax.Array) -> jax.Array:
        """[N, H, W, C] in [0, 1] -> [N, num_classes], in evaluation mode."""
        return on_cpu(self.module.apply)(variables, images)

    def look(self, variables: Params, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and maps in evaluation mode; a map is the output of a block before pooling."""
        apply = on_cpu(partial(self.module.apply, mutable=["intermediates"]))
        logits, found = apply(variables, images)
        return logits, _in_order(found)

    def init(self, key: jax.Array, images: jax.Array) -> Variables:
        """Fresh variables for images like these."""
        return self.module.init(key, images)

    def train(
        self,
        variables: Params,
        images: jax.Array,
        key: jax.Array,
        weights: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Params]:
        """Logits, maps, and the other collections updated, in training mode; see `VGG`."""
        module = self.module.clone(axis=axis)

        def apply(variables, images, key, weights):
            return module.apply(
                variables,
                images,
                train=True,
                weights=weights,
                rngs={"dropout": key},
                mutable=["batch_stats", "intermediates"],
            )

        logits, found = on_cpu(apply)(variables, images, key, weights)
        maps = _in_order(found)
        return (
            logits,
            maps,
            {name: value for name, value in found.items() if name != "intermediates"},
        )

    def without_dropout(self) -> "Classifier":
        """The same, whose training drops nothing, where its module has rates (`VGG.dropout`)."""
        if not hasattr(self.module, "dropout"):
            return self
        return Classifier(self.module.clone(dropout=tuple(0.0 for _ in self.module.dropout)))


def _in_order(found: Mapping[str, Any]) -> list[jax.Array]:
    maps = found.get("intermediates", {})
    return [maps[name][0] for name in sorted(maps)]


class Frozen(NamedTuple):
    """A plain `logits(params, images)` with the methods of a `Classifier`.

    It is trained in evaluation mode, and there is nothing inside to look at.
    """

    logits: Logits

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        return on_cpu(self.logits)(variables["params"], images)

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return self(variables, images), []

    def train(self, variables: Variables, images: jax.Array, key, weights=None, axis=None):
        del key, weights, axis
        return self(variables, images), [], {}


def opened(logits: Logits, params: Params) -> tuple[Model, Variables]:
    """The model and its variables, whichever form they were given in.

    Of a `Model`, `params` are the whole variables: the collection `params` is trained, the others
    are state. Of a plain function all is trained.

    Floats are brought to the precision that is computed in, since the small steps of a training
    are lost in 16 bits; a plain function still sees the precisions it was given.

    Returns:
      The model, and its variables in float32 (float64 where JAX is set to it and they are).
    """
    if isinstance(logits, Model):
        return logits, _widened(dict(params))
    kinds = jax.tree.map(jnp.result_type, params)

    def as_given(widened: Params, images: jax.Array) -> jax.Array:
        return logits(jax.tree.map(lambda a, kind: a.astype(kind), widened, kinds), images)

    return Frozen(as_given), {"params": _widened(params)}


def needs_flax(model: Model, defense: str, why: str) -> Classifier:
    """The user's model, for a defense that needs an architecture of this package.

    Raises:
      InputError: it is no `Classifier`.
    """
    if not isinstance(model, Classifier):
        wanted = _FLAX if isinstance(model, Frozen) else _OURS
        raise InputError(f"{defense} {why}: {wanted}, found {_kind(model)}")
    return model


def needs_init(model: Model, defense: str, why: str) -> Callable[[jax.Array, jax.Array], Variables]:
    """`init(key, images) -> variables` of the user's model, for a defense that begins anew.

    Raises:
      InputError: it has none.
    """
    if not hasattr(model, "init"):
        wanted = _FLAX if isinstance(model, Frozen) else _FRESH
        raise InputError(f"{defense} {why}: {wanted}, found {_kind(model)}")
    return model.init  # pyright: ignore[reportAttributeAccessIssue]


def needs_maps(model: Model, defense: str, why: str) -> Model:
    """The user's model, for a defense that looks inside.

    Raises:
      InputError: it is a plain function.
    """
    if isinstance(model, Frozen):
        raise InputError(f"{defense} {why}: {_FLAX}, found {_kind(model)}")
    return model


_OURS = "expected a module with the arguments of ibau_jax.models.VGG as Classifier(module)"
_FRESH = "expected a model that can be initialised, such as Classifier(module) or a linen module"
_FLAX = "expected a flax module as ibau_jax.models.Classifier(module) with its variables"


def _kind(model: Model) -> str:
    model = getattr(model, "model", model)  # behind a normalisation
    return "a plain function" if isinstance(model, Frozen) else f"a {type(model).__name__}"


def without_dropout(model: Model) -> Model:
    """The model whose training drops nothing, where it knows how."""
    own = getattr(model, "without_dropout", None)
    return model if own is None else own()


def closed(model: Model, variables: Variables, given: Params) -> Params:
    """The variables in the form, and each leaf in the dtype, of the `given` parameters."""
    params = variables["params"] if isinstance(model, Frozen) else variables
    return jax.tree.map(_in_dtype_of, params, given)


def of_params(model: Model, variables: Mapping[str, Any]) -> Logits:
    """`logits(params, images)` in evaluation mode, the other variables fixed."""
    fixed = fixed_of(variables)
    return lambda params, images: model({"params": params, **fixed}, images)


def fixed_of(variables: Mapping[str, Any]) -> Variables:
    """What there is beside the parameters."""
    return {name: value for name, value in variables.items() if name != "params"}


def _widened(tree: Any) -> Any:
    def widen(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf  # a counter, for example, among the state
        return jnp.asarray(leaf, jnp.promote_types(jnp.float32, jnp.result_type(leaf)))

    return jax.tree.map(widen, tree)


def _in_dtype_of(leaf: Any, like: Any) -> Any:
    kind = np.asarray(like).dtype
    if leaf.dtype == kind:
        return leaf
    # float64 comes back as NumPy's where JAX has none
    return np.asarray(leaf, kind) if kind == np.float64 else jnp.asarray(leaf, kind)
