"""Training: the loop, the training of a (poisoned) model, and its states on disk."""
