"""The command ``mmela``."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmela import __main__ as command
from mmela.version import __version__

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
        assert (ROOT / 'tools' / path).is_file()
        assert f'\n  {name} ' in commands


def test_every_tool_has_a_line(run):
    """The whole of it, as the first line of its text is short enough."""
    commands = run('--help').output.partition('Commands:')[2]
    for path in command.TOOLS.values():
        text = (ROOT / 'tools' / path).read_text('utf-8')
        line = text.split('"""')[1].partition('\n')[0]
        assert line and line in ' '.join(commands.split())


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
    assert done.exit_code == 1 and 'no tools/convert/slim.py' in done.output
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


def test_completion(run, monkeypatch):
    monkeypatch.setenv('COMP_WORDS', 'mmela lay')
    monkeypatch.setenv('COMP_CWORD', '1')
    monkeypatch.setenv('_MMELA_COMPLETE', 'bash_complete')
    assert run().output.split() == ['plain,layer-attention']


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
    assert points.split() == ['[console_scripts]', 'mmela', '=', 'mmela.__main__:main']
