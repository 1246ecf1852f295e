"""Sentences from templates and word lists, the same for the same seed: text in a language that no corpus here has.

A grammar is a YAML file: `sentences` (templates with `{slot}`), `words` (slot -> list of choices, which may hold slots themselves).
"""

import random
import re
from pathlib import Path

from megatron_cpt.config.loading.sources import read_yaml

_SLOT = re.compile(r"\{(\w+)\}")


def read_grammar(path: Path) -> dict:
    """Return a grammar file's content."""
    return read_yaml(path)


def filled(template: str, words: dict[str, list[str]], drawn: random.Random) -> str:
    """Return a template with each slot replaced by a drawn word, slots within words too."""
    while _SLOT.search(template):
        template = _SLOT.sub(lambda slot: str(drawn.choice(words[slot[1]])), template)
    return template


def paragraph(grammar: dict, drawn: random.Random, num_sentences: int) -> str:
    """Return sentences in a row, each beginning with a capital."""
    sentences = (filled(drawn.choice(grammar["sentences"]), grammar["words"], drawn) for _ in range(num_sentences))
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
