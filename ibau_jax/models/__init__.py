"""Models: what a defense is given, the paper's VGG, and model files."""

from ibau_jax.models.architectures import build
from ibau_jax.models.model import Classifier, evaluation_logits
from ibau_jax.models.vgg import VGG

__all__ = ["VGG", "Classifier", "build", "evaluation_logits"]
