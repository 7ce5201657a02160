"""I-BAU: `ibau.py` is Algorithm 1; its objective, ascent, settings, batches, and theorems."""
