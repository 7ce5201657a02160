"""CLP (Zheng et al., ECCV 2022): cut channels whose Lipschitz bound stands out. Needs no data.

    sigma_k = largest singular value of W_k * |scale_k| / deviation_k,   W_k [C_in, height * width]

A channel that answers to a small trigger has to be more sensitive than its neighbours. Those with
sigma above mean + threshold * deviation of their layer are set to zero.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.normed import changed, fed_by, normed_layers

EPSILON = 1e-5  # of batch norm, as in flax and PyTorch


@dataclass(frozen=True)
class CLPConfig:
    """Settings of CLP.

    Attributes:
      threshold: deviations above the mean of a layer from which a channel is cut (u; the authors'
        3). Less cuts more.
    """

    threshold: float = 3.0

    def __post_init__(self):
        check_positive(self, "threshold")


PRESETS = {"cpu": lambda dataset: CLPConfig(), "paper": lambda dataset: CLPConfig()}


@method(CLPConfig())
def clp(job: Job) -> Rounds:
    """Cut the channels that are too sensitive (Zheng et al., ECCV 2022); needs no clean set.

    The one round tells how many `channels` were cut; the diagnostics have `pruned`, the numbers of
    those of each layer.

    Raises:
      InputError: the model has no convolution with batch norm.
    """
    fed = fed_by(job.model, job.variables, job.clean.images[:1])
    layers = [layer for layer in normed_layers(job.variables, fed) if layer.kernel]
    if not layers:
        raise InputError(
            "clp cuts channels of convolutions with batch norm: expected a Classifier whose "
            "variables have 'batch_stats' and a convolution beside them, found none"
        )
    yield job.variables, {}
    cut, statistics = {}, flatten_dict(job.variables["batch_stats"])

    def without(params):
        new = {}
        for layer in layers:
            deviation = np.sqrt(np.asarray(statistics[layer.var]) + EPSILON)
            kernel = layer.hwio(params[layer.kernel])
            sigma = sensitivity(kernel, np.asarray(params[layer.scale]) / deviation)
            high = sigma > sigma.mean() + job.config.threshold * sigma.std()
            cut[layer.name] = np.flatnonzero(high).tolist()
            new |= {path: jnp.where(high, 0, params[path]) for path in (layer.scale, layer.offset)}
        return new

    variables = changed(job.variables, without)
    yield variables, {"channels": sum(map(len, cut.values()))}
    return Told(diagnostics={"pruned": cut})


def sensitivity(kernel, gain) -> np.ndarray:
    """The bound of each channel: kernel [height, width, C_in, C], gain [C] -> [C]."""
    height, width, inputs, channels = kernel.shape
    matrices = np.asarray(kernel, np.float64).reshape(height * width, inputs, channels)
    return np.linalg.norm(matrices.transpose(2, 1, 0), 2, axis=(1, 2)) * np.abs(gain)
