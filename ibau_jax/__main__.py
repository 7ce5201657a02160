"""`python -m ibau_jax` is `ibau`."""

from ibau_jax.commands.start import run

run()
