"""Trials: the same variant with other settings, each in a run directory of its own, `VARIANT+LABEL`."""

import math
from collections.abc import Mapping


def mix_text(shares: Mapping[str, float]) -> str:
    """Return a mix as YAML on one line: `{D0: 0.25, D1: 0.75}`; shares that are 0 are left out."""
    return "{" + ", ".join(f"{name}: {share:.6g}" for name, share in shares.items() if share) + "}"


def scaled_mix(mix: Mapping[str, float], parts: Mapping[str, float], old: tuple[str, ...]) -> dict[str, float]:
    """Return a mix whose old, new and buffer shares are `parts`, each spread as it was; the sum is 1 to six digits.

    An old or new part without any share so far is spread evenly over its corpora.
    """
    groups = {
        "old": list(old),
        "new": [name for name in mix if name not in old and name != "buffer"],
        "buffer": ["buffer"],
    }
    scaled: dict[str, float] = {}
    for group, names in groups.items():
        total = math.fsum(mix.get(name, 0.0) for name in names)
        for name in names:
            within = mix.get(name, 0.0) / total if total else 1 / len(names)
            scaled[name] = float(f"{parts.get(group, 0.0) * within:.6g}")
    largest = max(scaled, key=lambda name: scaled[name])
    scaled[largest] = float(f"{1 - math.fsum(share for name, share in scaled.items() if name != largest):.6g}")
    return scaled


def labelled(variant: str, label: str) -> str:
    """Return `VARIANT+LABEL`; a label that is there already stays before the added one."""
    return f"{variant}{'_' if '+' in variant else '+'}{label}"
