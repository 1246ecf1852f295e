"""Control tokens that a text spells: `<|endoftext|>` in a web page would end a document in training, if it were a token.

A text is looked through for the names of a tokenizer's control tokens; almost no text has one, and all are looked at, so that
a text is first asked for one character that every name of a group has (`|`), which costs nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from megatron_cpt.data.reading.records import CONTROL_TOKEN, Parsed, Problem, as_line

SPECIAL_TOKENS = ("text", "token", "reject")
"""text: a control token in a text is text; token: it is that token; reject: such a document is a bad line."""

_RARE = "|｜▁\x00^~$@#{}[]><"
"""Characters of names, the rarest in texts first."""


class ControlTokens:
    """Finds the names of control tokens in texts."""

    def __init__(self, names: Iterable[str]):
        groups: dict[str, list[str]] = {}
        for name in sorted(filter(None, names), key=len, reverse=True):
            rarest = next((character for character in _RARE if character in name), name[0])
            groups.setdefault(rarest, []).append(name)
        self._groups = [
            (rarest, max(map(len, group)), re.compile("|".join(map(re.escape, group))))
            for rarest, group in groups.items()
        ]

    def in_text(self, text: str) -> list[str]:
        """Return the names that a text spells, once for each time."""
        found: list[str] = []
        for rarest, longest, names in self._groups:
            if (place := text.find(rarest)) >= 0:
                found += names.findall(text, max(place - longest, 0))
        return found

    def count(self, texts: Sequence[str]) -> tuple[int, Counter[str]]:
        """Return how many texts spell a control token, and how often each one is spelled."""
        documents, counts = 0, Counter[str]()
        for rarest, longest, names in self._groups:
            for text in texts:
                place = text.find(rarest)
                if place >= 0 and (found := names.findall(text, max(place - longest, 0))):
                    counts.update(found)
        if counts:
            documents = sum(bool(self.in_text(text)) for text in texts)
        return documents, counts

    def reject(self, parsed: Parsed) -> None:
        """Turn the documents that spell a control token, under any key, into problems."""
        bad: dict[int, str] = {}
        for texts in parsed.texts:
            for number, text in enumerate(texts):
                if number not in bad and (found := self.in_text(text)):
                    bad[number] = found[0]
        for number, name in bad.items():
            values = {key: texts[number] for key, texts in zip(parsed.keys, parsed.texts, strict=True)}
            parsed.problems.append(Problem(parsed.lines[number], CONTROL_TOKEN, repr(name), as_line(values)))
        if bad:
            kept = [number for number in range(len(parsed.lines)) if number not in bad]
            parsed.lines = [parsed.lines[number] for number in kept]
            parsed.texts = [[texts[number] for number in kept] for texts in parsed.texts]
            parsed.problems.sort(key=lambda problem: problem.line)
