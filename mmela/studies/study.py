"""Read and check a study file."""

import inspect
import json
import re
from argparse import ArgumentParser
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence, Tuple, Union

import yaml
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from ..command_line import one_line

STUDY: Dict[str, type] = {
    'name': str,
    'title': str,
    'text': str,
    'conclusion': str,
    'metric': str,
    'seeds': list,
    'prepare': list,
    'options': dict,
    'variants': dict,
    'compare': list,
}
VARIANT: Dict[str, type] = {
    'config': str,
    'label': str,
    'options': dict,
    'start': dict,
    'hidden': bool,
    'paper': float,
}
START: Dict[str, type] = {'variant': str, 'checkpoint': str, 'how': str}
# Settings that differ between runs of the same training
_NOT_COMPARED = ('work_dir', 'load_from', 'resume', 'launcher')


@dataclass(frozen=True)
class Start:
    """The run of the same seed that another run starts from.

    Attributes:
        variant (str): Its variant.
        checkpoint (str): File name of its checkpoint.
        how (str): ``'resume'`` continues with epoch, optimizer and logs;
            ``'load'`` only loads the weights.
    """

    variant: str
    checkpoint: str
    how: Literal['resume', 'load']


@dataclass(frozen=True)
class Variant:
    """A row of the study's table.

    Attributes:
        name (str): Name of the variant and of its folder.
        label (str): Name on the page.
        config (Path): The config.
        options (tuple[str]): Changes to the config, each ``KEY=VALUE``.
        start (Start | None): The run that its runs start from; None to start as the
            config says.
        hidden (bool): Whether it only serves as a start of others.
        paper (float | None): The published number.
        settings (dict): The config with its changes, as plain values.
        unit (str): Unit of its length, ``'epoch'`` or ``'iter'``.
        length (int): Epochs or iterations.
    """

    name: str
    label: str
    config: Path
    options: Tuple[str, ...]
    start: Optional[Start]
    hidden: bool
    paper: Optional[float]
    settings: dict
    unit: str
    length: int


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes:
        path (Path): The file.
        name (str): Name of the folder of its runs and of its page.
        title (str): Title of the page.
        text (str): The question and its background.
        conclusion (str): The conclusion, written by hand.
        metric (str): Name of the validation metric to compare.
        seeds (tuple[int]): Seeds of each variant.
        prepare (tuple[str]): Preparation commands.
        variants (dict[str, Variant]): The variants by name, in order.
        compare (tuple[tuple[str, str]]): Pairs of variants to compare.
    """

    path: Path
    name: str
    title: str
    text: str
    conclusion: str
    metric: str
    seeds: Tuple[int, ...]
    prepare: Tuple[str, ...]
    variants: Dict[str, Variant]
    compare: Tuple[Tuple[str, str], ...]


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, for which yaml silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise ValueError(
                    f'the mapping that starts in line {line} has the key {key!r} twice'
                )
        return super().construct_mapping(node, deep)


def read_study(
    path: Union[str, Path], overrides: Optional[Dict[str, Any]] = None
) -> Study:
    """Read and check a study file and its configs.

    Args:
        path (str | Path): The file.
        overrides (dict, optional): Changes to all configs, from ``--cfg-options``.
            Defaults to None.

    Returns:
        Study: The study.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file or a config is invalid.
    """
    path = Path(path)
    try:
        return _study(path, overrides or {})
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f'{path}: {one_line(error)}') from error


def _study(path: Path, overrides: Dict[str, Any]) -> Study:
    content = yaml.load(path.read_text('utf-8'), _Loader)
    needed = ('name', 'title', 'metric', 'seeds', 'variants')
    content = _fields('the study', content, STUDY, needed)
    _file_name('name', content['name'])
    seeds = content['seeds']
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f'seeds={seeds} is not a list of integers >= 0')
    if len(set(seeds)) < len(seeds):
        raise ValueError(f'seeds={seeds} has a seed twice')
    prepare = content.get('prepare', [])
    for command in prepare:
        if not isinstance(command, str):
            raise ValueError(f'prepare has {command!r}, which is not a string')
    if not content['variants']:
        raise ValueError('variants is empty')
    common = content.get('options', {})
    loaded: Dict[Path, Config] = {}  # variants may share a config
    variants = {}
    for key, value in content['variants'].items():
        name = _file_name('variants', key)
        variants[key] = _variant(name, value, path.parent, common, overrides, loaded)
    for variant in variants.values():
        _check_start(variant, variants)
    compare = content.get('compare', [])
    shown = [v.name for v in variants.values() if not v.hidden]
    for pair in compare:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f'compare has {pair!r}, which is not a pair of variants')
        for key in pair:
            if key not in shown:
                raise ValueError(
                    f'compare names {key!r}, which is not a visible variant; allowed '
                    f'are {", ".join(shown)}'
                )
    return Study(
        path,
        content['name'],
        content['title'],
        content.get('text', ''),
        content.get('conclusion', ''),
        content['metric'],
        tuple(seeds),
        tuple(prepare),
        variants,
        tuple((a, b) for a, b in compare),
    )


def _variant(
    name: str,
    data: Any,
    folder: Path,
    common: dict,
    overrides: dict,
    loaded: Dict[Path, Config],
) -> Variant:
    where = f'variant {name}'
    data = _fields(where, data, VARIANT, ('config',))
    path = folder / data['config']
    if not path.is_file():
        raise ValueError(f'{where}: there is no config {path}')
    options: Dict[str, Any] = {'randomness.deterministic': True}
    for changes in (common, data.get('options', {}), overrides):
        options.update(flatten(changes, lists=False))
    if 'randomness.seed' in options:
        raise ValueError(
            f'{where}: remove randomness.seed; the seeds of the study set it'
        )
    texts = tuple(option_texts(options))
    parser = ArgumentParser()
    parser.add_argument('--set', nargs='*', action=DictAction, default={})
    parsed = parser.parse_args(['--set', *texts]).set if texts else {}
    for key, value in options.items():
        read = parsed.get(key)
        # YAML has no tuples, so a string such as '(192,192)' stands for one
        is_tuple = isinstance(read, tuple) and isinstance(value, str)
        if not is_tuple and _plain(read) != _plain(value):
            raise ValueError(
                f'{where}: option {key}={value!r} cannot be given on a command line; '
                'put it into a config'
            )
    try:
        if path not in loaded:
            loaded[path] = Config.fromfile(path)
        cfg = deepcopy(loaded[path])
        _check_keys(cfg, options)
        cfg.merge_from_dict(parsed)
        length = cfg.train_cfg
    except Exception as error:  # a config may raise anything
        raise ValueError(
            f'{where}: {path} cannot be used: {type(error).__name__}: {error}'
        ) from error
    unit = 'epoch' if length and 'max_epochs' in length else 'iter'
    length = (length or {}).get(f'max_{unit}s')
    if type(length) is not int or length < 1:
        raise ValueError(
            f'{where}: train_cfg of {path} has neither max_epochs nor max_iters'
        )
    settings = {k: v for k, v in cfg.to_dict().items() if k not in _NOT_COMPARED}
    start = data.get('start')
    if start is not None:
        start = Start(**_fields(f'{where}: start', start, START, tuple(START)))
        if start.how not in ('resume', 'load'):
            raise ValueError(
                f"{where}: start has how={start.how!r}; allowed are 'resume' and 'load'"
            )
    return Variant(
        name,
        data.get('label', name),
        path,
        texts,
        start,
        data.get('hidden', False),
        data.get('paper'),
        _plain(settings),
        unit,
        length,
    )


def _check_start(variant: Variant, variants: Dict[str, Variant]) -> None:
    """Check that the start of a variant will exist."""
    if variant.start is None:
        return
    where, start, seen = f'variant {variant.name}', variant.start, [variant.name]
    while start is not None:
        if start.variant not in variants:
            raise ValueError(
                f'variant {seen[-1]} starts from {start.variant!r}, which does not '
                f'exist; the variants are {", ".join(variants)}'
            )
        seen.append(start.variant)
        if start.variant in seen[:-1]:
            raise ValueError(f'variants start from each other: {" <- ".join(seen)}')
        start = variants[start.variant].start
    start = variant.start
    if Path(start.checkpoint).name != start.checkpoint:
        raise ValueError(
            f'{where}: start has checkpoint={start.checkpoint!r}, which must be a file '
            'name without a folder'
        )
    origin = variants[start.variant]
    hook = (origin.settings.get('default_hooks') or {}).get('checkpoint') or {}
    numbered = re.fullmatch(r'(epoch|iter)_(\d+)\.pth', start.checkpoint)
    unit = 'epoch' if hook.get('by_epoch', True) else 'iter'
    if numbered and unit == origin.unit:
        steps = list(range(hook.get('interval', 1), origin.length + 1)) or [0]
        steps = [s for s in steps if s % hook.get('interval', 1) == 0]
        if hook.get('save_last', True) and origin.length not in steps:
            steps.append(origin.length)
        keep = hook.get('max_keep_ckpts', -1)
        kept = [f'{unit}_{step}.pth' for step in (steps[-keep:] if keep > 0 else steps)]
        if start.checkpoint not in kept:
            raise ValueError(
                f'{where} starts from {start.checkpoint} of {origin.name}, which only '
                f'keeps {", ".join(kept)}; change interval or max_keep_ckpts of '
                'default_hooks.checkpoint'
            )


def _fields(where: str, data: Any, kinds: Dict[str, type], needed: Sequence) -> dict:
    """Check the keys of a mapping and the types of its values."""
    if not isinstance(data, dict):
        raise ValueError(f'{where} is {data!r:.99}, but must be a mapping')
    for key, value in data.items():
        if key not in kinds:
            raise ValueError(
                f'{where} has the unknown key {key!r}; allowed are {", ".join(kinds)}'
            )
        kind = (int, float) if kinds[key] is float else kinds[key]
        if not isinstance(value, kind) or isinstance(value, bool) > (kind is bool):
            name = kinds[key].__name__
            raise ValueError(
                f'{where} has {key}={value!r:.99}, which must be of type {name}'
            )
    for key in needed:
        if key not in data:
            raise ValueError(f'{where} has no {key}')
    return dict(data)


def _file_name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.\-]*', name):
        raise ValueError(
            f'{where} has the name {name!r}; allowed are letters, digits, dots, '
            'underscores and hyphens'
        )
    return name


def option_texts(options: Dict[str, Any]) -> List[str]:
    """Format options for ``--cfg-options``, each as ``KEY=VALUE``."""
    return [
        f'{key}={_text(value)}' for key, value in flatten(options, lists=False).items()
    ]


def _text(value: Any) -> str:
    """Format a value for ``--cfg-options``."""
    if isinstance(value, (list, tuple)):
        return '[' + ','.join(map(_text, value)) + ']'
    return str(value)


def _plain(value: Any) -> Any:
    """Convert a value by a round trip through JSON."""
    return json.loads(json.dumps(value, default=repr, sort_keys=True))


def _check_keys(cfg: Config, options: Dict[str, Any]) -> None:
    """Reject options that would add a new branch to a config.

    mmengine adds unknown keys, so after a typo the unchanged config would be trained.
    Only the last part of a key may be new.
    """
    for key in options:
        first, *rest = key.split('.')
        if first in cfg and rest:
            node: Any = cfg[first]
            for part in rest[:-1]:
                try:
                    node = node[int(part) if isinstance(node, (list, tuple)) else part]
                except (IndexError, KeyError, TypeError, ValueError):
                    raise ValueError(
                        f'option {key}: the config has no {part!r} there'
                    ) from None
        elif first not in cfg and first not in inspect.signature(Runner).parameters:
            raise ValueError(f'option {key}: the config has no {first!r}')


def flatten(settings: Any, prefix: str = '', lists: bool = True) -> Dict[str, Any]:
    """Flatten nested plain values to dotted keys.

    Args:
        settings (Any): Dicts, lists and plain values.
        prefix (str): Prefix of the keys. Defaults to ''.
        lists (bool): Whether to flatten lists, too. Defaults to True.

    Returns:
        dict[str, Any]: The leaves; an empty dict or list is a leaf.
    """
    items: List[Tuple[Any, Any]] = []
    if isinstance(settings, dict):
        items = list(settings.items())
    elif isinstance(settings, list) and lists:
        items = list(enumerate(settings))
    if not items:
        return {prefix[:-1]: settings} if prefix else {}
    leaves: Dict[str, Any] = {}
    for key, value in items:
        leaves.update(flatten(value, f'{prefix}{key}.', lists))
    return leaves
