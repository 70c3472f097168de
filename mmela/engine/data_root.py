import json
import os.path as osp
from typing import Any, List, Tuple

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner

SPLITS = ('train', 'val', 'test')


def set_data_root(cfg: Config) -> List[str]:
    """Apply a changed ``data_root`` to data sets, evaluators and heads of a config.

    Parsing a config file copies its ``data_root`` into each data set and evaluator, so
    setting it later, with ``--cfg-options`` or ``cfg.data_root = ...``, would have no
    effect. This function moves every path of a dataloader or evaluator from the file's
    ``data_root`` to the new one. Other paths stay.

    A data set with its own categories brings its own class names: the data sets take
    the classes of the training annotations, and every ``num_classes`` in the model
    that had the old number of classes gets the new one.

    Small data sets often have no validation images. If the annotations of a validation
    or test set are missing but those of the training set exist, the training images
    are used instead.

    Args:
        cfg (Config): A config in COCO format, read from a file with a top-level
            ``data_root``. It is changed in place.

    Returns:
        list[str]: Warnings for the user.

    Raises:
        ValueError: If the config was not read from a file or has no ``data_root``; if
            an annotation file is invalid or has no image; if the training set has no
            object; or if the sets have different categories. For missing annotation
            files, the data sets raise an error later.
    """
    if cfg.filename is None or not cfg.get('data_root'):
        raise ValueError(
            'set_data_root needs a config that was read from a file and has a '
            f'data_root, got filename={cfg.filename!r} and '
            f'data_root={cfg.get("data_root")!r}'
        )
    # mmengine does not record the value that an option has replaced
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
        old (str): A folder, without a trailing slash.
        new (str): The folder that replaces it.

    Returns:
        Any: Containers of the same types, with paths in ``old`` moved to ``new``.
    """
    if isinstance(node, dict):
        return type(node)((k, move_paths(v, old, new)) for k, v in node.items())
    if isinstance(node, (list, tuple)):
        return type(node)(move_paths(value, old, new) for value in node)
    if isinstance(node, str) and (node == old or node.startswith(old + '/')):
        return new + node[len(old) :]
    return node


def _fill_in(cfg: Config) -> List[str]:
    """Use the training images for splits whose annotations are missing."""
    warnings = []
    train = cfg.train_dataloader.dataset
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        missing, substitute = _ann_file(dataset), _ann_file(train)
        if osp.exists(missing) or not osp.exists(substitute):
            continue
        dataset.ann_file = train.ann_file
        dataset.data_prefix = train.data_prefix
        evaluators = cfg[f'{split}_evaluator']
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            if osp.normpath(evaluator.get('ann_file', '')) == osp.normpath(missing):
                evaluator.ann_file = substitute
        warnings.append(
            f'There is no {missing}, so the {split} metrics use the training images.'
        )
    return warnings


def _ann_file(dataset: ConfigDict) -> str:
    return osp.join(dataset.data_root, dataset.ann_file)


def _take_categories(cfg: Config) -> List[str]:
    """Give data sets and heads the categories of the annotations."""
    files = {split: _ann_file(cfg[f'{split}_dataloader'].dataset) for split in SPLITS}
    categories = {
        path: read_categories(path) for path in files.values() if osp.exists(path)
    }
    if not categories:
        return []
    path, (classes, objects) = next(iter(categories.items()))
    if path == files['train'] and not objects:
        raise ValueError(f'{path} has no object of its categories to train on')
    for other, (names, _) in categories.items():
        if names != classes:
            raise ValueError(
                f'{other} has the categories {_listed(names)}, but {path} has '
                f'{_listed(classes)}; they must be the same, in the same order'
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
            f'{len(known)}, but its model has no num_classes={len(known)} to change'
        )
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=classes)
    return [f'The classes come from {path}: {_listed(classes)}.']


def _listed(names: Tuple[str, ...]) -> str:
    """List the first names and the total number."""
    return ', '.join(names[:8]) + (f', ... ({len(names)})' if len(names) > 8 else '')


def _resize(node, old: int, new: int) -> int:
    """Change ``num_classes`` from ``old`` to ``new``; return the number of changes."""
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
    """Read the categories of an annotation file in COCO format.

    Args:
        path (str): The file.

    Returns:
        tuple[tuple[str], int]: The names in the order of the file, which is the order
        of labels, and the number of objects.

    Raises:
        ValueError: If the file is invalid, has no image, or repeats a category.
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
        raise ValueError(
            f'{path} is not a COCO annotation file: it has no {error}'
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is not a COCO annotation file: {error}') from error
    if not images:
        raise ValueError(f'{path} has no image')
    if len(set(names.values())) < len(content['categories']):
        raise ValueError(f'{path} has two categories with the same name or id')
    return tuple(names.values()), objects


@RUNNERS.register_module()
class DataRootRunner(Runner):
    """A runner for configs whose data you select by ``data_root`` alone.

    With ``runner_type='DataRootRunner'`` in a config, the toolboxes'
    ``tools/train.py`` and ``tools/test.py`` build this runner, and
    ``--cfg-options data_root=DIR`` selects the data. See :func:`set_data_root`.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'DataRootRunner':
        """Build a runner from a config, after moving its paths.

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
