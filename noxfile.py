"""Tests on every stack that mmela supports; docs/stacks.md has the results.

Each session makes an environment of its own, of wheels alone but for `compiled`:

  nox -s tests            # the pinned stack, with all tests
  nox -s oldest           # the oldest supported one, with the core of the tests
  nox -s oldest -- -x     # arguments go to pytest
"""

import nox

nox.options.sessions = ['lint', 'tests']
nox.options.default_venv_backend = 'uv|virtualenv'
nox.options.reuse_existing_virtualenvs = True

# What needs nothing but torch, mmengine, mmcv and a toolbox
CORE = (
    'tests/test_layers',
    'tests/test_ops',
    'tests/test_pruning',
    'tests/test_registry.py',
    'tests/test_compat',
    'tests/test_convert',
    'tests/test_models/test_backbones',
    'tests/test_hooks/test_layer_attention_pruning_hook.py',
)
SETUP = ('-r', 'requirements/setup.txt', '-r', 'requirements/tests.txt')
DOCS = ('-r', 'requirements/docs.txt')
# Torch is given by name so that a local or newer build does not take its place.
OLDEST = (
    'torch==2.0.0',
    'torchvision==0.15.1',
    'mmengine==0.10.0',
    'mmcv-lite==2.0.0',
    'mmdet==3.0.0',
    'mmpretrain==1.0.0',
    'mmsegmentation==1.0.0',
    'ftfy',
    'regex',
    'numpy<2',
    'setuptools<81',
    'pytest>=7.4,<10',
    'pytest-xdist>=3.5,<4',
    'hypothesis>=6.100,<7',
    'onnx',
    'onnxruntime',
    'tensorboard',
)


def run(session, *paths):
    """Install mmela itself and run tests, all of them if no path is given."""
    session.install('--no-deps', '-e', '.')
    session.run('python', '-m', 'mmela', 'env')
    session.run(
        *('python', '-m', 'pytest', '-q', '-rs', '-n', 'auto', '--dist', 'loadgroup'),
        *(session.posargs or paths),
        env=dict(OMP_NUM_THREADS='1'),
    )


@nox.session(venv_backend='none')
def lint(session):
    """Style and types, with the tools of the environment that runs nox."""
    session.run('bash', 'tools/lint.sh', external=True)


@nox.session(python=['3.10', '3.11', '3.12', '3.13'])
def tests(session):
    """The pinned stack, over torchvision's operators."""
    session.install(*SETUP, *DOCS)
    run(session)


@nox.session
def docs(session):
    """The site, in docs/_build/html."""
    session.install(*SETUP, *DOCS)
    session.install('--no-deps', '-e', '.')
    session.run('sphinx-build', '-W', '--keep-going', 'docs', 'docs/_build/html')


@nox.session
def long(session):
    """Commands of the pages that take minutes or hours, such as the demo."""
    session.install(*SETUP)
    session.install('--no-deps', '-e', '.')
    session.run(
        *('python', '-m', 'pytest', '-q', '-rs', 'tests/test_docs_commands.py'),
        *(session.posargs or ('-k', 'long')),
        env=dict(MMELA_LONG='1'),
    )


@nox.session(python=['3.8', '3.9'])
def oldest(session):
    """The oldest releases that are supported."""
    session.install(*OLDEST)
    run(session, *CORE)


@nox.session
def compiled(session):
    """The pinned stack with mmcv's own operators; needs a C++ compiler."""
    session.install(*SETUP, '-r', 'requirements/build.txt', 'pip')
    prefix = session.run('python', '-c', 'import sys; print(sys.prefix)', silent=True)
    wheel = session.run(
        'bash',
        'tools/compile_mmcv.sh',
        f'{prefix.strip()}/bin/python',
        external=True,
        silent=True,
    )
    session.run('python', '-m', 'pip', 'uninstall', '-y', 'mmcv-lite', external=True)
    session.install('--no-deps', wheel.strip().splitlines()[-1])
    run(session)


@nox.session
def onedl(session):
    """The community's forks."""
    session.install(
        *('torch==2.12.0', 'torchvision==0.27.0', 'setuptools>=64,<81'),
        *('onedl-mmengine==0.10.12', 'onedl-mmcv==2.3.6', 'onedl-mmdetection==3.5.1'),
        *('onedl-mmpretrain==1.3.6', 'onedl-mmsegmentation==1.4.2', 'ftfy', 'regex'),
        *('-r', 'requirements/tests.txt'),
    )
    run(session, *CORE)


@nox.session
@nox.parametrize('version', ['1.26', '2'])
def numpy(session, version):
    """The pinned stack with an old and the newest numpy."""
    session.install(*SETUP, f'numpy=={version}.*')
    run(session, *CORE)
