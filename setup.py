"""Packaging of mmela.

The OpenMMLab packages are not among the requirements, but in extras: forks
with the same import names must keep working, so ``import mmela`` checks what it
finds. docs/stacks.md says what an extra installs where a fork is.
"""

import os
import re
import runpy
import shutil
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
# Whoever publishes a release says where the repository is
REPOSITORY = os.environ.get('MMELA_REPOSITORY', '').rstrip('/')
# Those that mmela was run on, see docs/stacks.md
PYTHONS = ('3.8', '3.11', '3.12')
# What `mim` looks for in mmela/.mim of the installed package.
MIM = ('configs', 'tools', 'model-index.yml')
VERSION = runpy.run_path(str(ROOT / 'mmela' / 'version.py'))


def requirements(name):
    """Lines of requirements/<name>.txt without comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text('utf-8')
    lines = (line.partition('#')[0].strip() for line in lines.splitlines())
    return [line for line in lines if line]


def providers(paths):
    """Distributions by the import names of the toolboxes that they provide.

    Args:
        paths (Iterable[str]): Folders that packages are installed in.

    Returns:
        dict[str, set[str]]: Names of distributions.
    """
    found = {name: set() for name in VERSION['DISTRIBUTIONS']}
    for distribution in distributions(path=list(dict.fromkeys(paths))):
        text = distribution.read_text('top_level.txt')
        if text is None:  # of another build tool than setuptools
            text = '\n'.join(f.parts[0] for f in distribution.files or [])
        for name in found.keys() & set(text.split()):
            found[name].add(distribution.metadata['Name'])
    return found


def toolboxes(*names, fork=False, installed=None):
    """Requirements for mmengine, mmcv and toolboxes, but for what is there.

    The files of a fork must not be overwritten by the release it is a fork of,
    nor the other way round. So nothing is required under an import name that
    another distribution provides, and nothing at all where mmengine is another,
    as each toolbox would bring its own.

    Args:
        *names (str): Import names of toolboxes.
        fork (bool): Take the community's forks. Defaults to OpenMMLab's.
        installed (dict[str, set[str]], optional): As of :func:`providers`.
            Defaults to those of the environment that pip installs into, which
            its isolated builds can see as well.

    Returns:
        list[str]: Requirements.
    """
    if installed is None:
        installed = providers(sysconfig.get_path(p) for p in ('purelib', 'platlib'))
    distribution = {
        name: found[-1 if fork else 0]
        for name, found in VERSION['DISTRIBUTIONS'].items()
    }
    taken = {name for name in distribution if installed[name] - {distribution[name]}}
    if 'mmengine' in taken:
        return []
    ranges = dict(VERSION['SUPPORTED'])
    if not fork:  # what mmdet 3.3.0 and mmsegmentation 1.2.2 accept
        ranges['mmcv'] = (ranges['mmcv'][0], '2.2.0')
    return [
        '{}>={},<{}'.format(distribution[name], *ranges[name])
        for name in ('mmengine', 'mmcv', *names)
        if name not in taken
    ]


def readme(text, address, version):
    """README.md for a page that has none of the files beside it.

    Args:
        text (str): The README, whose links are relative.
        address (str): Address of the repository, to which links then lead. Without
            one, pictures are left out and links are plain text.
        version (str): Version, whose tag ``v<version>`` has the files.

    Returns:
        str: Markdown without relative links.
    """

    def link(match):
        picture, words, place = match.groups()
        if re.match('[a-z]+:|#', place):
            return match.group()
        if address:
            kind = 'raw' if picture else 'blob'
            return f'{picture}[{words}]({address}/{kind}/v{version}/{place})'
        return '' if picture else words

    # A page of an index has one theme.
    text = re.sub(
        r'<picture>.*?<img [^>]*alt="([^"]*)" src="([^"]*)"></picture>',
        r'![\1](\2)',
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r'(!?)\[([^]]*)\]\(([^)\s]+)\)', link, text)
    return re.sub(r'<!--.*?-->\n?', '', text, flags=re.DOTALL)


def urls(address):
    """Links of the package: of the repository, if its address is known, and papers."""
    papers = {
        'Paper (ELA)': 'https://arxiv.org/abs/2503.06473',
        'Paper (MRLA)': 'https://arxiv.org/abs/2302.03985',
    }
    if not address:
        return papers
    return {
        'Source': address,
        'Documentation': f'{address}/blob/v{VERSION["__version__"]}/docs/index.md',
        'Changelog': f'{address}/blob/v{VERSION["__version__"]}/CHANGELOG.md',
        'Issues': f'{address}/issues',
        **papers,
    }


def remove(path):
    """Remove a file, a link or a folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def add_mim(package, link):
    """Put what mim needs into ``package``/.mim.

    Args:
        package (Path): Folder of the package.
        link (bool): Link to the checkout, so that edits are seen at once,
            instead of copying.
    """
    target = Path(package) / '.mim'
    target.mkdir(parents=True, exist_ok=True)
    for name in MIM:
        remove(target / name)
        if link:
            try:
                source = os.path.relpath(ROOT / name, target.resolve())
                (target / name).symlink_to(source)
                continue
            except OSError:  # Windows without the right to make links
                pass
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                target / name,
                # Scripts and benchmarks are for a checkout
                ignore=shutil.ignore_patterns(
                    '__pycache__', '*.py[cod]', '*.sh', 'benchmark'
                ),
            )
        else:
            shutil.copy2(ROOT / name, target / name)


class BuildPy(build_py):
    """Copies go into the build folder only, so the checkout stays clean."""

    editable_mode = False  # setuptools >= 64 sets it for PEP 660 installs

    def run(self):
        super().run()
        if self.editable_mode:
            add_mim(ROOT / 'mmela', link=True)
        else:
            add_mim(Path(self.build_lib) / 'mmela', link=False)


class Develop(develop):
    """The editable install of pip and setuptools from before PEP 660."""

    def run(self):
        add_mim(ROOT / 'mmela', link=True)
        super().run()


if __name__ == '__main__':
    torchvision = ['torchvision', 'setuptools<81']  # what mmengine imports of it
    segmentation = ['ftfy', 'regex']  # missing among mmsegmentation's own
    extras = {
        'mmdet': toolboxes('mmdet') + torchvision,
        'mmpretrain': toolboxes('mmpretrain') + torchvision,
        'mmseg': toolboxes('mmseg') + torchvision + segmentation,
        'cam': ['grad-cam>=1.5,<2'],
        'timm': ['timm>=0.9'],  # ECA and CBAM
        'hub': ['huggingface_hub>=0.25', 'safetensors>=0.4,<1'],
        'export': ['onnx>=1.16,<2', 'onnxruntime>=1.18,<2', 'onnxscript>=0.1,<1'],
    }
    extras['all'] = sorted(set(sum(extras.values(), [])))
    extras['dev'] = requirements('tests')
    extras['study'] = ['ray>=2.9,<3']  # large, and for tools/study.py --address alone
    # An SPDX expression since setuptools 77, which Python 3.8 does not have
    modern = int(setuptools.__version__.partition('.')[0]) >= 77
    license_field = 'license_expression' if modern else 'license'
    forks = toolboxes('mmdet', 'mmpretrain', 'mmseg', fork=True)
    extras['onedl'] = forks + torchvision + segmentation
    setup(
        name='mmela',
        version=VERSION['__version__'],
        description='Layer attention with pruning of redundant retrievals '
        'for OpenMMLab toolboxes',
        long_description=readme(
            (ROOT / 'README.md').read_text('utf-8'), REPOSITORY, VERSION['__version__']
        ),
        long_description_content_type='text/markdown',
        author='The mmela authors',
        project_urls=urls(REPOSITORY),
        **{license_field: 'Apache-2.0'},
        keywords='computer vision, object detection, layer attention, pruning',
        packages=find_packages(include=['mmela', 'mmela.*', 'mmela_light']),
        package_data={'mmela.templates': ['*.html', '*.md']},
        python_requires='>=3.8',
        install_requires=[
            'click>=8,<9',
            'filelock',
            'jinja2',
            'msgspec>=0.18,<1',
            'numpy',
            'scipy',
            'torch>={},<{}'.format(*VERSION['SUPPORTED']['torch']),
        ],
        extras_require=extras,
        entry_points={
            'console_scripts': ['mmela = mmela_light.command:main'],
            # Called by `import torch`: mmela_light/operators.py says what for
            'torch.backends': ['mmela = mmela_light.operators:provide_operators'],
        },
        cmdclass={'build_py': BuildPy, 'develop': Develop},
        zip_safe=False,
        classifiers=[
            'Development Status :: 4 - Beta',
            'Intended Audience :: Science/Research',
            'Operating System :: OS Independent',
            'Programming Language :: Python :: 3',
            'Programming Language :: Python :: 3 :: Only',
            *(f'Programming Language :: Python :: {version}' for version in PYTHONS),
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
    )
