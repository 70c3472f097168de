"""Write files completely or not at all."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


class NotWritten(OSError):
    """A file could not be written; the message is one line with its name."""


def check_target(path: Union[str, Path]) -> None:
    """Check that a file could be written, before work that it would be lost with.

    Args:
        path (str | Path): The file.

    Raises:
        NotWritten: If the path is a folder, or the folder of the file does not exist.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise NotWritten(f'{path} cannot be written: it is a folder, not a file')
    if not path.parent.is_dir():
        raise NotWritten(f'{path} cannot be written: there is no folder {path.parent}')


@contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Write to a temporary file, and rename it when it is complete.

    Until then, and after an error or a kill, an existing file stays unchanged. To
    write two files that belong together, write the second within the context of the
    first, so that neither appears without the other::

        with replacing('slim.pth') as weights:
            torch.save(checkpoint, weights)
            with replacing('slim.py') as config:
                config.write_text(text, 'utf-8')

    Args:
        path (str | Path): The file, in an existing folder. A link is followed; a
            device such as ``/dev/null`` is written directly.

    Yields:
        Path: The path to write to: a file of the same name in a hidden folder beside
        it. Other files written there are renamed too.

    Raises:
        NotWritten: If the file could not be written, see :func:`check_target`, or if
            writing raises an OSError or a RuntimeError, which torch raises when the
            disk is full.
    """
    check_target(path)
    path = Path(os.path.realpath(path))
    folder = None
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        folder = Path(tempfile.mkdtemp(prefix=f'.{path.stem[:50]}.', dir=path.parent))
        temporary = folder / path.name
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        for other in folder.iterdir():
            if other != temporary:
                os.replace(other, path.with_name(other.name))
        os.replace(temporary, path)
    except NotWritten:  # from a nested context
        raise
    except (OSError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise NotWritten(f'{path} cannot be written: {reason}') from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file completely or not at all.

    Args:
        path (str | Path): The file, in an existing folder.
        text (str): Its content, written in UTF-8.

    Raises:
        NotWritten: If it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, 'utf-8')
