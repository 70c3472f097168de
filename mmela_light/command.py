"""The command ``mmela``, also ``python -m mmela``, which runs the tools by short names.

Each command passes its arguments to its tool.
"""

import ast
import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, List

import click
from click.shell_completion import get_completion_class

PACKAGE = Path(__file__).resolve().parents[1] / 'mmela'
VERSION = runpy.run_path(str(PACKAGE / 'version.py'))
# File of each command: a module of the package with main(), or a script
TOOLS = {
    'demo': 'tools/demo.py',
    'train': 'tools/train.py',
    'test': 'tools/test.py',
    'infer': 'tools/infer.py',
    'study': 'tools/study.py',
    'prune': 'tools/convert/prune.py',
    'slim': 'tools/convert/slim.py',
    'push': 'mmela/tools/push.py',
    'export': 'mmela/tools/export.py',
    'published': 'tools/convert/published.py',
    'operators': 'mmela/tools/operators.py',
    'report': 'tools/analysis/report.py',
    'layer-attention': 'mmela/tools/layer_attention.py',
    'cam': 'tools/analysis/cam.py',
    'cost': 'mmela/tools/cost.py',
    'pictures': 'mmela/tools/pictures.py',
    'model-zoo': 'tools/analysis/model_zoo.py',
    'compare': 'mmela/benchmark/compare.py',
    'hook-overhead': 'mmela/benchmark/hook_overhead.py',
    'shapes': 'mmela/tools/shapes.py',
    'lesions': 'mmela/tools/lesions.py',
    'cifar': 'mmela/tools/cifar.py',
}
SHELLS = ('bash', 'zsh', 'fish')


def find(tool: str) -> Path:
    """Find one of mmela's tools.

    Args:
        tool (str): Path in a checkout, such as ``'tools/train.py'``.

    Returns:
        Path: Path in the installed package or in the checkout.

    Raises:
        click.ClickException: If the tool is in neither.
    """
    for folder in (PACKAGE / '.mim', PACKAGE.parent):
        if (folder / tool).is_file():
            return folder / tool
    raise click.ClickException(
        f'{tool} is neither in {PACKAGE} nor beside it; install mmela again'
    )


class Commands(click.Group):
    """Group of the commands, with a one-line error if a dependency is missing."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError:
            try:
                import mmela  # noqa: F401
            except ImportError as error:
                raise SystemExit(f'error: {error}') from None
            raise  # mmela itself imports, so the error is in the command


class Tool(click.Command):
    """A command that runs a tool, which parses the arguments and prints the help.

    Args:
        name (str): Name of the command.
        tool (str): Path of the tool, see :func:`find`.
    """

    def __init__(self, name: str, tool: str) -> None:
        arguments = click.Argument(['arguments'], nargs=-1, type=click.Path())
        super().__init__(
            name,
            params=[arguments],
            add_help_option=False,
            context_settings=dict(ignore_unknown_options=True),
        )
        self.tool = tool

    def get_short_help_str(self, limit: int = 45) -> str:
        text = ast.get_docstring(ast.parse(find(self.tool).read_text('utf-8')))
        return (text or '').partition('\n')[0]

    def parse_args(self, ctx: click.Context, args: List[str]) -> List[str]:
        ctx.params['arguments'] = args  # unchanged, including `--`
        return []

    def invoke(self, ctx: click.Context) -> None:
        path = find(self.tool)
        sys.argv = [ctx.command_path, *ctx.params['arguments']]
        if self.tool.startswith('mmela/'):
            # Importing it by name would first import mmela and so torch
            name = self.tool[: -len('.py')].replace('/', '.')
            spec = spec_from_file_location(name, path)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            module.main()
            return
        sys.path.insert(0, str(path.parent))  # as `python tools/...` does
        runpy.run_path(str(path), run_name='__main__')


@click.group(cls=Commands, context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(VERSION['__version__'], prog_name='mmela')
def main() -> None:
    """Layer attention with pruning, for OpenMMLab's toolboxes.

    `mmela COMMAND --help` shows the arguments of a command.
    """


for _name, _tool in TOOLS.items():
    main.add_command(Tool(_name, _tool))


@main.command()
@click.argument('shell', type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script for tab completion in a shell.

    For bash, add this line to ~/.bashrc; for zsh and fish it is similar:

    eval "$(mmela completion bash)"
    """
    shell_complete = get_completion_class(shell)
    click.echo(shell_complete(main, {}, 'mmela', '_MMELA_COMPLETE').source())


@main.command()
def env() -> None:
    """Print versions, operators and GPUs for a bug report."""
    from mmengine.utils.dl_utils import collect_env

    from mmela.compat.forks import distributions

    rows = {'mmela': f'{VERSION["__version__"]}, {PACKAGE}', **collect_env()}
    for name in VERSION['DISTRIBUTIONS']:
        versions = ', '.join(f'{d} {v}' for d, v in distributions(name).items())
        rows[name] = versions or 'not installed'
    rows['operators of mmcv'] = _operators()
    for name, value in rows.items():
        click.echo(f'{name}: {value}')


def _operators() -> str:
    try:
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        return f'none ({error})'
    file = Path(getattr(sys.modules['mmcv._ext'], '__file__', None) or '')
    return f"torchvision's, {file}" if file.suffix == '.py' else f'compiled, {file}'
