"""Models: what a defense is given, the paper's VGG, and model files."""

from ibau_jax.models.model import Classifier, evaluation_logits
from ibau_jax.models.vgg import VGG, build

__all__ = ["VGG", "Classifier", "build", "evaluation_logits"]
