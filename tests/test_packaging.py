"""The set-up scripts, the pinned versions and what a wheel contains."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mmela_light import command
from mmela_light.command import TOOLS, find

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
    distributions = packaging['VERSION']['DISTRIBUTIONS']
    ranges = {
        distributions.get(name, [name])[0]: span
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


def test_compiled_mmcv_is_the_pinned_one(pins):
    script = (ROOT / 'tools' / 'compile_mmcv.sh').read_text('utf-8')
    expression = re.search(r"mmcv=\$\(sed -n '([^']+)'", script).group(1)
    seen = subprocess.run(
        ['sed', '-n', expression, str(ROOT / 'requirements' / 'setup.txt')],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.split() == [pins['mmcv-lite']]


def test_lint_has_one_version(packaging):
    (ruff,) = [x for x in packaging['requirements']('lint') if 'ruff' in x]
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text('utf-8'))
    revisions = {repo['repo']: repo['rev'] for repo in hooks['repos']}
    revision = revisions['https://github.com/astral-sh/ruff-pre-commit']
    assert ruff == f'ruff=={revision[1:]}'


class TestToolboxes:
    """What an extra installs, by what is installed already."""

    def requirements(self, packaging, *installed, **kwargs):
        found = {name: set() for name in packaging['VERSION']['DISTRIBUTIONS']}
        for name, distribution in installed:
            found[name].add(distribution)
        toolboxes = packaging['toolboxes']('mmdet', installed=found, **kwargs)
        return [Requirement(x).name for x in toolboxes]

    def test_nothing_there(self, packaging):
        names = ['mmengine', 'mmcv-lite', 'mmdet']
        assert self.requirements(packaging) == names
        names = ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection']
        assert self.requirements(packaging, fork=True) == names

    def test_releases_there(self, packaging):
        """They stay required, so that pip raises what is too old."""
        installed = [('mmengine', 'mmengine'), ('mmdet', 'mmdet')]
        names = ['mmengine', 'mmcv-lite', 'mmdet']
        assert self.requirements(packaging, *installed) == names

    def test_compiled_mmcv_there(self, packaging):
        names = ['mmengine', 'mmdet']
        assert self.requirements(packaging, ('mmcv', 'mmcv')) == names

    def test_toolbox_of_another_there(self, packaging):
        """In whatever name, also one that nobody has thought of."""
        names = ['mmengine', 'mmcv-lite']
        assert self.requirements(packaging, ('mmdet', 'my-mmdet')) == names

    def test_fork_of_the_base_there(self, packaging):
        """mmcv-lite and mmdet would bring mmengine."""
        fork = ('mmengine', 'onedl-mmengine')
        assert self.requirements(packaging, fork) == []
        names = ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection']
        assert self.requirements(packaging, fork, fork=True) == names
        base = ('mmengine', 'mmengine')
        assert self.requirements(packaging, base, fork=True) == []

    def test_providers_are_found(self, packaging, tmp_path):
        def install(name, top_level=None, files=()):
            folder = tmp_path / f'{name}-1.0.dist-info'
            folder.mkdir()
            (folder / 'METADATA').write_text(
                f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n'
            )
            if top_level:
                (folder / 'top_level.txt').write_text(top_level)
            (folder / 'RECORD').write_text(''.join(f'{f},,\n' for f in files))
            for file in files:  # newer readers pass over what is not there
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()

        install('onedl-mmengine', files=['mmengine/__init__.py', 'README'])
        install('mmcv', top_level='mmcv\n')  # no files: an editable install
        install('other', top_level='mmdetection\n')
        found = packaging['providers']([str(tmp_path)] * 2)
        assert {k: v for k, v in found.items() if v} == {
            'mmengine': {'onedl-mmengine'},
            'mmcv': {'mmcv'},
        }


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
        assert 'unchanged' in done.stderr and 'installing' not in done.stderr


# A stand-in for Python: `pip` does and says what $SCENE has, one word a call.
PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$SCENE.calls"
case "$*" in
  '-c import sys; sys.exit'*)
    minor=${2##*(3, }; [ "${PYTHON_MINOR:-11}" -ge "${minor%))}" ] ;;
  -V) echo "Python 3.${PYTHON_MINOR:-11}.0" ;;
  '-m venv --clear '*)
    mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"; cp "$0" "$4/bin/python" ;;
  '-m pip config list') echo "global.index-url='https://mirror.example/simple'" ;;
  "- $ROOT"*) printf '%s\n' fingerprint '' "$ROOT/mmela" lite ;;
  '-m pip install uv'*) false ;;
  '-m pip install'*)
    read -r trouble <"$SCENE"; sed -i 1d "$SCENE"
    case $trouble in
      '') ;;
      kill) kill -9 $PPID ;;
      *) printf '%s\n' "$trouble" >&2; false ;;
    esac ;;
esac
"""


@needs_bash
class TestSetup:
    """tools/setup.sh from nothing, and its way on from trouble."""

    @pytest.fixture
    def checkout(self, tmp_path):
        checkout = tmp_path / 'ein Ordner für mmela'
        shutil.copytree(ROOT / 'requirements', checkout / 'requirements')
        (checkout / 'tools').mkdir()
        shutil.copy(ROOT / 'tools' / 'setup.sh', checkout / 'tools')
        # All that is to be found: no other Python
        tools = 'awk bash cat cp df dirname flock grep head mkdir rm sed tail touch tr'
        (tmp_path / 'bin').mkdir()
        for name in filter(shutil.which, tools.split()):
            (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
        self.add(checkout, 'python3', PYTHON)
        return checkout

    def add(self, checkout, name, script):
        """Add a command, or put it in the place of one."""
        path = checkout.parent / 'bin' / name
        path.unlink(missing_ok=True)
        path.write_text(script)
        path.chmod(0o755)

    def run(self, checkout, *troubles, **env):
        """Run the set-up; pip has these troubles, one a call, and then none."""
        scene = checkout.parent / 'scene'
        scene.write_text(''.join(f'{x}\n' for x in troubles) + '\n' * 9)
        env.update(PATH=str(checkout.parent / 'bin'), LC_ALL='C')
        env.update(SCENE=str(scene), ROOT=str(checkout))
        return bash(checkout / 'tools' / 'setup.sh', cwd=checkout.parent, **env)

    def check_set_up(self, checkout, **env):
        done = self.run(checkout, **env)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f'{checkout}/.venv/bin/python\n'
        assert 'error' not in done.stderr

    def check_error(self, done, *words):
        """One line, the last, that names what is wrong."""
        assert done.returncode != 0 and done.stdout == ''
        lines = done.stderr.splitlines()
        errors = [line for line in lines if 'error' in line]
        assert errors == lines[-1:], done.stderr
        for word in words:
            assert word in errors[0]

    def test_from_nothing_and_again(self, checkout):
        self.check_set_up(checkout)
        calls = (checkout.parent / 'scene.calls').read_text()
        assert '-m venv --clear' in calls
        assert f'-e {checkout}' in calls
        (checkout.parent / 'scene.calls').unlink()
        self.check_set_up(checkout)
        assert 'pip' not in (checkout.parent / 'scene.calls').read_text()

    # What pip 26 says
    @pytest.mark.parametrize(
        'trouble, words',
        [
            ('[Errno 28] No space left on device', 'the disk is full'),
            (
                "broken by 'NewConnectionError('<pip._vendor.urllib3.connection."
                'HTTPSConnection object at 0x7f>: Failed to establish a new '
                "connection: [Errno -2] Name or service not known')': /simple/",
                'no connection to the package registry',
            ),
            (
                "broken by 'ProxyError('Cannot connect to proxy.', "
                "NewConnectionError('Connection refused'))': /simple/torch/",
                'cannot connect through the proxy http://localhost:9',
            ),
            (
                "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY"
                "_FAILED] certificate verify failed'))",
                'certificate is not trusted',
            ),
            (
                "ERROR: Wheel 'torch' located at /x is invalid.",
                'download was interrupted',
            ),
            (
                'ERROR: No matching distribution found for torch==2.12.0',
                'No matching distribution found for torch==2.12.0',
            ),
        ],
    )
    def test_trouble_and_on(self, checkout, trouble, words):
        proxy = 'http://localhost:9'
        done = self.run(checkout, trouble, HTTPS_PROXY=proxy, MMELA_INSTALLER='pip')
        self.check_error(done, 'torch, mmdet', words, 'setup.log')
        assert not (checkout / '.venv' / '.mmela-setup').exists()
        self.check_set_up(checkout, MMELA_INSTALLER='pip')

    def test_killed_and_on(self, checkout):
        assert self.run(checkout, 'kill', MMELA_INSTALLER='pip').returncode != 0
        assert not (checkout / '.venv' / '.mmela-setup').exists()
        self.check_set_up(checkout, MMELA_INSTALLER='pip')

    @pytest.mark.parametrize('works', [True, False])
    def test_uv(self, checkout, works):
        """It is used where it works, knows pip's settings, and pip takes over."""
        log = 'echo "uv $UV_DEFAULT_INDEX $*" >>"$SCENE.calls"'
        self.add(checkout, 'uv', f'#!/bin/sh\n{log}\nexit {0 if works else 2}\n')
        self.check_set_up(checkout)
        calls = (checkout.parent / 'scene.calls').read_text().splitlines()
        by_uv = [x for x in calls if x.startswith('uv ')]
        by_pip = [x for x in calls if x.startswith('-m pip install')]
        python = f'{checkout}/.venv/bin/python'
        start = f'uv https://mirror.example/simple pip install --python {python} '
        assert len(by_uv) == 2 and all(x.startswith(start) for x in by_uv)
        assert len(by_pip) == (0 if works else 2)

    @pytest.mark.parametrize('minor', [9, 15])
    def test_python_too_old_or_new(self, checkout, minor):
        done = self.run(checkout, PYTHON_MINOR=str(minor))
        found = f'python3 is Python 3.{minor}.0'
        self.check_error(done, 'no Python 3.10 to 3.14', found, 'MMELA_PYTHON')
        assert not (checkout / '.venv').exists()

    def test_small_disk(self, checkout):
        self.add(checkout, 'df', '#!/bin/sh\necho\necho none 9 9 4200000 9 /\n')
        done = self.run(checkout)
        self.check_error(done, 'needs 6000 MB', str(checkout), '4200 MB are free')
        assert not (checkout / '.venv').exists()

    def test_half_an_environment(self, checkout, tmp_path):
        """An active one that lacks mmcv is left alone."""
        conda = tmp_path / 'conda'
        (conda / 'bin').mkdir(parents=True)
        python = conda / 'bin' / 'python'
        python.write_text(
            PYTHON.replace("fingerprint ''", 'fingerprint "mmengine mmcv"')
        )
        python.chmod(0o755)
        before = sorted(conda.rglob('*'))
        done = self.run(checkout, CONDA_PREFIX=str(conda))
        assert done.returncode == 0, done.stderr
        assert 'lacks mmengine mmcv; using' in done.stderr
        assert done.stdout == f'{checkout}/.venv/bin/python\n'
        assert sorted(conda.rglob('*')) == before

    def test_something_else_in_the_way(self, checkout):
        (checkout / '.venv').mkdir()
        (checkout / '.venv' / 'thesis.txt').touch()
        self.check_error(self.run(checkout), 'is not a virtual environment')
        assert (checkout / '.venv' / 'thesis.txt').exists()

    def test_unknown_operators(self, checkout):
        done = self.run(checkout, MMELA_MMCV='full')
        self.check_error(done, "'full'", 'lite and compiled')


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
        assert (mim / 'tools' / 'train.py').is_file()
        if not link:
            names = {path.name for path in mim.rglob('*')}
            assert not {'__pycache__', 'benchmark'} & names
            assert not [name for name in names if name.endswith(('.sh', '.pyc'))]

    @pytest.mark.parametrize('folder', ['.mim', 'a checkout'])
    def test_demo_writes_into_no_package(self, tmp_path, folder):
        (tmp_path / folder / 'tools').mkdir(parents=True)
        path = shutil.copy(ROOT / 'tools' / 'demo.py', tmp_path / folder / 'tools')
        tool = runpy.run_path(path)
        expected = Path() if folder == '.mim' else tmp_path / folder
        assert tool['FOLDER'] == expected
        assert tool['parse_args']([]).work_dir == expected / 'work_dirs' / 'demo'

    def test_index(self):
        index = yaml.safe_load((ROOT / 'model-index.yml').read_text('utf-8'))
        assert index['Import']
        for path in index['Import']:
            assert (ROOT / path).is_file(), path


def test_build_holds_the_whole_package(packaging, tmp_path, monkeypatch):
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
    assert files(tmp_path / 'mmela_light') == files(ROOT / 'mmela_light')
    monkeypatch.setattr(command, 'PACKAGE', tmp_path / 'mmela')
    for tool in TOOLS.values():
        assert tmp_path in find(tool).parents
    # The checkout's own links stay what they are.
    assert before == (mim.is_dir() and [p.is_symlink() for p in sorted(mim.iterdir())])


class TestReadme:
    """The README of a package index, which has none of the files beside it."""

    TEXT = (
        '![A (picture)](docs/a.png)\n'
        '<picture><source media="x" srcset="docs/b_dark.png">'
        '<img width="9" alt="B" src="docs/b.png"></picture>\n'
        '[one](docs/a.md#b), [two](#c), '
        '[three](https://x.org/y)\n<!-- not run: long -->\n'
    )

    def test_with_an_address(self, packaging):
        text = packaging['readme'](self.TEXT, 'https://git.example/me/x', '1.2')
        assert text == (
            '![A (picture)](https://git.example/me/x/raw/v1.2/docs/a.png)\n'
            '![B](https://git.example/me/x/raw/v1.2/docs/b.png)\n'
            '[one](https://git.example/me/x/blob/v1.2/docs/a.md#b), [two](#c), '
            '[three](https://x.org/y)\n'
        )

    def test_without_one(self, packaging):
        text = packaging['readme'](self.TEXT, '', '1.2')
        assert text == '\n\none, [two](#c), [three](https://x.org/y)\n'

    @pytest.mark.parametrize('address', ['', 'https://git.example/me/x'])
    def test_of_this_project(self, packaging, address):
        text = packaging['readme'](
            (ROOT / 'README.md').read_text('utf-8'), address, '1.2'
        )
        places = re.findall(r'\]\(([^)]+)\)|(?:src|srcset|href)="([^"]+)"', text)
        assert places
        for place in map(''.join, places):
            assert place.startswith(('https://', '#')), place


@pytest.fixture(scope='module')
def distribution(tmp_path_factory):
    folder = tmp_path_factory.mktemp('metadata')
    env = dict(os.environ, MMELA_REPOSITORY='https://git.example/me/mmela/')
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', folder],
        cwd=ROOT,
        check=True,
        env=env,
    )
    return PathDistribution(folder / 'mmela.egg-info')


def test_metadata(distribution):
    metadata = distribution.metadata
    assert (metadata['License-Expression'] or metadata['License']) == 'Apache-2.0'
    links = dict(x.split(', ') for x in metadata.get_all('Project-URL'))
    assert links['Source'] == 'https://git.example/me/mmela'
    for place in ('docs/index.md', 'CHANGELOG.md'):
        (link,) = [x for x in links.values() if x.endswith(place)]
        assert (ROOT / place).is_file()
    page = (ROOT / 'docs' / 'stacks.md').read_text('utf-8')
    for classifier in metadata.get_all('Classifier'):
        version = classifier.rpartition(' :: ')[2]
        if re.fullmatch(r'3\.\d+', version):
            assert f'| {version} |' in page, 'a version that docs/stacks.md lacks'


def test_extras(distribution):
    """Each beside what it brings; none but `dev` brings what the tests need."""
    extras = {name: set() for name in distribution.metadata.get_all('Provides-Extra')}
    for requirement in map(Requirement, distribution.requires):
        for extra in extras:
            if requirement.marker and requirement.marker.evaluate({'extra': extra}):
                extras[extra].add(requirement.name)
    assert extras['export'] == {'onnx', 'onnxruntime', 'onnxscript'}
    assert {'pytest', 'hypothesis'} <= extras['dev']
    assert all('pytest' not in extras[name] for name in set(extras) - {'dev'})
    assert extras['all'] >= extras['export'] | extras['hub'] | extras['cam']
    page = (ROOT / 'docs' / 'get_started.md').read_text('utf-8')
    rows = [line.split(' | ')[0] for line in page.splitlines() if line[:3] == '| `']
    assert set(re.findall(r'`(\w+)`', ' '.join(rows))) == set(extras)


def test_changelog_and_citation_have_the_version(packaging):
    version = packaging['VERSION']['__version__']
    heading = re.search(
        r'^## \[(.+)\] - (.+)$', (ROOT / 'CHANGELOG.md').read_text(), re.M
    )
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text('utf-8'))
    assert heading.groups() == (version, str(citation['date-released']))
    assert citation['version'] == version


def test_source_archive_has_no_tests(tmp_path):
    """They run commands of the documentation, which only a checkout has."""
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path]
        + ['sdist', '-d', tmp_path],
        cwd=ROOT,
        check=True,
    )
    (archive,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        names = [name.partition('/')[2] for name in tar.getnames()]
    assert not [x for x in names if x.startswith('tests') or x.endswith('.sh')]
    needed = ['setup.py', 'README.md', 'LICENSE', 'model-index.yml', 'mmela/version.py']
    needed += TOOLS.values()
    needed += [
        path.relative_to(ROOT).as_posix() for path in ROOT.glob('requirements/*')
    ]
    assert set(needed) <= set(names)
