"""The API reference: all that is public, each with what a reader needs."""

import importlib
import inspect
import pkgutil
import re

import pytest

import mmela
from mmela.pruning import PRUNING_POLICIES
from tests.helpers.documents import ROOT

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

PAGES = sorted((ROOT / 'docs' / 'api').glob('*.md'))
MODULES = [
    name
    for page in PAGES
    for name in re.findall(r'automodule:: ([\w.]+)', page.read_text('utf-8'))
]
# Modules that are not public, as nobody outside of mmela has any use for them
INTERNAL = (
    'mmela.__main__',
    'mmela.arguments',
    'mmela.analysis.',  # but for what its package exports
    'mmela.benchmark',
    'mmela.command_line',
    'mmela.compat.forks',
    'mmela.compat.mmcv_ext',  # operators of mmcv, in its place
    'mmela.attach.checkpoints',
    'mmela.attach.inputs',
    'mmela.attach.wiring',  # its package exports what is public
    'mmela.convert.published_names',  # tables
    'mmela.engine.last_checkpoint',
    'mmela.engine.tables',
    'mmela.files',
    'mmela.hooks.',
    'mmela.layers.cells',
    'mmela.models.heads',
    'mmela.pruning.registry',  # one name, which its package exports
    'mmela.tools',
    'mmela.studies.child',
    'mmela.utils',
    'mmela.visualization',
    'mmela.version',
)
# Sections of docstrings that Sphinx's napoleon takes for such
ARGS, RETURNS, RAISES = 'Args:', 'Returns:', 'Raises:'


def exported(module):
    """Public objects of a module: of ``__all__``, or defined there."""
    names = getattr(module, '__all__', None)
    for name in names or vars(module):
        value = getattr(module, name)
        own = names or getattr(value, '__module__', None) == module.__name__
        if own and not name.startswith('_') and callable(value):
            if value.__module__.startswith('mmela.'):
                yield f'{module.__name__}.{name}', value


def public():
    """Public classes and functions, and methods that are defined in mmela."""
    for module in map(importlib.import_module, MODULES):
        for name, value in exported(module):
            yield name, value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    if not key.startswith('_') and inspect.isfunction(member):
                        yield f'{name}.{key}', member


OBJECTS = dict(public())


def test_every_module_is_in_it():
    """Or is named as internal."""
    packages = {name.rpartition('.')[0] for name in MODULES}
    there = (
        {
            value.__module__
            for module in MODULES
            for _, value in exported(importlib.import_module(module))
        }
        | set(MODULES)
        | packages
    )
    for info in pkgutil.walk_packages(mmela.__path__, 'mmela.'):
        internal = info.name.startswith(INTERNAL) or '._' in info.name
        if not internal and not info.ispkg:
            assert info.name in there, f'{info.name} is in no page of docs/api'


def own_parameters(function):
    found = list(inspect.signature(function).parameters.values())
    return [p for p in found if p.name not in ('self', 'cls', 'ctx')]


def inherits_docs(name, function):
    """Whether a method says what the one says that it overrides."""
    owner, _, key = name.rpartition('.')
    bases = inspect.getmro(OBJECTS[owner])[1:] if owner in OBJECTS else ()
    return any(getattr(vars(base).get(key), '__doc__', None) for base in bases)


def faults(name, value):
    """What the docstring of an object lacks."""
    text = value.__doc__ or ''
    if inspect.isfunction(value) and inherits_docs(name, value):
        return
    if not text.strip():
        yield 'has no docstring'
    if inspect.isclass(value):
        takes = '__init__' in vars(value) and own_parameters(value.__init__)
        kinds = {p.kind for p in own_parameters(value.__init__)} if takes else set()
        if kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            if ARGS not in text and 'Attributes:' not in text:
                yield f'has no {ARGS}'
        return
    if len(own_parameters(value)) > 1:
        for parameter in own_parameters(value):
            if not re.search(rf'^ *\*{{0,2}}{parameter.name}\b.*:', text, re.M):
                yield f'does not say what {parameter.name} is'
    source = inspect.getsource(value)
    nested = 'def ' in source.partition(':\n')[2]
    if re.search(r'^\s+return \S', source, re.M) and not nested:
        if RETURNS not in text and len(text.splitlines()) > 1:
            yield f'has no {RETURNS}'
    if re.search(r'^\s+raise (?!AttributeError|NotImplementedError\n)\w', source, re.M):
        if RAISES not in text:
            yield f'has no {RAISES}'


def test_docstrings():
    """Arguments, results and errors are said wherever there are any."""
    found = [
        f'{n} {fault}' for n, value in OBJECTS.items() for fault in faults(n, value)
    ]
    assert len(OBJECTS) > 200
    assert not found, '\n'.join(found)


def test_sources():
    """Attentions and policies name the paper and where in it they stand."""
    named = [*mmela.LAYER_ATTENTIONS.module_dict.values()]
    named += PRUNING_POLICIES.module_dict.values()
    place = re.compile(
        r'\b(?:eq\.|section|sections|table|algorithm|appendix|arXiv:)', re.I
    )
    without = [
        cls.__name__
        for cls in named
        if inspect.isclass(cls)
        and cls.__module__.startswith('mmela.')
        and not place.search(cls.__doc__ or '')
    ]
    assert sorted(without) == ['Plugin']  # it brings what others have


def test_a_fault_is_seen():
    def poor(one, two):
        """Say nothing of them."""
        if one:
            raise ValueError(two)
        return one

    assert len(list(faults('poor', poor))) == 3
