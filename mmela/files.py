"""Files that are there whole or not at all."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


class NotWritten(OSError):
    """A file could not be written; the message is one line with its name."""


@contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Write beside a file, and rename once all of it is there.

    What was there before stays as it is until then, and for good after an
    error or a kill. Of two files that belong together, the second is written
    within the context of the first, so that neither appears without the other::

        with replacing('slim.pth') as weights:
            torch.save(checkpoint, weights)
            with replacing('slim.py') as config:
                config.write_text(text, 'utf-8')

    Args:
        path (str | Path): The file, in a folder that is there. A link leads to
            what it points to; a device such as ``/dev/null`` is written
            directly.

    Yields:
        Path: Where to write: a file of the same name in a hidden folder beside
        it. What else is written there is renamed too.

    Raises:
        NotWritten: If the folder is not there, or an OSError or a RuntimeError,
            which is torch's for a full disk, ends what writes.
    """
    path = Path(os.path.realpath(path))
    folder = None
    try:
        if path.is_dir():
            raise IsADirectoryError('it is a folder')
        if path.exists() and not path.is_file():
            yield path
            return
        if not path.parent.is_dir():
            raise FileNotFoundError(f'there is no folder {path.parent}')
        folder = Path(tempfile.mkdtemp(prefix=f'.{path.stem[:50]}.', dir=path.parent))
        temporary = folder / path.name
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        for other in folder.iterdir():
            if other != temporary:
                os.replace(other, path.with_name(other.name))
        os.replace(temporary, path)
    except NotWritten:  # of another file that belongs to this one
        raise
    except (OSError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise NotWritten(f'{path} cannot be written: {reason}') from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path (str | Path): The file, in a folder that is there.
        text (str): What it will hold, in UTF-8.

    Raises:
        NotWritten: If it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, 'utf-8')
