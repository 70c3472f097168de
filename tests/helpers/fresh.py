"""Run code and scripts in fresh processes, forked from a server that has torch.

Starting Python with torch, mmengine and what the toolboxes import takes seconds.
Forking a process that has only imported them takes a hundredth of that.
"""

import gc
import os
import runpy
import sys
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = get_context('forkserver')
CONTEXT.set_forkserver_preload(
    ['torch', 'mmengine.runner', 'scipy.stats', 'torchvision', 'sklearn.metrics']
)


def hurry():
    """Cache slow work of mmengine, and collect garbage more rarely.

    The first takes half the time of a short run: mmengine reads all of pip's records
    and a toolbox's whole index for each config that it looks up. For each checkpoint,
    log and file, it formats the config with yapf, and asks git for the commit.
    """
    from mmengine.config import config, utils
    from mmengine.utils import version_utils

    def unchanged(text, **kwargs):
        compile(text, 'config', 'exec')
        return text, False

    # The compiler makes millions of objects, and Python's default is 700
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()
    utils.load = lru_cache(maxsize=None)(utils.load)
    config.is_installed = lru_cache(maxsize=None)(config.is_installed)
    config.FormatCode = unchanged
    version_utils._minimal_ext_cmd = lambda command: b''


class Done(NamedTuple):
    """Exit code and output of a process, including stderr."""

    returncode: int
    output: str


def run(what, *args, cwd=ROOT, timeout=500):
    """Run code from a string, or a script from a path, with arguments."""
    output = Path(get_temp_dir()) / uuid4().hex
    argv = [str(arg) for arg in (what if isinstance(what, Path) else '-c', *args)]
    code = None if isinstance(what, Path) else what
    process = CONTEXT.Process(target=_work, args=(code, argv, str(cwd), str(output)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    return Done(process.exitcode, output.read_text())


def module(name):
    """Code that runs a module as ``python -m`` does."""
    return f'import runpy; runpy.run_module({name!r}, run_name="__main__")'


def check(what, *args, **kwargs):
    """Run code or a script, which must succeed, and return its output."""
    done = run(what, *args, **kwargs)
    assert done.returncode == 0, done.output[-3000:]
    return done.output


def _work(code, argv, cwd, output):
    with open(output, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    hurry()
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    sys.argv[:] = argv
    if code is None:
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name='__main__')
    else:
        exec(code, {'__name__': '__main__'})
