"""Experiment trackers: what a run with pruning leaves in each of them."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.runs import HOOK, decisions, divergences
from tests.helpers.toy import toy_config, train

NAMES = {f'pruning_epoch_{n}{s}.png' for n in (1, 3) for s in ('', '_table')}


def run(work_dir, *backends):
    visualizer = dict(
        type='Visualizer', name=str(work_dir), vis_backends=list(backends)
    )
    train(toy_config(work_dir, HOOK, visualizer=visualizer))
    first, last = decisions(work_dir)
    assert first.pruned and divergences(last)
    return last


def assert_drawn(path):
    """A picture with something on it, which is not cut off."""
    image = np.asarray(Image.open(path).convert('L'))
    assert image.shape[0] > 100 and image.shape[1] > 400
    for border in (image[:5], image[-5:], image[:, :5], image[:, -5:]):
        assert border.min() > 200
    assert (image > 250).mean() > 0.5 and (image < 100).sum() > 1000


def test_files_alone_get_no_pictures(tmp_path):
    run(tmp_path, dict(type='LocalVisBackend'))
    assert not list(tmp_path.rglob('*.png'))


def test_tensorboard(tmp_path):
    module = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    decision = run(tmp_path, dict(type='TensorboardVisBackend'))
    (events,) = tmp_path.rglob('events.out.tfevents*')
    found = module.EventAccumulator(str(events.parent))
    found.Reload()
    assert set(found.Tags()['images']) == NAMES
    for name in NAMES:
        (image,) = found.Images(name)
        assert image.step in (3, 9)
        (tmp_path / name).write_bytes(image.encoded_image_string)
        assert_drawn(tmp_path / name)
    for layer in decision.layers:
        if layer.divergence is not None:
            scalar = found.Scalars(f'layer_attention/kl/{layer.name}')[-1]
            assert scalar.step == 9
            assert scalar.value == pytest.approx(layer.divergence, rel=1e-6)


def test_mlflow(tmp_path):
    mlflow = pytest.importorskip('mlflow')
    uri = f'sqlite:///{tmp_path}/mlflow.db'
    decision = run(
        tmp_path,
        dict(
            type='MLflowVisBackend',
            exp_name='toy',
            tracking_uri=uri,
            artifact_location=(tmp_path / 'files').as_uri(),
        ),
    )
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name('toy')
    (found,) = client.search_runs([experiment.experiment_id])
    stored = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert NAMES | {'pruning.json', 'config.py'} <= stored
    for name in NAMES:
        assert_drawn(next((tmp_path / 'files').rglob(name)))
    values = found.data.metrics
    for layer in decision.layers:
        if layer.divergence is not None:
            key = f'layer_attention/kl/{layer.name}'
            assert values[key] == pytest.approx(layer.divergence, rel=1e-6)


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    run(tmp_path, dict(type='WandbVisBackend', init_kwargs=dict(project='toy')))
    (media,) = tmp_path.rglob('files/media/images')
    found = sorted(media.iterdir())
    names = {path.name.partition('.png')[0] + '.png' for path in found}
    assert names == NAMES
    for path in found:
        assert_drawn(path)
