"""`python -m ibau_jax` is `ibau`."""

import sys

from ibau_jax.cli import main

sys.exit(main())
