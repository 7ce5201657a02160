"""How a run ended, in a word and in a sentence; it knows no trigger."""

from collections.abc import Mapping, Sequence

from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.evidence import ALONG, NEAR, Evidence


def verdict_of(
    evidence: Evidence,
    suspects: Sequence[int],
    left: Mapping[int, float],
    undone: Sequence[int],
    kept: float,
) -> tuple[str, str]:
    """`cleaned`, `was-clean` or `not-cleaned`, and why.

    Args:
      evidence: of the search before all else.
      suspects: what was held for a target: its own, or what comes near to a level.
      left: how near a fresh search comes to a level with each of them in the end.
      undone: labels whose unlearning was taken back.
      kept: the share of the way that was gone.
    """
    reason = [evidence.reason]
    verdict = "was-clean"
    if suspects:
        where = max(left, key=lambda label: left[label])
        clean = left[where] < NEAR
        if not evidence.suspects and kept:
            reason.append("what comes near was unlearned all the same")
        if evidence.suspects or left[where] >= 1:
            verdict = "cleaned" if clean else "not-cleaned"
        now = "now a fresh search" if clean else "a fresh search still"
        now = now if kept else "another search"
        if where == UNTARGETED:
            reason.append(
                f"{now} leads {left[where] * ALONG:.0%} of the images where this rule leads them "
                f"(backdoored from {ALONG:.0%} on)"
            )
        else:
            towards = "" if clean else f" towards label {where}"
            reason.append(f"{now} comes to {left[where]:.2f} of such a level{towards}")
    if undone:
        labels = ("label " if len(undone) == 1 else "labels ") + ", ".join(map(str, undone))
        reason.append(f"to unlearn {labels} too cost accuracy on held-back images and was undone")
    if kept < 1:
        way = (
            f"only {kept:.0%} of the way was gone, since more"
            if kept
            else "the model is as given, since unlearning"
        )
        reason.append(f"{way} costs too much accuracy on held-back images")
    return verdict, "; ".join(reason)
