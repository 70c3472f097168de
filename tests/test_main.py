"""The command ``mmela``."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmela.version import __version__
from mmela_light import command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return lambda *args: CliRunner().invoke(command.main, args, prog_name='mmela')


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Have `mmela slim` find a tool that prints its arguments."""
    path = tmp_path / 'tools' / 'convert' / 'slim.py'
    path.parent.mkdir(parents=True)
    path.write_text('"""Make slim.\n\nText."""\nimport sys\nprint(sys.argv[1:])\n')
    package = tmp_path / 'mmela'
    monkeypatch.setattr(command, 'PACKAGE', package)
    return path


def test_lists_the_tools(run):
    done = run('--help')
    assert done.exit_code == 0
    commands = done.output.partition('Commands:')[2]
    for name, path in command.TOOLS.items():
        assert (ROOT / path).is_file()
        assert f'\n  {name} ' in commands


def test_every_tool_has_a_line(run):
    """The whole of it, as the first line of its text is short enough."""
    commands = run('--help').output.partition('Commands:')[2]
    for path in command.TOOLS.values():
        text = (ROOT / path).read_text('utf-8')
        line = text.split('"""')[1].partition('\n')[0]
        assert line and line in ' '.join(commands.split())


def test_page_has_every_command():
    page = (ROOT / 'docs' / 'command_line.md').read_text('utf-8')
    rows = [line.split('`')[1] for line in page.splitlines() if line[:3] == '| `']
    assert sorted(rows) == sorted(f'mmela {name}' for name in command.main.commands)


@pytest.mark.parametrize(
    'args', [[], ['--help'], ['-h'], ['a', '--b=c', '-d', '--', '-e', 'f g'], ['--']]
)
def test_arguments_are_handed_on(run, tool, args):
    done = run('slim', *args)
    assert done.exit_code == 0, done.output
    assert done.output == f'{args}\n'


def test_installed_tools_come_first(run, tool, tmp_path):
    installed = tmp_path / 'mmela' / '.mim' / 'tools' / 'convert' / 'slim.py'
    installed.parent.mkdir(parents=True)
    installed.write_text('print("installed")')
    assert run('slim').output == 'installed\n'


def test_tool_has_modules_beside_it(run, tool):
    (tool.parent / 'beside.py').write_text('ANSWER = 7')
    tool.write_text('import beside; print(beside.ANSWER)')
    try:
        assert run('slim').output == '7\n'
    finally:
        sys.modules.pop('beside', None)


def test_one_line_of_error(run, tool):
    tool.write_text('raise SystemExit("error: no file a")')
    done = run('slim', 'a')
    assert done.exit_code == 1 and done.output == 'error: no file a\n'
    tool.unlink()
    done = run('slim')
    assert done.exit_code == 1 and 'tools/convert/slim.py is neither' in done.output
    assert done.output.count('\n') == 1


def test_unknown_command(run):
    done = run('slimm')
    assert done.exit_code == 2 and "No such command 'slimm'" in done.output


def test_env(run):
    done = run('env')
    assert done.exit_code == 0
    lines = dict(x.split(': ', 1) for x in done.output.splitlines() if ': ' in x)
    assert lines['mmela'].startswith(__version__)
    assert 'mmengine' in lines['mmengine']
    assert lines['operators of mmcv'].split()[0].strip(',') in (
        'compiled',
        "torchvision's",
        'none',
    )


# Runs commands in a process without packages whose import is refused
WITHOUT = """
import contextlib, io, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {without}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Refuse())
from mmela_light.command import TOOLS, main
for command in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(command.split(), prog_name='mmela')
        except SystemExit as end:
            assert not end.code, (command, end.code)
    print(command, '->', repr(out.getvalue().split(chr(10))[0]))
"""
HEAVY = ('torch', 'mmengine', 'mmcv', 'mmela')


def run_without(packages, commands):
    code = WITHOUT.format(without=packages, commands=commands)
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
    )


def test_help_imports_no_torch():
    """Of every command. Each import would be refused."""
    commands = ['--help', '--version', 'completion --help', 'completion zsh']
    commands += [f'{name} --help' for name in command.TOOLS]
    done = run_without(HEAVY, commands)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(' -> ') for line in done.stdout.splitlines())
    assert list(lines) == commands
    for name in set(command.TOOLS) - {'train', 'test'}:  # their usage comes later
        assert lines[f'{name} --help'].startswith(f"'usage: mmela {name} ")


@pytest.mark.parametrize('missing', ['torch', 'mmengine', 'mmcv'])
@pytest.mark.parametrize(
    'args',
    [
        'env',
        'train config.py',
        'slim config.py a.pth b.pth',
        'study a.yml --cfg-options a=1',
    ],
)
def test_what_is_missing_is_said_in_one_line(missing, args, tmp_path):
    # As in an environment that has none: not found, where Refuse would raise
    code = f"""
import importlib.util, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {missing!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: name != {missing!r} and find_spec(name) or None
from mmela_light.command import main
main({args.split()!r}, prog_name='mmela')
"""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ''
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'error: mmela needs {missing} >= ')
    assert 'which is not installed; install it with: pip install ' in line


def test_completion(run, monkeypatch):
    monkeypatch.setenv('COMP_WORDS', 'mmela lay')
    monkeypatch.setenv('COMP_CWORD', '1')
    monkeypatch.setenv('_MMELA_COMPLETE', 'bash_complete')
    assert run().output.split() == ['plain,layer-attention']


@pytest.mark.parametrize('shell', command.SHELLS)
def test_completion_script(run, shell):
    done = run('completion', shell)
    assert done.exit_code == 0
    assert f'_MMELA_COMPLETE={shell}_complete' in done.output


def test_completion_of_an_unknown_shell(run):
    done = run('completion', 'tcsh')
    assert done.exit_code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.output


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, '-m', 'mmela', '--version'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f'mmela, version {__version__}\n'


def test_console_script(tmp_path):
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path],
        cwd=ROOT,
        check=True,
    )
    points = (tmp_path / 'mmela.egg-info' / 'entry_points.txt').read_text('utf-8')
    assert 'mmela = mmela_light.command:main' in points.splitlines()
