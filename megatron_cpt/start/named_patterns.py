"""`NAME=GLOB` arguments of a command line as corpus -> patterns."""

from collections.abc import Sequence

from megatron_cpt.errors import ConfigError


def named_patterns(words: Sequence[str], option: str) -> dict[str, list[str]]:
    """Return corpus -> files, folders and globs; a name that comes again adds to its corpus.

    Raises: ConfigError for a word without a name or a pattern.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if equals and name and not pattern:
            raise ConfigError(f"{option} {word}: no files. Write {option} {name}=GLOB.")
        if not equals or not name or "/" in name:
            raise ConfigError(
                f"{option} {word}: a corpus needs a name. Write {option} NAME={pattern if equals and not name else word}."
            )
        found.setdefault(name, []).append(pattern)
    return found
