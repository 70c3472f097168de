import os.path as osp
from typing import List

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

_PARTS = [
    f'{split}_{part}' for split in ('train', 'val', 'test')
    for part in ('dataloader', 'evaluator')
]


def _replace(node, old: str, new: str):
    """A copy of nested containers, with paths in ``old`` moved to ``new``."""
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _replace(value, old, new)
    elif isinstance(node, (list, tuple)):
        node = type(node)(_replace(value, old, new) for value in node)
    elif isinstance(node, str) and (node + '/').startswith(old + '/'):
        node = new + node[len(old):]
    return node
