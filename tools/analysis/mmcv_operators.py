"""List the mmcv operators that mmdet's own configs use, and which are covered.

A config names classes by type. From the code of those that are in mmcv and
mmdet, this follows names to functions and classes of both, down to functions
of mmcv's compiled module. Nothing is built or run. So an operator is counted
where a model has code that calls it, also if a setting keeps it from doing so.

Example:
  python tools/analysis/mmcv_operators.py
"""

import argparse
import re
import sys
import types
from collections import defaultdict
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Iterator, Set

import mmcv.ops
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS
from mmengine.utils import ProgressBar

import mmela  # noqa: F401
from mmela.compat import mmcv_ext

PACKAGES = ('mmcv', 'mmdet')
# mmdet's code only asks whether a layer is one; those that have one say so.
ASKED_FOR = (mmcv.ops.CARAFEPack,)


def types_in(value: object) -> Iterator[str]:
    """All names of types in nested dicts and sequences of a config."""
    if isinstance(value, dict):
        name = value.get('type')
        if name is not None:
            yield name if isinstance(name, str) else name.__name__
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from types_in(item)


@lru_cache(maxsize=None)
def operators_of_type(name: str) -> frozenset:
    """Functions of the compiled module that a type's code leads to.

    Args:
        name (str): A type in a config: of a registry, or a name in mmcv.ops,
            such as ``soft_nms``, which mmdet looks up there.

    Returns:
        frozenset[str]: Their names.
    """
    found = getattr(mmcv.ops, name, None)
    for registry in (MODELS, TASK_UTILS):
        for scope in ('mmdet.', ''):
            found = found or registry.get(scope + name)
    operators: Set[str] = set()
    _follow(found, operators, set())
    return frozenset(operators)


def _follow(value: object, operators: Set[str], seen: Set[int]) -> None:
    """Add the operators that a function's or class's code leads to."""
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        value = value.__self__  # apply of an autograd function: its class
    module = getattr(value, '__module__', None) or ''
    if seen and value in ASKED_FOR:
        return
    if id(value) in seen or module.split('.')[0] not in PACKAGES:
        return
    seen.add(id(value))
    if isinstance(value, type):
        for base in value.__mro__:
            _follow(base, operators, seen)
        for member in vars(value).values():
            member = getattr(member, '__func__', member)  # static, class method
            member = getattr(member, 'fget', member)
            if isinstance(member, types.FunctionType):
                _follow(member, operators, seen)
    elif isinstance(value, types.FunctionType):
        value = getattr(value, '__wrapped__', value)
        names = set(_names(value.__code__))
        if 'ext_module' in names:
            operators |= names & _extension_names(value.__module__)
        for name in names:
            _follow(value.__globals__.get(name), operators, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names and attributes in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


@lru_cache(maxsize=None)
def _extension_names(module: str) -> Set[str]:
    """Operators that a module of mmcv.ops asks the compiled module for."""
    source = Path(import_module(module).__file__).read_text('utf-8')
    calls = re.findall(r"load_ext\(\s*'_ext',\s*\[(.*?)\]", source, re.DOTALL)
    return set(re.findall(r"'(\w+)'", ' '.join(calls)))


def operators_of_configs(folder: Path) -> Dict[str, Set[str]]:
    """Operators by config.

    Args:
        folder (Path): mmdet's configs.

    Returns:
        dict[str, set[str]]: Operators that each config's model may call, by
        path relative to the folder. Configs in ``_base_`` are parts only.
    """
    paths = [p for p in sorted(folder.rglob('*.py')) if '_base_' not in p.parts]
    progress = ProgressBar(len(paths), file=sys.stderr)
    found = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            config = Config.fromfile(path, import_custom_modules=False)
        except Exception as error:  # a config is code: it may raise anything
            print(f'\n{name} cannot be read: {error!r}', file=sys.stderr)
        else:
            model = set(types_in(config.get('model')))
            found[name] = {op for kind in model for op in operators_of_type(kind)}
        progress.update()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'configs', nargs='?', type=Path, help="folder of configs (default: mmdet's)"
    )
    folder = parser.parse_args().configs
    if folder is None:
        folder = Path(find_spec('mmdet').origin).parent / '.mim' / 'configs'
    if not folder.is_dir():
        raise SystemExit(f'error: no folder {folder}')
    import_module('mmdet.utils').register_all_modules()
    by_config = operators_of_configs(folder)
    users = defaultdict(list)
    for config, operators in by_config.items():
        for operator in operators:
            users[operator].append(config)
    covered = {name for name in users if name in vars(mmcv_ext)}
    print('| operator | configs | provided |\n| --- | --- | --- |')
    groups = defaultdict(list)  # operators that the same configs use
    for name in sorted(users):
        groups[tuple(users[name]), name in covered].append(f'`{name}`')
    for (configs, yes), names in sorted(groups.items(), key=lambda i: -len(i[0][0])):
        print(f'| {", ".join(names)} | {len(configs)} | {"yes" if yes else "no"} |')
    whole = [config for config, used in by_config.items() if used <= covered]
    print(f'\n{len(whole)} of {len(by_config)} configs use provided operators only.')
    for config in sorted(set(by_config) - set(whole)):
        print(f'{config}: {", ".join(sorted(by_config[config] - covered))}')


if __name__ == '__main__':
    main()
