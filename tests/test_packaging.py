"""The set-up scripts, the pinned versions and what a wheel contains."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob('tools/**/*.sh')) + [ROOT / '.ci' / 'run']
needs_bash = pytest.mark.skipif(not shutil.which('bash'), reason='no bash')


def bash(*args, cwd, **env):
    """Run bash without the caller's environments in sight."""
    hidden = ('MMELA_PYTHON', 'VIRTUAL_ENV', 'CONDA_PREFIX', 'PYTHONPATH')
    env = {**{k: v for k, v in os.environ.items() if k not in hidden}, **env}
    return subprocess.run(
        ['bash', *map(str, args)],
        cwd=cwd,
        env=env,
        timeout=60,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope='module')
def packaging():
    pytest.importorskip('setuptools')
    return runpy.run_path(str(ROOT / 'setup.py'), run_name='setup')


@pytest.fixture(scope='module')
def pins(packaging):
    """Name to exact version, for what requirements/setup.txt pins."""
    parsed = map(Requirement, packaging['requirements']('setup'))
    specs = {r.name: list(r.specifier) for r in parsed}
    return {
        name: spec[0].version
        for name, spec in specs.items()
        if [s.operator for s in spec] == ['==']
    }


def test_pins_are_supported(packaging, pins):
    distributions = {'mmseg': 'mmsegmentation'}
    ranges = {
        distributions.get(name, name): span
        for name, span in packaging['VERSION']['SUPPORTED'].items()
    }
    assert set(ranges) <= set(pins)
    for name, (first, end) in ranges.items():
        supported = Requirement(f'{name}>={first},<{end}').specifier
        assert pins[name] in supported, name


def test_torchvision_matches_torch(pins):
    torch, vision = (pins[n].split('.') for n in ('torch', 'torchvision'))
    # torchvision 0.15 came with torch 2.0, and one by one since.
    assert torch[0] == '2' and int(vision[1]) == int(torch[1]) + 15


def test_setup_script_finds_the_mmcv_pin(pins):
    script = (ROOT / 'tools' / 'setup.sh').read_text('utf-8')
    expression = re.search(r"mmcv=\$\(sed -n '([^']+)'", script).group(1)
    seen = subprocess.run(
        ['sed', '-n', expression, str(ROOT / 'requirements' / 'setup.txt')],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.split() == [pins['mmcv']]


@needs_bash
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script):
    done = bash('-n', script, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@needs_bash
class TestSetupScript:
    script = ROOT / 'tools' / 'setup.sh'

    def fails(self, tmp_path, *args, **env):
        done = bash(self.script, *args, cwd=tmp_path, **env)
        assert done.returncode != 0
        assert done.stdout == ''
        return done.stderr

    def test_missing_interpreter(self, tmp_path):
        missing = str(tmp_path / 'no' / 'python')
        lines = self.fails(tmp_path, MMELA_PYTHON=missing).splitlines()
        assert len(lines) == 1
        assert 'MMELA_PYTHON' in lines[0] and missing in lines[0]

    def test_not_a_python(self, tmp_path):
        assert 'not Python 3.8' in self.fails(tmp_path, MMELA_PYTHON='bash')

    def test_environment_without_the_needs(self, tmp_path):
        subprocess.run(
            [sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'env'],
            check=True,
        )
        message = self.fails(tmp_path, MMELA_PYTHON='env/bin/python')
        assert 'lacks: torch mmengine mmcv' in message
        # Nothing was installed into it.
        assert not list(tmp_path.glob('env/lib/python*/site-packages/*'))

    def test_unknown_argument(self, tmp_path):
        assert "'--what'" in self.fails(tmp_path, '--what')

    def test_own_environment_is_handed_back(self, tmp_path):
        find = (
            'import importlib.util as u; s = u.find_spec("mmela"); '
            'print(s and s.origin)'
        )
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        seen = subprocess.run(
            [sys.executable, '-c', find],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        if Path(seen.stdout.strip()) != ROOT / 'mmela' / '__init__.py':
            pytest.skip('this checkout is not installed here')
        done = bash(self.script, cwd=tmp_path, MMELA_PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        assert done.stdout == sys.executable + '\n'
        assert 'as it is' in done.stderr and 'installing' not in done.stderr


@needs_bash
class TestCommands:
    """The two commands, with a stand-in for the set-up and for the job."""

    @pytest.fixture
    def checkout(self, tmp_path):
        tools = tmp_path / 'a checkout' / 'tools'
        tools.mkdir(parents=True)
        for name in ('demo.sh', 'run_tests.sh'):
            shutil.copy(ROOT / 'tools' / name, tools)
        (tools / 'setup.sh').write_text(f'echo "{sys.executable}"\n')
        report = 'import os, sys; print([os.getcwd()] + sys.argv[1:])\n'
        (tools / 'demo.py').write_text(report)
        return tools.parent

    def test_demo_passes_arguments(self, checkout, tmp_path):
        done = bash(checkout / 'tools' / 'demo.sh', '--a', 'b c', cwd=tmp_path)
        assert done.stdout == f'{[str(tmp_path), "--a", "b c"]}\n'

    def test_tests_pass_arguments(self, checkout, tmp_path):
        (checkout / 'tests').mkdir()
        (checkout / 'tests' / 'test_x.py').write_text(
            'def test_one(): pass\n\ndef test_two(): assert False\n'
        )
        script = checkout / 'tools' / 'run_tests.sh'
        every = bash(script, cwd=tmp_path)
        assert every.returncode == 1 and '1 failed, 1 passed' in every.stdout
        one = bash(script, 'tests/test_x.py', '-k', 'one', cwd=tmp_path)
        assert one.returncode == 0 and '1 passed' in one.stdout

    @pytest.mark.parametrize('name', ['demo.sh', 'run_tests.sh'])
    def test_failed_setup_stops(self, checkout, tmp_path, name):
        (checkout / 'tools' / 'setup.sh').write_text('exit 3\n')
        done = bash(checkout / 'tools' / name, cwd=tmp_path)
        assert done.returncode == 3 and done.stdout == ''


class TestMim:
    @pytest.mark.parametrize('link', [True, False])
    def test_extension(self, packaging, tmp_path, link):
        package = tmp_path / 'mmela'
        (package / '.mim' / 'configs').mkdir(parents=True)
        (package / '.mim' / 'configs' / 'stale.py').touch()
        for _ in range(2):  # also over its own result
            packaging['add_mim'](package, link=link)
        mim = package / '.mim'
        assert sorted(os.listdir(mim)) == sorted(packaging['MIM'])
        for name in packaging['MIM']:
            assert (mim / name).is_symlink() == link
            assert (mim / name).exists()
        assert not (mim / 'configs' / 'stale.py').exists()
        assert (mim / 'tools' / 'setup.sh').is_file()
        assert link or not list(mim.rglob('__pycache__'))

    def test_index(self):
        index = yaml.safe_load((ROOT / 'model-index.yml').read_text('utf-8'))
        assert index['Import']
        for path in index['Import']:
            assert (ROOT / path).is_file(), path


def test_build_holds_the_whole_package(packaging, tmp_path):
    """A folder without __init__.py, or a data file, would be left out."""

    def files(folder):
        paths = (p.relative_to(folder) for p in folder.rglob('*.*'))
        return {
            p
            for p in paths
            if not {'.mim', '__pycache__'} & set(p.parts) and (folder / p).is_file()
        }

    mim = ROOT / 'mmela' / '.mim'
    before = mim.is_dir() and [p.is_symlink() for p in sorted(mim.iterdir())]
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build_py', '-d', tmp_path],
        cwd=ROOT,
        check=True,
    )
    assert files(tmp_path / 'mmela') == files(ROOT / 'mmela')
    assert (tmp_path / 'mmela' / '.mim' / 'tools' / 'setup.sh').is_file()
    # The checkout's own links stay what they are.
    assert before == (mim.is_dir() and [p.is_symlink() for p in sorted(mim.iterdir())])
