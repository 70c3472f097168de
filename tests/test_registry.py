"""Registration, each case in a process of its own."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code):
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_import_imports_next_to_nothing():
    out = run(
        'import mmengine, mmcv, sys\n'
        'before = set(sys.modules)\n'
        'import mmela\n'
        'print(*sorted(set(sys.modules) - before))'
    )
    new = out.split()
    assert 'mmela.registry' in new
    heavy = (
        'mmdet',
        'mmpretrain',
        'mmseg',
        'scipy',
        'matplotlib',
        'mmengine.model',
        'mmengine.hooks',
        'mmengine.runner',
        'mmela.hooks',
        'mmela.layers',
        'mmela.models',
        'mmela.analysis',
    )
    assert not [m for m in new if m.startswith(heavy)]


def test_attention_and_hook_from_any_scope():
    out = run(
        'import mmela\n'
        'from mmengine.registry import HOOKS, MODELS, Registry\n'
        'other = Registry("model", parent=MODELS, scope="other")\n'
        'for name in ("MLA", "MRLABase", "MRLALight", "KCLA"):\n'
        '    cfg = dict(type=name, channels=8, head_dim=4)\n'
        '    print(type(other.build(cfg)).__name__)\n'
        'print(MODELS.get("KCLA").crosses_stages)\n'
        'hook = HOOKS.build(dict(type="LayerAttentionPruningHook",'
        ' windows=[(1, 1)]))\n'
        'print(type(hook).__name__)\n'
        'from mmela.hooks import LayerAttentionPruningHook as real\n'
        'assert type(hook) is real is HOOKS.get(real.__name__)\n'
    )
    assert out.split() == [
        'MLA',
        'MRLABase',
        'MRLALight',
        'KCLA',
        'True',
        'LayerAttentionPruningHook',
    ]


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmpretrain', 'mmseg'])
@pytest.mark.parametrize(
    'order',
    [
        'import mmela; from {}.registry import MODELS',
        'from {}.registry import MODELS; import mmela',
        'from {0}.registry import MODELS; MODELS.get("ResNet"); import mmela',
    ],
)
def test_backbones_in_any_order(toolbox, order):
    if importlib.util.find_spec(toolbox) is None:
        pytest.skip(f'{toolbox} is not installed')
    if toolbox != 'mmpretrain':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    out = run(f'{order.format(toolbox)}\nprint(MODELS.get("ELAResNet").__module__)')
    assert out.split() == [f'mmela.models.backbones.{toolbox}_backbones']


def test_submodules_are_attributes():
    out = run(
        'import mmela\n'
        'print(mmela.layers.MRLABase.__name__, '
        'mmela.pruning.ebqm.__name__)\n'
        'assert not hasattr(mmela, "nothing")'
    )
    assert out.split() == ['MRLABase', 'ebqm']
