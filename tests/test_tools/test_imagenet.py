"""An ImageNet config on a few generated images, by mmpretrain's own tools."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from mmela.command_line import find_tool  # noqa: E402
from tests.helpers.fresh import check  # noqa: E402
from tests.helpers.runs import decisions  # noqa: E402

WNIDS = ('n01440764', 'n01443537', 'n01484850')


@pytest.fixture
def imagenet(tmp_path):
    """Training images in folders, validation images in an annotation file."""
    root = tmp_path / 'imagenet'
    rng = np.random.default_rng(0)
    (root / 'meta').mkdir(parents=True)
    (root / 'val').mkdir()
    lines = []
    # mmpretrain checks that there are 1000 classes; the others are empty.
    for i in range(1000 - len(WNIDS)):
        (root / 'train' / f'n9{i:07}').mkdir(parents=True)
    for label, wnid in enumerate(WNIDS):
        (root / 'train' / wnid).mkdir(parents=True)
        for i in range(4):
            # A colour of its own for each class
            image = rng.integers(0, 60, (48, 40 + 8 * i, 3), np.uint8)
            image[..., label] += 150
            path = root / 'train' / wnid / f'{wnid}_{i}.JPEG'
            cv2.imwrite(str(path), image)
            if i < 2:
                name = f'ILSVRC2012_val_{label}{i}.JPEG'
                cv2.imwrite(str(root / 'val' / name), image)
                lines.append(f'{name} {label}')
    (root / 'meta' / 'val.txt').write_text('\n'.join(lines))
    return root


def test_train_and_test(imagenet, tmp_path, config_dir):
    config = config_dir / 'imagenet' / 'resnet50-ela_8xb32_in1k.py'
    work_dir = tmp_path / 'run'
    loader = (
        '{0}_dataloader.batch_size=4 {0}_dataloader.num_workers=0 '
        '{0}_dataloader.persistent_workers=False '
        '{0}_dataloader.dataset.data_root=' + str(imagenet)
    )
    options = ' '.join(
        [
            *(loader.format(name) for name in ('train', 'val', 'test')),
            'model.backbone.depth=50 model.backbone.stem_channels=8',
            'model.backbone.base_channels=8',
            'model.backbone.layer_attention.head_dim=8',
            'model.head.in_channels=256',
            'train_pipeline.1.scale=32',
            'train_dataloader.dataset.pipeline.1.scale=32',
            'test_dataloader.dataset.pipeline.1.scale=32',
            'test_dataloader.dataset.pipeline.2.crop_size=32',
            'val_dataloader.dataset.pipeline.1.scale=32',
            'val_dataloader.dataset.pipeline.2.crop_size=32',
            'train_cfg.max_epochs=2 default_hooks.logger.interval=1',
            'custom_hooks.0.windows=[(1,1)]',
        ]
    ).split()
    check(
        Path(find_tool(str(config), 'train.py')),
        config,
        '--work-dir',
        work_dir,
        '--cfg-options',
        *options,
    )
    pruned = decisions(work_dir)[0].pruned
    assert pruned
    out = check(
        Path(find_tool(str(config), 'test.py')),
        config,
        work_dir / 'epoch_2.pth',
        '--work-dir',
        tmp_path / 'test',
        '--cfg-options',
        *options,
    )
    assert 'accuracy/top1' in out and 'accuracy/top5' in out

    # mmpretrain's test sees the pruned network: same accuracy as in training
    scalars = next(work_dir.glob('*/vis_data/scalars.json')).read_text()
    records = [json.loads(line) for line in scalars.splitlines()]
    trained = [r['accuracy/top1'] for r in records if 'accuracy/top1' in r]
    tested = next((tmp_path / 'test').glob('*/*.json')).read_text()
    assert json.loads(tested)['accuracy/top1'] == trained[-1]
