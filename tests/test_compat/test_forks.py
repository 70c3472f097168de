"""Forks: never beside what they are forks of, never less safe."""

import os
import pickle
import warnings

import mmengine.runner.checkpoint as runner_checkpoint
import pytest
import torch
from mmengine.utils import digit_version

from mmela.compat import forks


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def installed(monkeypatch):
    """Set the distributions that are found."""

    def install(**versions):
        def version(name):
            if name not in found:
                raise forks.PackageNotFoundError(name)
            return found[name]

        found = {name.replace('_', '-'): value for name, value in versions.items()}
        monkeypatch.setattr(forks, 'version', version)

    return install


def test_one_family_is_fine(installed):
    installed(mmengine='0.10.7', mmcv='2.1.0', onedl_mmdetection='3.5.1')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        forks.warn_of_mixtures()
    assert forks.distributions('mmdet') == {'onedl-mmdetection': '3.5.1'}
    assert forks.distributions('mmseg') == {}


@pytest.mark.parametrize(
    'found, name',
    [
        (dict(mmdet='3.3.0', onedl_mmdetection='3.5.1'), 'mmdet'),
        (dict(mmcv='2.1.0', mmcv_lite='2.1.0'), 'mmcv'),
    ],
)
def test_a_mixture_is_told(installed, found, name):
    installed(**found)
    with pytest.warns(
        UserWarning, match=f'overwrite each other.s files of {name};'
    ) as seen:
        forks.warn_of_mixtures()
    assert len(seen) == 1
    assert all(d.replace('_', '-') in str(seen[0].message) for d in found)


def falls_back(file, map_location=None):
    """As onedl-mmengine 0.10.12 does."""
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(file, map_location=map_location, weights_only=False)


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6.0'),
    reason='torch runs the code of checkpoints by itself',
)
def test_fork_refuses_what_runs_code(installed, monkeypatch, tmp_path):
    if not hasattr(runner_checkpoint, '_safe_torch_load'):  # OpenMMLab's mmengine
        monkeypatch.setattr(
            runner_checkpoint, '_safe_torch_load', falls_back, raising=False
        )
    load = runner_checkpoint._safe_torch_load
    monkeypatch.setattr(runner_checkpoint, '_safe_torch_load', load)  # put back
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(state_dict=dict(x=torch.ones(2))), path)
    bad = tmp_path / 'bad.pth'
    torch.save(dict(state_dict={}, meta=Malicious(tmp_path / 'made')), bad)

    installed(onedl_mmengine='0.10.12')
    forks.keep_loading_safe()
    with pytest.raises(pickle.UnpicklingError):
        runner_checkpoint._safe_torch_load(bad, map_location='cpu')
    assert not (tmp_path / 'made').exists()
    loaded = runner_checkpoint._safe_torch_load(path, map_location='cpu')
    assert loaded['state_dict']['x'].tolist() == [1, 1]


def test_a_real_fork_is_guarded_by_the_import():
    if 'onedl-mmengine' not in forks.distributions('mmengine'):
        pytest.skip('onedl-mmengine is not installed')
    assert runner_checkpoint._safe_torch_load.keywords == dict(weights_only=True)


def test_openmmlab_is_left_alone(installed, monkeypatch):
    monkeypatch.setattr(
        runner_checkpoint, '_safe_torch_load', falls_back, raising=False
    )
    installed(mmengine='0.10.7')
    forks.keep_loading_safe()
    assert runner_checkpoint._safe_torch_load is falls_back
