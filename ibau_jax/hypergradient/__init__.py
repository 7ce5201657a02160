"""The implicit hypergradient on any pytrees: imports nothing of the rest of the package."""

from ibau_jax.hypergradient.ball import Ball
from ibau_jax.hypergradient.implicit import (
    hypergradient,
    hypergradient_jaxopt,
    implicit_argmin,
    needs_reverse_mode,
    unrolled,
)
from ibau_jax.hypergradient.solvers import (
    CG,
    GMRES,
    Dense,
    Direct,
    Neumann,
    NormalCG,
    Report,
    Solver,
)

__all__ = [
    "CG",
    "GMRES",
    "Ball",
    "Dense",
    "Direct",
    "Neumann",
    "NormalCG",
    "Report",
    "Solver",
    "hypergradient",
    "hypergradient_jaxopt",
    "implicit_argmin",
    "needs_reverse_mode",
    "unrolled",
]
