"""Run a tool that ends together with the process that started it.

``python child.py TOOL [arguments]`` runs the tool until its standard input closes. The
system closes it however the process at the other end dies. Start this file by its path,
so that the tool decides what is imported.
"""

import os
import runpy
import signal
import sys
import threading


def end_with(parent: int) -> None:
    """Wait until a pipe closes, then kill this process and its children.

    Args:
        parent (int): File descriptor of the pipe.
    """
    os.read(parent, 1)
    if hasattr(os, 'killpg'):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == '__main__':
    pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=end_with, args=(pipe,), daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')
