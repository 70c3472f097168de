"""The page on plain PyTorch: its examples run, without a toolbox."""

import re
from pathlib import Path

import pytest

from tests.helpers.fresh import check

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'plain_pytorch.md'
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmdet', 'mmpretrain', 'mmseg') or \\
                name.startswith('mmcv._ext'):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(f) for f in sys.meta_path if hasattr(f, 'find_spec')]
"""
ENDING = """
assert decision.layers and meter.compute()
assert not any(m.split('.')[0] in ('mmdet', 'mmpretrain', 'mmseg')
               for m in sys.modules)
states = [int(a.attention_state) for s in attention_stages(net).values()
          for a in s.attentions]
print('pruned', states.count(2), len(decision.pruned))
"""


def test_plain_pytorch():
    pytest.importorskip('torchvision')
    examples = re.findall('```python\n(.*?)```', PAGE.read_text('utf-8'), re.DOTALL)
    assert len(examples) == 3
    steps = examples[0].partition('\n\n')[2].strip().splitlines()
    assert len(steps) <= 13
    output = check('\n'.join([HIDING, *examples, ENDING]))
    line = output.splitlines()[-1].split()
    assert line[0] == 'pruned' and line[1] == line[2] != '0'
