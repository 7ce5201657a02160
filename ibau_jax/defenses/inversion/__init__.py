"""Defenses that reconstruct triggers, and unlearn those that come too easily."""
