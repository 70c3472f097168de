import runpy
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator, List, Tuple, Type, Union

from mmengine.config import Config
from mmengine.runner import Runner

from .compat.versions import is_installed


def _shipped_with(scope: str) -> Path:
    """Folder of the configs and tools that a toolbox installs."""
    return Path(find_spec(scope).origin).parent / '.mim'


def find_config(config: str) -> Path:
    """Find a config file, or one that a toolbox ships.

    Args:
        config (str): Its path, or ``SCOPE::PATH`` as in ``_base_``, such as
            ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If ``SCOPE`` is not an installed toolbox.
    """
    scope, shipped, name = config.partition('::')
    path = Path(config)
    if shipped:
        if not is_installed(scope):
            raise ValueError(
                f'{config}: {scope!r} is not an installed toolbox; allowed are mmdet, '
                'mmpretrain and mmseg'
            )
        path = _shipped_with(scope) / 'configs' / name
    if not path.is_file():
        raise FileNotFoundError(f'there is no config {path}')
    return path


def find_tool(config: str, name: str) -> Path:
    """Find a tool of the toolbox that a config belongs to.

    Args:
        config (str): The config, see :func:`find_config`. Its ``default_scope``
            names the toolbox: ``mmdet``, ``mmpretrain`` or ``mmseg``.
        name (str): File name of the tool, e.g. ``train.py``.

    Returns:
        Path: The tool that the toolbox installs.

    Raises:
        FileNotFoundError: If the config does not exist, or the toolbox does not ship
            that tool.
        ValueError: If the config does not name an installed toolbox.
    """
    scope = Config.fromfile(find_config(config)).get('default_scope')
    if not scope or not is_installed(scope):
        raise ValueError(
            f'{config} has default_scope={scope!r}, which is not an installed '
            'toolbox; allowed are mmdet, mmpretrain and mmseg'
        )
    tool = _shipped_with(scope) / 'tools' / name
    if not tool.is_file():
        raise FileNotFoundError(f'{scope} has no {tool}; install it with pip or mim')
    return tool


def run_tool(name: str, argv: List[str], files: Tuple[str, ...] = ()) -> None:
    """Run a toolbox's tool in this process.

    Args:
        name (str): File name of the tool, e.g. ``train.py``.
        argv (list[str]): Its command-line arguments, with the config first, see
            :func:`find_config`. mmela adds ``--channels-last``, which turns on a
            :class:`mmela.hooks.MemoryFormatHook`.
        files (tuple[str]): Descriptions of the arguments after the config that are
            files or URLs, for errors. Defaults to none.

    Raises:
        SystemExit: With a one-line error if the config, the tool or a file is
            missing.
    """
    try:
        tool = find_tool(argv[0], name)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f'error: {error}') from None
    for label, path in zip(files, argv[1:]):
        if path.startswith('-'):
            break
        if '://' not in path and not Path(path).is_file():
            raise SystemExit(f'error: there is no {label} {path}')
    sys.argv = [str(tool), str(find_config(argv[0])), *channels_last(argv[1:])]
    with _configs_kept(tests=name == 'test.py'):
        runpy.run_path(str(tool), run_name='__main__')


@contextmanager
def _configs_kept(tests: bool) -> Iterator[None]:
    """Protect configs in work directories from being overwritten.

    A runner dumps its config, with changes from the command line, into the work
    directory under its file name. Without this, a tool would overwrite the config of a
    run that it is given, and a test would overwrite the config of the training.
    """
    dump = Runner.dump_config

    def dump_config(self: Runner) -> None:
        loaded = Path(self.cfg.filename or '')
        target = Path(self.work_dir, loaded.name)
        same = loaded.is_file() and target.is_file() and target.samefile(loaded)
        if same or (tests and target.is_file()):
            return
        dump(self)

    Runner.dump_config = dump_config
    try:
        yield
    finally:
        Runner.dump_config = dump


def channels_last(argv: List[str]) -> List[str]:
    """Translate ``--channels-last`` to a ``--cfg-options`` setting.

    Args:
        argv (list[str]): Arguments of a tool that takes ``--cfg-options``.

    Returns:
        list[str]: The arguments without ``--channels-last``.
    """
    if '--channels-last' not in argv:
        return argv
    rest = [argument for argument in argv if argument != '--channels-last']
    if '--cfg-options' not in rest:
        rest.append('--cfg-options')
    # A second --cfg-options would override the first
    rest.insert(
        rest.index('--cfg-options') + 1,
        'default_hooks.memory_format.type=MemoryFormatHook',
    )
    return rest


def one_line(error: Union[Exception, str]) -> str:
    """Put the message of an exception, or a text, in one :func:`printable` line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return printable(' '.join(str(text).split()))


@contextmanager
def one_line_errors(*kinds: Type[Exception]) -> Iterator[None]:
    """End a command-line tool with a one-line error for mistakes of its user.

    Args:
        *kinds (type[Exception]): Exceptions whose message is enough; others show
            their traceback.

    Raises:
        SystemExit: With the message of such an exception.
    """
    try:
        yield
    except kinds as error:
        raise SystemExit(f'error: {one_line(error)}') from error


def printable(text: str) -> str:
    """Make untrusted text safe for a terminal.

    Control characters, for example in file names, become visible escapes.
    """
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
