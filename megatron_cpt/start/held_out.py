"""The part of a corpus's documents that is held out: small, and large enough that something is measured."""

from fractions import Fraction

from megatron_cpt.errors import DataError
from megatron_cpt.start.look import CorpusLook

PARTS = ("1/1000", "1/500", "1/200", "1/100", "1/50", "1/20", "1/10", "1/5")
ENOUGH_DOCUMENTS = 40
ENOUGH_SEQUENCES = 16
"""Fewer documents say little; documents are drawn by their hashes, so the part that is found varies around the one asked."""


def held_out_of(look: CorpusLook, seq_length: int, given: str | None) -> str:
    """Return the part to hold out of a corpus: the one given, else the smallest that holds enough, at most a fifth.

    Raises: DataError when it would not hold two sequences, so that validation could not begin.
    """
    part = given or next((part for part in PARTS if _is_enough(look, seq_length, part)), PARTS[-1])
    tokens = round(look.tokens * Fraction(part))
    if tokens < 2 * (seq_length + 1):
        raise DataError(
            f"{look.name}: {part} of its about {look.documents:,} documents is about {tokens:,} tokens. Held-out text needs "
            f"two sequences of {seq_length:,} tokens at least. Give more documents, a larger --held-out or a smaller --seq-length."
        )
    return part


def _is_enough(look: CorpusLook, seq_length: int, part: str) -> bool:
    share = Fraction(part)
    return look.documents * share >= ENOUGH_DOCUMENTS and look.tokens * share >= ENOUGH_SEQUENCES * (seq_length + 1)
