"""The searches of a whole model: `inspect`, and what unlearning looks for before and after."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.models.model import Logits, Params, opened
from ibau_jax.progress import progress_bar
from ibau_jax.unlearning.batches import UNTARGETED, check_clean
from ibau_jax.unlearning.evidence import (
    ALIKE,
    ALONG,
    AWAY,
    GEOMETRIES,
    LEVELS,
    ONE,
    SHORTLIST,
    WORTH,
    Evidence,
    Perturbation,
    scores_of,
)
from ibau_jax.unlearning.geometries import Geometry
from ibau_jax.unlearning.search import Found, Search
from ibau_jax.unlearning.strength import check_count


def look(
    search: Search,
    params: Params,
    clean: Dataset,
    num_classes: int,
    *,
    key: jax.Array,
    advance: Callable[[int], None] = lambda count: None,
) -> Evidence:
    """Search a model towards each label, and away from the true ones.

    Args:
      search: knows the `GEOMETRIES`.
      key: random key.
      advance: called with 1 after each ascent, `looks(num_classes)` times in all.
    """
    keys = jax.random.split(key)
    labels, geometries = range(num_classes), list(LEVELS)
    towards = search(
        params, clean, labels, key=keys[0], among=geometries, most=SHORTLIST, advance=advance
    )
    away = search(params, clean, [UNTARGETED], key=keys[1], among=[AWAY], advance=advance)
    misled = float(away.strength[0, 0])
    same, one = to_one(away)
    found = collect(geometries, labels, towards)
    if same < ALIKE:  # else it is a weakness towards one label
        found += collect([AWAY], [UNTARGETED], away)
    leads = read_rule(away.given[0, 0], away.true, num_classes)
    evidence = Evidence(towards.strength, misled, same, leads, found, one.label)
    if evidence.by_away:
        found.append(one)
    return evidence


def inspect(
    logits: Logits, params: Params, clean: Dataset, *, key: jax.Array, progress: bool = False
) -> Evidence:
    """Does a model carry a backdoor, and towards which label? The search alone.

    Args:
      logits, params, clean: as `unlearn` takes them.
      key: random key (`jax.random.key(seed)`).
      progress: show a progress bar on stderr.

    Raises:
      InputError: the model or the clean set are not as described.
    """
    clean = check_clean(logits, params, clean)
    check_count(clean)
    model, variables = opened(logits, params)
    search = Search(model, GEOMETRIES)
    num_classes = jax.eval_shape(logits, params, clean.images[:1]).shape[1]
    with progress_bar(looks(num_classes), "search", progress) as advance:
        return look(search, variables, clean, num_classes, key=key, advance=advance)


def rest(
    search: Search,
    params: Params,
    clean: Dataset,
    suspects: Sequence[int],
    *,
    along: np.ndarray,
    key: jax.Array,
    by_away: bool = False,
    starts: int | None = None,
) -> tuple[dict[int, float], list[Perturbation]]:
    """A fresh search: how near it comes to a level with each suspect (1 reaches it), its finds.

    Args:
      along: of `Evidence`. What is left of all-to-all leads there and, when most is unlearned, to
        other labels no more often than anything else does.
      by_away: of `Evidence`. What named the target then is searched for again too.
    """
    if UNTARGETED in suspects:
        found = search(params, clean, [along], key=key, starts=starts)
        strongest = float(found.strength.max())
        return {UNTARGETED: strongest / ALONG}, collect(search.geometries, [UNTARGETED], found)
    geometries = list(LEVELS)
    found = search(params, clean, suspects, key=key, among=geometries, starts=starts)
    scores = dict(zip(suspects, map(float, scores_of(found.strength).max(0)), strict=True))
    fresh = collect(geometries, suspects, found)
    if by_away:
        away = search(params, clean, [UNTARGETED], key=key, among=[AWAY], starts=starts)
        _, one = to_one(away)
        if one.label in scores and one.strength > WORTH:
            scores[one.label] = max(scores[one.label], one.strength / ONE)
            fresh.append(one)
    return scores, fresh


def looks(num_classes: int) -> int:
    """How many ascents `look` takes."""
    return len(LEVELS) * num_classes + 1


def collect(
    geometries: Sequence[Geometry], labels: Sequence[int], found: Found
) -> list[Perturbation]:
    """What of a search is worth to be unlearned."""
    return [
        Perturbation(found.deltas[g, i], label, float(found.strength[g, i]), geometry.name)
        for g, geometry in enumerate(geometries)
        for i, label in enumerate(labels)
        if found.strength[g, i] > WORTH
    ]


def alike(given: np.ndarray, true: np.ndarray) -> tuple[int, float]:
    """Of the images [N] that are misled, the most frequent label, and the share that gets it.

    `UNTARGETED` and 0 where none is.
    """
    wrong = given[given != true]
    if not len(wrong):
        return UNTARGETED, 0.0
    counts = np.bincount(wrong)
    return int(counts.argmax()), float(counts.max() / len(wrong))


def to_one(away: Found) -> tuple[float, Perturbation]:
    """What leads away from the true labels, as what leads to the label that most of these get.

    Returns:
      The share of the misled images that get it, and the perturbation; its strength is of all.
    """
    where, same = alike(away.given[0, 0], away.true)
    lead = float(away.strength[0, 0]) * same
    return same, Perturbation(away.deltas[0, 0], where, lead, AWAY.name)


def read_rule(given: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """The label rule of all-to-all, read from labels before and after; see `Evidence`."""
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (true, given), 1)
    np.fill_diagonal(counts, 0)
    return np.where(counts.any(1), counts.argmax(1), UNTARGETED).astype(np.int32)
