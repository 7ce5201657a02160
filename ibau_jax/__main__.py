"""`python -m ibau_jax` is `ibau`."""

from ibau_jax.cli import run

run()
