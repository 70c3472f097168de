import os.path as osp
from typing import List

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner


def set_data_root(cfg: Config) -> List[str]:
    """Have all data sets and evaluators of a config follow its ``data_root``.

    A config file writes its ``data_root`` into each data set and evaluator as
    it is parsed. So a ``data_root`` given later, by ``--cfg-options`` or as
    ``cfg.data_root = ...``, would change nothing. This makes it count: every
    path in a dataloader or evaluator that is in the file's ``data_root`` moves
    to the config's. Paths that are elsewhere stay.

    Data to try things on often have no validation images. Where the new place
    lacks the annotations of a validation or test set, but not those of the
    training set, the training images take their place.

    Args:
        cfg (Config): A config read from a file that has a top-level
            ``data_root``, in COCO layout. Changed in place.

    Returns:
        list[str]: What the user should be warned of.

    Raises:
        ValueError: If the config comes from no file or has no ``data_root``.
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
    for split in ('train', 'val', 'test'):
        for part in ('dataloader', 'evaluator'):
            if cfg.get(f'{split}_{part}'):
                node = cfg[f'{split}_{part}']
                cfg[f'{split}_{part}'] = _move(node, old, new)
    return _fill_in(cfg)


def _move(node, old: str, new: str):
    """Containers with the paths in folder ``old`` moved to ``new``."""
    if isinstance(node, dict):
        return type(node)((k, _move(v, old, new)) for k, v in node.items())
    if isinstance(node, (list, tuple)):
        return type(node)(_move(value, old, new) for value in node)
    if isinstance(node, str) and (node == old or node.startswith(old + '/')):
        return new + node[len(old) :]
    return node


def _fill_in(cfg: Config) -> List[str]:
    """Use the training images where there are no others."""

    def ann_file(dataset):
        return osp.join(dataset.data_root, dataset.ann_file)

    warnings = []
    train = cfg.train_dataloader.dataset
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        lacking, instead = ann_file(dataset), ann_file(train)
        if osp.exists(lacking) or not osp.exists(instead):
            continue
        dataset.ann_file = train.ann_file
        dataset.data_prefix = train.data_prefix
        cfg[f'{split}_evaluator'].ann_file = instead
        warnings.append(
            f'There is no {lacking}: the {split} metrics are of the training images.'
        )
    return warnings


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
