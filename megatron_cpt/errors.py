"""Errors named after who can mend them; the command line prints a `CptError` on one line and exits 2.

A message reads `<where>: <what was found>. <what is needed>. <what to do>`. Anything that is not a
`CptError` is a bug of ours and keeps its traceback.
"""


class CptError(Exception):
    """A mistake or an accident that the user can act on."""


class ConfigError(CptError):
    """A setting, a params, task or site file, or a command-line argument is wrong."""


class DataError(CptError):
    """A document file, a tokenizer, a `.bin/.idx` pair or a data list is missing, damaged or inconsistent."""


class CheckpointError(CptError):
    """A checkpoint or a Hugging Face folder is missing, damaged, incomplete or does not fit."""


class LaunchError(CptError):
    """A job cannot be submitted, started or continued."""
