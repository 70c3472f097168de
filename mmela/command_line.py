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
    """Folder of the configs and tools in a toolbox's installation."""
    return Path(find_spec(scope).origin).parent / '.mim'


def find_config(config: str) -> Path:
    """Find a config, which may be one that a toolbox ships.

    Args:
        config (str): Its path, or ``SCOPE::PATH`` as in ``_base_``, such as
            ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If ``SCOPE`` is no installed toolbox.
    """
    scope, shipped, name = config.partition('::')
    path = Path(config)
    if shipped:
        if not is_installed(scope):
            raise ValueError(
                f'{config}: {scope!r} is no installed toolbox: mmdet, mmpretrain or '
                'mmseg'
            )
        path = _shipped_with(scope) / 'configs' / name
    if not path.is_file():
        raise FileNotFoundError(f'no config at {path}')
    return path


def find_tool(config: str, name: str) -> Path:
    """Find a tool of the toolbox that a config is written for.

    Args:
        config (str): The config, as :func:`find_config` takes it. Its
            ``default_scope`` names the toolbox: ``mmdet``, ``mmpretrain`` or
            ``mmseg``.
        name (str): File name of the tool, e.g. ``train.py``.

    Returns:
        Path: The tool in the toolbox's installation.

    Raises:
        FileNotFoundError: If there is no such config, or the toolbox ships no
            such tool.
        ValueError: If the config names no toolbox that is installed.
    """
    scope = Config.fromfile(find_config(config)).get('default_scope')
    if not scope or not is_installed(scope):
        raise ValueError(
            f'{config} has default_scope={scope!r}, which is no '
            'installed toolbox: mmdet, mmpretrain or mmseg'
        )
    tool = _shipped_with(scope) / 'tools' / name
    if not tool.is_file():
        raise FileNotFoundError(f'{scope} has no {tool}; install it with pip or mim')
    return tool


def run_tool(name: str, argv: List[str], files: Tuple[str, ...] = ()) -> None:
    """Run a toolbox's tool in this process, for a config of that toolbox.

    Args:
        name (str): File name of the tool, e.g. ``train.py``.
        argv (list[str]): Its command-line arguments; the config comes first, as
            :func:`find_config` takes it. ``--channels-last`` is not the
            toolbox's: it adds a :class:`mmela.hooks.MemoryFormatHook`.
        files (tuple[str]): What the arguments after the config are, each a
            file or an address. Defaults to none.

    Raises:
        SystemExit: With one clear line if the config, the tool or a file is
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
            raise SystemExit(f'error: no {label} at {path}')
    sys.argv = [str(tool), str(find_config(argv[0])), *channels_last(argv[1:])]
    with _configs_kept(tests=name == 'test.py'):
        runpy.run_path(str(tool), run_name='__main__')


@contextmanager
def _configs_kept(tests: bool) -> Iterator[None]:
    """Keep configs in work directories from being overwritten.

    A runner dumps its config, changes of the command line included, into its
    work directory under the name that it was loaded from. So the config of a
    run that is given to a tool would be replaced, and that of a training by
    whatever tests it.
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
    """Put a config's setting in the place of ``--channels-last``.

    Args:
        argv (list[str]): Arguments of a tool that takes ``--cfg-options``.

    Returns:
        list[str]: The arguments without it.
    """
    if '--channels-last' not in argv:
        return argv
    rest = [argument for argument in argv if argument != '--channels-last']
    if '--cfg-options' not in rest:
        rest.append('--cfg-options')
    # A second --cfg-options would replace the first
    rest.insert(
        rest.index('--cfg-options') + 1,
        'default_hooks.memory_format.type=MemoryFormatHook',
    )
    return rest


def one_line(error: Union[Exception, str]) -> str:
    """What an exception or a text says, for one line of a command-line tool.

    It is :func:`printable`.
    """
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return printable(' '.join(str(text).split()))


@contextmanager
def one_line_errors(*kinds: Type[Exception]) -> Iterator[None]:
    """End a command-line tool with one clear line where its user erred.

    Args:
        *kinds (type[Exception]): Errors that say what is wrong; others
            show their traceback.

    Raises:
        SystemExit: With what such an error says.
    """
    try:
        yield
    except kinds as error:
        raise SystemExit(f'error: {one_line(error)}') from error


def printable(text: str) -> str:
    """A text of any source for a terminal.

    Control characters, which a name in a file may bring along and a terminal
    would obey, are shown as escapes.
    """
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
