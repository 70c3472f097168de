"""Packaging of mmela.

The OpenMMLab packages are not among the requirements: forks with the same
import names must keep working, so ``import mmela`` checks what it finds.
"""

import os
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
# What `mim` looks for in mmela/.mim of the installed package.
MIM = ('configs', 'tools', 'model-index.yml')
VERSION = runpy.run_path(str(ROOT / 'mmela' / 'version.py'))


def requirements(name):
    """Lines of requirements/<name>.txt without comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text('utf-8')
    lines = (line.partition('#')[0].strip() for line in lines.splitlines())
    return [line for line in lines if line]


def supported(*names):
    """Requirements that say what mmela/version.py supports."""
    ranges = VERSION['SUPPORTED']
    return ['{}>={},<{}'.format(name, *ranges[name]) for name in names]


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
                ignore=shutil.ignore_patterns('__pycache__', '*.py[cod]'),
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
    extras = {
        # Without mmcv: pip cannot build it unaided, see tools/setup.sh.
        'mmdet': supported('mmengine', 'mmdet'),
        'mmpretrain': supported('mmengine', 'mmpretrain'),
        'mmseg': ['mmsegmentation>=1.0.0,<2.0.0', 'ftfy', 'regex'],
        'cam': ['grad-cam>=1.5,<2'],
        'tests': requirements('tests'),
    }
    extras['all'] = sorted(set(sum(extras.values(), [])))
    setup(
        name='mmela',
        version=VERSION['__version__'],
        description='Layer attention with pruning of redundant retrievals '
        'for OpenMMLab toolboxes',
        long_description=(ROOT / 'README.md').read_text('utf-8'),
        long_description_content_type='text/markdown',
        author='The mmela authors',
        license='Apache-2.0',
        keywords='computer vision, object detection, layer attention, pruning',
        packages=find_packages(include=['mmela', 'mmela.*']),
        python_requires='>=3.8',
        install_requires=['numpy', 'scipy', *supported('torch')],
        extras_require=extras,
        cmdclass={'build_py': BuildPy, 'develop': Develop},
        zip_safe=False,
        classifiers=[
            'Development Status :: 4 - Beta',
            'Intended Audience :: Science/Research',
            'Operating System :: OS Independent',
            'Programming Language :: Python :: 3',
            'Programming Language :: Python :: 3 :: Only',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
    )
