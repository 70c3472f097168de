"""Registration, each case in a process of its own."""

import importlib.util
import sys

import pytest

from tests.helpers.fresh import check


def test_no_toolbox_is_imported():
    out = check('import mmela, sys; print(*sys.modules)')
    roots = {name.split('.')[0] for name in out.split()}
    assert 'mmengine' in roots and not roots & {'mmdet', 'mmpretrain', 'mmseg'}
    assert 'matplotlib' not in roots


def test_attentions_from_any_scope():
    out = check(
        'import mmela\n'
        'from mmengine.registry import HOOKS, MODELS, Registry\n'
        'other = Registry("model", parent=MODELS, scope="other")\n'
        'for name in ("MLA", "MRLABase", "MRLALight", "KCLA"):\n'
        '    cfg = dict(type=f"mmela.{name}", channels=8, head_dim=4)\n'
        '    print(type(other.build(cfg)).__name__)\n'
        'hook = HOOKS.build(dict(type="LayerAttentionPruningHook",'
        ' windows=[(1, 1)]))\n'
        'print(type(hook).__name__)\n'
    )
    assert out.split() == [
        'MLA',
        'MRLABase',
        'MRLALight',
        'KCLA',
        'LayerAttentionPruningHook',
    ]


def test_names_of_other_packages_stay_theirs():
    check(
        'from mmengine.registry import MODELS\n'
        '@MODELS.register_module()\n'
        'class MLA: pass\n'
        'import mmela\n'
        'assert MODELS.get("MLA") is MLA\n'
        'from mmela.registry import find_layer_attention\n'
        'assert find_layer_attention("MLA") is mmela.layers.MLA\n'
    )


def test_own_attention():
    """One's own class by its name in any registry, or as it is."""
    check(
        'import mmela\n'
        'from mmela.registry import LAYER_ATTENTIONS, find_layer_attention\n'
        '@LAYER_ATTENTIONS.register_module()\n'
        'class Mine(mmela.layers.MRLABase): pass\n'
        'assert find_layer_attention("Mine") is Mine is find_layer_attention(Mine)\n'
        'try:\n'
        '    find_layer_attention("Yours")\n'
        'except KeyError as error:\n'
        '    assert "Yours" in str(error) and "MRLABase" in str(error)\n'
        'else:\n'
        '    raise AssertionError\n'
    )


def test_folder_named_like_a_toolbox(tmp_path):
    """A clone of its repository on the path is no installed package."""
    (tmp_path / 'toolbox').mkdir()
    check(
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
        'from importlib.util import find_spec\n'
        'assert find_spec("toolbox") is not None\n'
        'from mmela.compat.versions import check_versions, is_installed\n'
        'assert not is_installed("toolbox") and is_installed("mmengine")\n'
        'check_versions({"toolbox": ("1.0", "2.0")})\n'
    )


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
        given = sys.modules['mmcv._ext'].__file__.endswith('mmcv_ext.py')
        if given and 'get("ResNet")' in order:
            pytest.skip('the toolbox asks for operators before mmela gives them')
    out = check(f'{order.format(toolbox)}\nprint(MODELS.get("ELAResNet").__module__)')
    assert out.split()[-1] == f'mmela.models.backbones.{toolbox}_backbones'


def test_registering_twice_changes_nothing():
    check(
        'import mmela\n'
        'from mmengine.registry import MODELS\n'
        'mmela.register_backbones()\n'
        'import mmpretrain.registry as r\n'
        'mmela.register_backbones()\n'
        'assert r.MODELS._locations.count('
        '"mmela.models.backbones.mmpretrain_backbones") == 1\n'
        'r.MODELS.get("ELAResNet")(18)\n'
    )
