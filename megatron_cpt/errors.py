"""Errors grouped by the person who can fix them; the command line prints a `CptError` on one line and exits 2.

A message reads `<where>: <what was found>. <what is needed>. <what to do>`. Anything that is not a `CptError` is a bug
of ours and keeps its traceback. An error of the operating system (a full disk, a folder in a file's place) is not a
bug: `storage_error` formats it as one line.
"""

import errno
import os


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


class DamagedError(CheckpointError):
    """A checkpoint that cannot be read back as it was written: an older one can take its place."""


class StorageError(CptError):
    """The operating system refuses to read or write a file."""


def storage_error(problem: OSError) -> StorageError:
    """Return an error of the operating system as one line: path, cause, required action."""
    paths = [os.fsdecode(name) for name in (problem.filename, problem.filename2) if isinstance(name, str | bytes)]
    where = " -> ".join(paths) or "the file system or the network"
    cause = problem.strerror or " ".join(str(problem).split()) or type(problem).__name__
    number = problem.errno or 0
    name = f" ({errno.errorcode[number]})" if number in errno.errorcode else ""
    return StorageError(f"{where}: {cause}{name}. {_ADVICE.get(number, _OTHERWISE)}")


_OTHERWISE = "Look at the file system, then give the command again."
_ADVICE = {
    number: advice
    for numbers, advice in (
        ((errno.ENOSPC, errno.EFBIG, 0), "Room on the disk is needed (and free inodes: df -i). Make room, then give the command again."),
        ((errno.EDQUOT,), "The quota is used up. Make room or ask for more, then give the command again."),
        ((errno.EROFS,), "A file system that can be written is needed. Use another folder."),
        ((errno.EACCES, errno.EPERM), "The permission is needed. Mend it or use another folder."),
        ((errno.ENOENT,), "The file or folder is needed. Look at the name."),
        ((errno.EISDIR,), "A folder lies where a file is needed. Move it away or choose another name."),
        ((errno.ENOTDIR, errno.EEXIST), "Something else lies where a folder is needed. Move it away or choose another name."),
        ((errno.ENOTEMPTY,), "An empty folder is needed. Move what is in it away or choose another name."),
        ((errno.ELOOP,), "Its links lead in a circle. Remove the link or choose another name."),
        ((errno.ENAMETOOLONG,), "A shorter name is needed."),
        ((errno.EMFILE, errno.ENFILE), "More open files are needed. Raise the limit (ulimit -n)."),
        ((errno.ENOMEM,), "More memory, or more memory maps (vm.max_map_count), is needed."),
        ((errno.EADDRINUSE,), "Another process uses the port. Choose another one, or end that process."),
    )
    for number in numbers
}  # fmt: skip
