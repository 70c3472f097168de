"""The command ``mmela``, also ``python -m mmela``: the tools by short names.

Each command hands its arguments to the tool that it stands for.
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
# By name, the file that has the command's main(): of the package, or a script
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
        tool (str): Its path in a checkout, such as ``'tools/train.py'``.

    Returns:
        Path: The tool in what is installed, or in the checkout.

    Raises:
        click.ClickException: If it is in neither.
    """
    for folder in (PACKAGE / '.mim', PACKAGE.parent):
        if (folder / tool).is_file():
            return folder / tool
    raise click.ClickException(f'no {tool} beside or in {PACKAGE}')


class Commands(click.Group):
    """The commands. What mmela needs and does not find, they say in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError:
            try:
                import mmela  # noqa: F401
            except ImportError as error:
                raise SystemExit(f'error: {error}') from None
            raise  # mmela has what it needs: something else is wrong


class Tool(click.Command):
    """A command that is a tool, arguments and help included.

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
        ctx.params['arguments'] = args  # as they are, `--` included
        return []

    def invoke(self, ctx: click.Context) -> None:
        path = find(self.tool)
        sys.argv = [ctx.command_path, *ctx.params['arguments']]
        if self.tool.startswith('mmela/'):
            # Not imported by its name, as that would import mmela and so torch first
            name = self.tool[: -len('.py')].replace('/', '.')
            spec = spec_from_file_location(name, path)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            module.main()
            return
        sys.path.insert(0, str(path.parent))  # as `python tools/...` has it
        runpy.run_path(str(path), run_name='__main__')


@click.group(cls=Commands, context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(VERSION['__version__'], prog_name='mmela')
def main() -> None:
    """Layer attention with pruning, for OpenMMLab's toolboxes.

    `mmela COMMAND --help` tells the arguments of a command.
    """


for _name, _tool in TOOLS.items():
    main.add_command(Tool(_name, _tool))


@main.command()
@click.argument('shell', type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what has a shell complete the commands.

    For bash, add this line to ~/.bashrc; zsh and fish likewise:

    eval "$(mmela completion bash)"
    """
    shell_complete = get_completion_class(shell)
    click.echo(shell_complete(main, {}, 'mmela', '_MMELA_COMPLETE').source())


@main.command()
def env() -> None:
    """Versions, operators in use, GPU: for a bug report."""
    from mmengine.utils.dl_utils import collect_env

    from mmela.compat.forks import distributions

    rows = {'mmela': f'{VERSION["__version__"]}, {PACKAGE}', **collect_env()}
    for name in VERSION['DISTRIBUTIONS']:
        found = ', '.join(f'{d} {v}' for d, v in distributions(name).items())
        rows[name] = found or 'no distribution'
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
