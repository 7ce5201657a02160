"""A PyTorch module cleaned in one call: arrays in, a state dict out."""

from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np

from ibau_jax.data import Dataset, check_accuracy, check_data
from ibau_jax.defenses.ibau import unlearn
from ibau_jax.errors import InputError, check_name
from ibau_jax.models.adapters.torch_model import TorchModel, from_torch, to_state_dict
from ibau_jax.models.model import Variables
from ibau_jax.models.normalised import normalised
from ibau_jax.models.predict import predict
from ibau_jax.unlearning.config import IBAUConfig

CHANNELS = (1, 3, 4)
AROUND = 1e-3  # 1, of a sum of probabilities


def clean_torch(
    module: Any,
    images: Any,
    labels: Any,
    *,
    seed: int = 0,
    mean: Any = None,
    std: Any = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Remove a backdoor from a PyTorch module by I-BAU, with a small clean set.

    module.load_state_dict(clean_torch(module, images, labels))

    Args:
      module: a `torch.nn.Module` that classifies images [N, C, H, W]; it stays as it is. One that
        ends in a softmax is trained by the logarithm of what it gives. See
        `models.adapters.torch_model.from_torch`.
      images: correctly labelled images without trigger, an array or a tensor [N, C, H, W] or
        [N, H, W, C] (where both can be meant, the former), floats in [0, 1] or uint8.
      labels: integers [N].
      seed: decides, with the arguments before it, the result.
      mean, std: of each channel, where the module wants normalised images: give `images` in [0, 1]
        all the same.
      progress: show progress bars on stderr.
      settings: fields of `IBAUConfig`, such as `rounds=2`; by default its own.

    Returns:
      A state dict with the keys, order, dtypes, devices and buffers of `module.state_dict()`.

    Raises:
      InputError: PyTorch or torchax is missing, the module or the images are not as described, or
        the module is hardly better than chance on them (images normalised twice or not at all,
        labels of another order).
    """
    for name in settings:
        check_name("setting", name, [field.name for field in fields(IBAUConfig)])
    config = replace(IBAUConfig(), **settings)
    if (mean is None) != (std is None):
        raise InputError("mean and std belong together: expected both or none of them")
    plain, variables = from_torch(module)
    clean = check_data(Dataset(channels_last(images), _array(labels)))
    model = with_logits(plain, variables, clean.images[:20])
    if mean is not None:
        model = normalised(model, tuple(mean), tuple(std), clean.images.shape[-1])
    classes = jax.eval_shape(model, variables, clean.images[:1]).shape[1]
    right = float(np.mean(predict(model)(variables, clean.images) == clean.labels))
    check_accuracy(right, classes, "the clean images")
    key = jax.random.key(seed)
    found = unlearn(model, variables, clean, config=config, key=key, progress=progress)
    return to_state_dict(found.params, module.state_dict(), plain.tied)


def with_logits(model: TorchModel, variables: Variables, images: np.ndarray) -> TorchModel:
    """The model, whose rows are seen as probabilities where those of all `images` are."""
    rows = np.asarray(jax.jit(model)(variables, images))
    sums = rows.sum(-1) if rows.ndim == 2 and rows.shape[1] > 1 else np.zeros(1)
    if (rows >= 0).all() and np.abs(sums - 1).max() < AROUND:
        return replace(model, probabilities=True)
    return model


def _array(values: Any) -> np.ndarray:
    """Of a tensor on any device, or of what NumPy takes."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def channels_last(images: Any) -> np.ndarray:
    """[N, H, W, C] in [0, 1], as far as that can be told; what is wrong the checks tell."""
    found = _array(images)
    if found.ndim == 4 and found.shape[1] in CHANNELS:
        found = found.transpose(0, 2, 3, 1)
    elif found.ndim != 4 or found.shape[3] not in CHANNELS:
        raise InputError(
            f"images have shape {found.shape}: expected [N, C, H, W] or [N, H, W, C] with 1, 3 or "
            "4 channels"
        )
    if found.dtype == np.uint8:
        return found.astype(np.float32) / 255
    return np.ascontiguousarray(found)
