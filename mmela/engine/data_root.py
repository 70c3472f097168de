import json
import os.path as osp
from typing import Any, List, Tuple

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner

SPLITS = ('train', 'val', 'test')


def set_data_root(cfg: Config) -> List[str]:
    """Have the data sets, evaluators and heads of a config follow ``data_root``.

    A config file writes its ``data_root`` into each data set and evaluator as
    it is parsed. So a ``data_root`` given later, by ``--cfg-options`` or as
    ``cfg.data_root = ...``, would change nothing. This makes it count: every
    path in a dataloader or evaluator that is in the file's ``data_root`` moves
    to the config's. Paths that are elsewhere stay.

    Data of other categories than the data sets are for bring theirs: the data
    sets take the classes of the training annotations, and every
    ``num_classes`` of the model that was the number of classes before becomes
    theirs.

    Data to try things on often have no validation images. Where the new place
    lacks the annotations of a validation or test set, but not those of the
    training set, the training images take their place.

    Args:
        cfg (Config): A config read from a file that has a top-level
            ``data_root``, in COCO layout. Changed in place.

    Returns:
        list[str]: What the user should know.

    Raises:
        ValueError: If the config comes from no file or has no ``data_root``;
            or if an annotation file is broken, has no image, the training set
            no object, or the sets have not the same categories. Annotations
            that are missing are left to the data sets.
    """
    if cfg.filename is None or not cfg.get('data_root'):
        raise ValueError(
            'set_data_root needs a config that was read from a '
            f'file and has a data_root, got {cfg.filename} with '
            f'data_root={cfg.get("data_root")!r}'
        )
    # mmengine keeps no record of what an option has replaced.
    old = Config.fromfile(cfg.filename).data_root.rstrip('/')
    new = cfg.data_root.rstrip('/')
    for split in SPLITS:
        for part in ('dataloader', 'evaluator'):
            if cfg.get(f'{split}_{part}'):
                node = cfg[f'{split}_{part}']
                cfg[f'{split}_{part}'] = move_paths(node, old, new)
    return _fill_in(cfg) + _take_categories(cfg)


def move_paths(node: Any, old: str, new: str) -> Any:
    """Move the paths of a config.

    Args:
        node (Any): Containers.
        old (str): A folder, without a slash at its end.
        new (str): The folder in its place.

    Returns:
        Any: Containers of the same types, in which what is in ``old`` is in
        ``new``.
    """
    if isinstance(node, dict):
        return type(node)((k, move_paths(v, old, new)) for k, v in node.items())
    if isinstance(node, (list, tuple)):
        return type(node)(move_paths(value, old, new) for value in node)
    if isinstance(node, str) and (node == old or node.startswith(old + '/')):
        return new + node[len(old) :]
    return node


def _fill_in(cfg: Config) -> List[str]:
    """Use the training images where there are no others."""
    warnings = []
    train = cfg.train_dataloader.dataset
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        lacking, instead = _ann_file(dataset), _ann_file(train)
        if osp.exists(lacking) or not osp.exists(instead):
            continue
        dataset.ann_file = train.ann_file
        dataset.data_prefix = train.data_prefix
        evaluators = cfg[f'{split}_evaluator']
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            if osp.normpath(evaluator.get('ann_file', '')) == osp.normpath(lacking):
                evaluator.ann_file = instead
        warnings.append(
            f'There is no {lacking}: the {split} metrics are of the training images.'
        )
    return warnings


def _ann_file(dataset: ConfigDict) -> str:
    return osp.join(dataset.data_root, dataset.ann_file)


def _take_categories(cfg: Config) -> List[str]:
    """Give data sets and heads the categories of the annotations."""
    files = {split: _ann_file(cfg[f'{split}_dataloader'].dataset) for split in SPLITS}
    found = {path: read_categories(path) for path in files.values() if osp.exists(path)}
    if not found:
        return []
    path, (classes, objects) = next(iter(found.items()))
    if path == files['train'] and not objects:
        raise ValueError(f'{path} has no object of its categories to train on')
    for other, (names, _) in found.items():
        if names != classes:
            raise ValueError(
                f'{other} has the categories {_listed(names)}, but {path} has '
                f'{_listed(classes)}: they must be the same, in the same order'
            )
    dataset = cfg.train_dataloader.dataset
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        default = registry.get(dataset.type).METAINFO.get('classes')
    known = tuple(dataset.get('metainfo', {}).get('classes') or default)
    if classes == known:
        return []
    if not _resize(cfg.model, len(known), len(classes)):
        raise ValueError(
            f'{path} has {len(classes)} categories and the config is for '
            f'{len(known)}, but nothing in its model has num_classes={len(known)}'
        )
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=classes)
    return [f'The classes are those of {path}: {_listed(classes)}.']


def _listed(names: Tuple[str, ...]) -> str:
    """The first names and how many there are."""
    return ', '.join(names[:8]) + (f', ... ({len(names)})' if len(names) > 8 else '')


def _resize(node, old: int, new: int) -> int:
    """Change ``num_classes`` from ``old`` to ``new``; returns how often."""
    if isinstance(node, (list, tuple)):
        return sum(_resize(value, old, new) for value in node)
    if not isinstance(node, dict):
        return 0
    count = sum(_resize(value, old, new) for value in node.values())
    if node.get('num_classes') == old:
        node['num_classes'] = new
        count += 1
    return count


def read_categories(path: str) -> Tuple[Tuple[str, ...], int]:
    """Categories of an annotation file in COCO layout.

    Args:
        path (str): The file.

    Returns:
        tuple[tuple[str], int]: Their names, in the order of the file, which
        labels follow, and the number of objects of them.

    Raises:
        ValueError: If it is no such file, or has no image.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        names = {c['id']: str(c['name']) for c in content['categories']}
        objects = sum(
            a['category_id'] in names and not a.get('iscrowd')
            for a in content['annotations']
        )
        images = len(content['images'])
    except KeyError as error:
        raise ValueError(f'{path} is no annotation file of COCO: no {error}') from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is no annotation file of COCO: {error}') from error
    if not images:
        raise ValueError(f'{path} has no image')
    if len(set(names.values())) < len(content['categories']):
        raise ValueError(f'{path} has categories of the same name or id')
    return tuple(names.values()), objects


@RUNNERS.register_module()
class DataRootRunner(Runner):
    """A runner for configs in which ``data_root`` alone selects the data.

    With ``runner_type='DataRootRunner'`` in a config, the toolboxes' own
    ``tools/train.py`` and ``tools/test.py`` build this runner, and
    ``--cfg-options data_root=DIR`` has the effect that one expects. See
    :func:`set_data_root`.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'DataRootRunner':
        """Build a runner from a config, whose paths are set before.

        Args:
            cfg (Config): A config read from a file.

        Returns:
            DataRootRunner: The runner.
        """
        cfg = cfg.copy()
        warnings = set_data_root(cfg)
        runner = super().from_cfg(cfg)
        for warning in warnings:
            runner.logger.warning(warning)
        return runner
