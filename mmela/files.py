"""Files that are there whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


@contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Write beside a file, and rename once all of it is there.

    What was there before stays as it is until then, and for good after an
    error or a kill. Two files that belong together are written under both
    contexts, so that neither appears without the other::

        with replacing('slim.pth') as weights, replacing('slim.py') as config:
            torch.save(checkpoint, weights)
            config.write_text(text, 'utf-8')

    Args:
        path (str | Path): The file. A link leads to what it points to; a
            device such as ``/dev/null`` is written directly.

    Yields:
        Path: Where to write, with the suffix of ``path``.

    Raises:
        OSError: If it cannot be renamed.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f'.{path.stem}.part{path.suffix}')
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path (str | Path): The file.
        text (str): What it will hold, in UTF-8.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, 'utf-8')
