"""Model files of PyTorch: read as data, never executed, and written back as they were."""
