"""Devices, processes and microbatches: the one place that knows what computes where."""
