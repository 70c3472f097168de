"""List the mmcv operators that mmdet's configs use, and which ones mmela provides.

A config names classes by type. The tool follows names in the code of these classes to
functions and classes of mmcv and mmdet, down to functions of mmcv's compiled module.
It builds and runs nothing. So an operator counts if a model has code that calls it,
even if a setting disables the call.

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
# mmdet only uses it in isinstance checks; a config that builds it names it
ASKED_FOR = (mmcv.ops.CARAFEPack,)


def types_in(value: object) -> Iterator[str]:
    """Iterate over type names in nested dicts and sequences of a config."""
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
    """Find the functions of the compiled module that a type's code uses.

    Args:
        name (str): A type in a config: a registered one, or a name in mmcv.ops such as
            ``soft_nms``, which mmdet looks up there.

    Returns:
        frozenset[str]: The names of the functions.
    """
    target = getattr(mmcv.ops, name, None)
    for registry in (MODELS, TASK_UTILS):
        for scope in ('mmdet.', ''):
            target = target or registry.get(scope + name)
    operators: Set[str] = set()
    _follow(target, operators, set())
    return frozenset(operators)


def _follow(value: object, operators: Set[str], seen: Set[int]) -> None:
    """Add the operators that the code of a function or class uses."""
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
    """Iterate over global names and attributes in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


@lru_cache(maxsize=None)
def _extension_names(module: str) -> Set[str]:
    """Operators that a module of mmcv.ops loads from the compiled module."""
    source = Path(import_module(module).__file__).read_text('utf-8')
    calls = re.findall(r"load_ext\(\s*'_ext',\s*\[(.*?)\]", source, re.DOTALL)
    return set(re.findall(r"'(\w+)'", ' '.join(calls)))


def operators_of_configs(folder: Path) -> Dict[str, Set[str]]:
    """Find the operators of each config.

    Args:
        folder (Path): mmdet's configs.

    Returns:
        dict[str, set[str]]: Operators that the model of each config may call, by path
        relative to the folder. Configs in ``_base_`` are skipped, since they are only
        parts.
    """
    paths = [p for p in sorted(folder.rglob('*.py')) if '_base_' not in p.parts]
    progress = ProgressBar(len(paths), file=sys.stderr)
    operators = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            config = Config.fromfile(path, import_custom_modules=False)
        except Exception as error:  # a config is code and may raise anything
            print(f'\n{name} cannot be read: {error!r}', file=sys.stderr)
        else:
            model = set(types_in(config.get('model')))
            operators[name] = {op for kind in model for op in operators_of_type(kind)}
        progress.update()
    return operators


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
        raise SystemExit(f'error: there is no folder {folder}')
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
    print(f'\n{len(whole)} of {len(by_config)} configs use only provided operators.')
    for config in sorted(set(by_config) - set(whole)):
        print(f'{config}: {", ".join(sorted(by_config[config] - covered))}')


if __name__ == '__main__':
    main()
