import re
import zipfile
from pathlib import Path
from typing import List, Optional

from mmengine.dist import barrier, is_main_process

from ..files import write_text


def repair_last_checkpoint(runner) -> None:
    """Have a run that is to be resumed find its newest whole checkpoint.

    mmengine writes the name of the newest one into ``last_checkpoint``. A kill at that
    moment leaves an empty file, and one while a checkpoint is written leaves half of
    it, though those before are whole.

    Args:
        runner (Runner): The runner, before it loads anything.
    """
    note = Path(runner.work_dir) / 'last_checkpoint'
    if is_main_process() and note.exists():
        name = note.read_text(encoding='utf-8', errors='replace').strip()
        if not name or not is_whole(Path(name)):
            named = f'{note} names {name or "no checkpoint"!r}'
            found = newest_checkpoint(Path(runner.work_dir))
            if found is None:
                runner.logger.warning(
                    f'{named}, and no whole checkpoint is in {runner.work_dir}: the '
                    'training starts from the beginning.'
                )
                note.unlink()
            else:
                runner.logger.warning(
                    f'{named}, which is not whole: the newest whole checkpoint is '
                    f'{found}, and the run goes on from it.'
                )
                write_text(note, str(found))
    barrier()


def newest_checkpoint(work_dir: Path) -> Optional[Path]:
    """The checkpoint of the latest epoch or iteration that is whole.

    Args:
        work_dir (Path): Work directory of a run.

    Returns:
        Path | None: None if there is none.
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
    """Whether a file is a checkpoint that was written to its end.

    Args:
        path (Path): A file as ``torch.save`` writes it, or a folder of one
            (DeepSpeed, FSDP), which is not looked into.

    Returns:
        bool: False too if it is not there.
    """
    if path.is_dir():
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
