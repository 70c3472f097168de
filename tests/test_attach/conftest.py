"""Of the products of networks, attentions and the like, a sample that covers each.

``MMELA_LONG=1`` runs all combinations, as does naming tests (``-k``, ``::``).
"""

import os
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    named = config.option.keyword or any('::' in arg for arg in config.args)
    if os.environ.get('MMELA_LONG') or named:
        return
    seen = defaultdict(set)
    kept, left_out = [], []
    for item in items:
        spec = getattr(item, 'callspec', None)
        if spec is None or HERE not in item.path.parents:
            kept.append(item)
            continue
        values = {(key, str(value)) for key, value in spec.params.items()}
        new = values - seen[item.path, item.function.__name__]
        seen[item.path, item.function.__name__] |= values
        (kept if new else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
