"""`python -m ibau_jax` is `ibau`."""

from ibau_jax.commands.cli import run

run()
