"""Files that are whole or not there: results are written to a temporary name in the same folder and renamed."""

import os
import tempfile
from pathlib import Path

__all__ = ["make_folder", "write_file"]


def make_folder(folder: Path) -> None:
    """Make the folder, where it is not there yet, and try whether files can be written in it.

    Parameters
    ----------
    folder : Path
        The folder; those above it are made as well.

    Raises
    ------
    OSError
        If they cannot; the message names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?")
    except OSError as error:
        raise OSError(f"cannot write results into {folder}: {error.strerror}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write the whole file or, interrupted, killed or out of space, leave what was there before.

    Parameters
    ----------
    path : Path
        The file, in a folder that is there.
    content : str or bytes
        All of it; a str is written in UTF-8.

    Raises
    ------
    OSError
        If the file cannot be written; the message names it.
    """
    # The process id keeps two runs in one folder from writing the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            # Without this, a power cut could find the new name on the disk and not yet what is in the file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
