"""Files of results: written whole or not at all, and read as what a stranger may have put there.

A results folder or a checkpoint may come from somebody else. What is read is a plain file of bounded size, and holds
numbers where numbers should be; what is written replaces the file of that name, whatever it is a link to.
"""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["json_numbers", "make_folder", "new_file", "open_plain", "read_file"]


def make_folder(folder: Path) -> None:
    """Make the folder, where it is not there yet, and try whether files can be written in it.

    Parameters
    ----------
    folder : Path
        The folder; those above it are made as well.

    Raises
    ------
    OSError
        If they cannot, or the folder is a symbolic link, which could lead anywhere; the message names the folder.
    """
    if folder.is_symlink():
        raise OSError(f"cannot write results into {folder}: it is a symbolic link")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?")
    except OSError as error:
        raise OSError(f"cannot write results into {folder}: {error.strerror}") from error


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write into, which gets the name `path` when all is written.

    Interrupted, killed or out of space, it leaves what was there before. A link of that name is replaced, not followed.

    Parameters
    ----------
    path : path
        The file, in a folder that is there.

    Yields
    ------
    binary file

    Raises
    ------
    OSError
        If the file cannot be written; the message names it.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with new_file(Path(folder) / "report.md") as file:
    ...         _ = file.write(b"All is well.")
    ...     os.listdir(folder)
    ['report.md']
    """
    path = Path(path)
    # A name that nobody can guess, and "x" takes none that is there: who may write into the folder too could otherwise
    # have put a link there, to a file of ours.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            # Without this, a power cut could find the new name on the disk and not yet what is in the file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:  # after a failure: after success it is gone already
        temporary.unlink(missing_ok=True)


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, open for reading, if it is one that ends: a pipe may keep its reader waiting, a device never ends.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    binary file

    Raises
    ------
    OSError
        If it cannot be opened.
    ValueError
        If it is not a plain file.
    """
    # Opened for blocking reads, a pipe that nobody writes into would keep us here already.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError(f"{os.fspath(path)} is not a plain file")


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """All that is in a plain file.

    Parameters
    ----------
    path : path
        The file.
    limit : int
        More bytes than these cannot be what is looked for.

    Returns
    -------
    bytes

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not a plain file, or has more bytes.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{os.fspath(path)} has {size} bytes, more than the {limit} that it may have")
        return file.read(size)


def json_numbers(value: Any, shape: Sequence[int | None]) -> Any:
    """The numbers in what ``json.loads`` gives, as nested lists of float: nothing else, and of this shape.

    JSON has no NaN and no infinity. ``"nan"``, ``"inf"`` and ``"-inf"`` stand for them, which ``float()`` reads; no
    other text is a number, and a text is not a list of its digits.

    Parameters
    ----------
    value : object
        From JSON.
    shape : sequence of int or None
        The length of the list, of each list in it, and so on; None is any.

    Returns
    -------
    list of ... float, or float

    Raises
    ------
    ValueError
        If it is anything else.
    OverflowError
        If a whole number is beyond float64.

    Examples
    --------
    >>> json_numbers([[1, 0.5], ["-inf", 2]], (None, 2))
    [[1.0, 0.5], [-inf, 2.0]]
    """
    if shape:
        if type(value) is not list or shape[0] not in (None, len(value)):
            raise ValueError(f"{'' if shape[0] is None else f'{shape[0]} '}values are wanted in a list")
        return [json_numbers(item, shape[1:]) for item in value]
    if type(value) in (int, float) or (type(value) is str and value in ("nan", "inf", "-inf")):
        return float(value)
    raise ValueError(f"a number is wanted, got a {type(value).__name__}")
