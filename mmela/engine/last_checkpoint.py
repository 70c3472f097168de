import re
import zipfile
from pathlib import Path
from typing import List, Optional

from mmengine.dist import barrier, is_main_process

from ..files import write_text


def repair_last_checkpoint(runner) -> None:
    """Point ``last_checkpoint`` to the newest complete checkpoint before a resume.

    mmengine writes the name of the newest checkpoint into ``last_checkpoint``. A kill
    at that moment leaves an empty file, and a kill while a checkpoint is being written
    leaves it incomplete, although earlier ones are complete.

    Args:
        runner (Runner): The runner, before it loads anything.
    """
    pointer = Path(runner.work_dir) / 'last_checkpoint'
    if is_main_process() and pointer.exists():
        name = pointer.read_text(encoding='utf-8', errors='replace').strip()
        if not name or not is_whole(Path(name)):
            problem = (
                f'{pointer} names {name}, which is missing or incomplete'
                if name
                else f'{pointer} is empty'
            )
            newest = newest_checkpoint(Path(runner.work_dir))
            if newest is None:
                runner.logger.warning(
                    f'{problem}, and {runner.work_dir} has no complete checkpoint. '
                    'Training starts from the beginning.'
                )
                pointer.unlink()
            else:
                runner.logger.warning(
                    f'{problem}. Resuming from the newest complete one, {newest}.'
                )
                write_text(pointer, str(newest))
    barrier()


def newest_checkpoint(work_dir: Path) -> Optional[Path]:
    """Find the complete checkpoint of the latest epoch or iteration.

    Args:
        work_dir (Path): Work directory of a run.

    Returns:
        Path | None: The checkpoint; None if none is complete.
    """
    numbered: List[tuple] = []
    for path in work_dir.glob('*.pth'):
        match = re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem)
        if match:
            numbered.append((int(match[1]), path.stat().st_mtime, path))
    for _, _, path in sorted(numbered, reverse=True):
        if is_whole(path):
            return path
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is complete.

    Args:
        path (Path): A file written by ``torch.save``, or a folder (DeepSpeed, FSDP),
            whose content is not checked.

    Returns:
        bool: False if it is incomplete or missing.
    """
    if path.is_dir():
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
