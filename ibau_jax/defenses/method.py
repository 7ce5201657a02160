"""A defense as a function: what a generator of rounds becomes, with one signature for all."""

from collections.abc import Callable
from typing import Any

import jax

from ibau_jax.data import Dataset
from ibau_jax.defenses.run import Evaluate, Job, Result, Rounds, Run
from ibau_jax.devices import mesh
from ibau_jax.devices.mesh import Devices
from ibau_jax.models.model import Logits, Params, opened
from ibau_jax.unlearning.batches import check_clean


class Method:
    """A defense as a function; `method` makes it.

    Attributes:
      rounds: the generator (see the top of `run.py`).
      config: the default settings.
      data: names of the other data sets that it takes.
    """

    def __init__(self, rounds: Callable[[Job], Rounds], config: Any, data: tuple[str, ...] = ()):
        self.rounds, self.config, self.data = rounds, config, data
        self.__name__, self.__doc__ = rounds.__name__, rounds.__doc__

    def run(
        self,
        logits: Logits,
        params: Params,
        clean: Dataset,
        *,
        config: Any = None,
        key: jax.Array,
        progress: bool = False,
        devices: Devices | None = None,
        **data: Any,
    ) -> Run:
        """A run to iterate over, round by round; nothing long happens before.

        Args:
          logits: pure function `logits(params, images [N, H, W, C]) -> [N, num_classes]` in
            evaluation mode (dropout off, batch statistics fixed), which is trained as it is; or a
            `models.Classifier`, which defenses can also train with batch statistics and dropout,
            and look into.
          params: pytree of floating-point arrays; of a `Classifier` the whole variables, of which
            the collection `params` is trained. They come back in the dtypes they are given in.
          clean: correctly labelled images without trigger, [N, H, W, C] in [0, 1], any size and
            any order.
          config: settings; None: the default ones.
          key: random key (`jax.random.key(seed)`); decides, with the arguments before it, the
            result.
          progress: show progress bars on stderr.
          devices: over which each batch is spread (`devices.mesh.devices`); default: all of all
            processes. The result is the same but for rounding. With many processes all call this
            with the same arguments.
          data: other data sets that the defense takes, such as `train_set`.

        Raises:
          InputError: the model or the clean set are not as described; in the run, the defense
            needs what the model does not have, or numbers are no longer finite.
        """
        if unknown := sorted(data.keys() - set(self.data)):
            taken = ", ".join(self.data) or "no other data set"
            raise TypeError(f"{self.__name__}: unknown argument {unknown[0]!r}; it takes {taken}")
        clean = check_clean(logits, params, clean)
        model, variables = opened(logits, params)
        job = Job(
            model,
            variables,
            clean,
            self.config if config is None else config,
            key,
            devices or mesh.devices(),
            num_classes=jax.eval_shape(logits, params, clean.images[:1]).shape[1],
            data=data,
            shown=progress,
        )
        return Run(self.rounds, job, params)

    def __call__(
        self,
        logits: Logits,
        params: Params,
        clean: Dataset,
        *,
        config: Any = None,
        key: jax.Array,
        evaluate: Evaluate | None = None,
        progress: bool = False,
        devices: Devices | None = None,
        **data: Any,
    ) -> Result:
        """`run` to the end.

        Args:
          evaluate: `evaluate(params) -> mapping` is called before the first round and after each;
            what it gives is put into the round's row (for example ACC and ASR).

        Returns:
          A `Result`, the same in each process.
        """
        options = {"config": config, "key": key, "progress": progress, "devices": devices}
        return self.run(logits, params, clean, **options, **data).result(evaluate)

    def __repr__(self) -> str:
        return f"<defense {self.__name__}, by default {self.config}>"


def method(config: Any, data: tuple[str, ...] = ()) -> Callable[..., Method]:
    """Make a `Method` of a generator; see there."""
    return lambda rounds: Method(rounds, config, data)
