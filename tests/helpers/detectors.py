"""Small detectors from mmdet's own configs.

As a program, it prints their results, see ``main``.
"""

import json
import pkgutil
import sys
import warnings
from pathlib import Path

import mmela  # noqa: F401  (first, because it provides mmcv's operators)

CONFIGS = {
    'faster_rcnn': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'retinanet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
}


def build(name):
    """Build a detector with ResNet-18 and the same weights in every process."""
    import mmdet
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    folder = Path(mmdet.__file__).parent / '.mim' / 'configs'
    model = Config.fromfile(folder / CONFIGS[name]).model
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.in_channels = [64, 128, 256, 512]
    rcnn = model.test_cfg.get('rcnn', model.test_cfg)
    rcnn.update(score_thr=0.0, max_per_img=50)
    if 'rpn' in model.test_cfg:
        model.test_cfg.rpn.max_per_img = 100
        heads = [head for key, head in model.roi_head.items() if key.endswith('_head')]
        for head in heads:
            head.num_classes = 3
    else:
        model.bbox_head.num_classes = 3
    torch.manual_seed(0)
    detector = MODELS.build(model)
    detector.init_weights()
    return detector


def run(name):
    """Compute losses, the sum of the gradients' norms, and detections."""
    import torch
    from mmdet.testing import demo_mm_inputs

    detector = build(name)
    batch = demo_mm_inputs(
        2, [[3, 96, 128], [3, 64, 64]], num_classes=3, with_mask=True
    )
    data = detector.data_preprocessor(batch, True)
    torch.manual_seed(0)
    losses, _ = detector.parse_losses(detector(**data, mode='loss'))
    losses.backward()
    grads = sum(
        float(p.grad.abs().sum()) for p in detector.parameters() if p.grad is not None
    )
    detector.eval()
    data = detector.data_preprocessor(batch, False)
    with torch.no_grad():
        results = [sample.pred_instances for sample in detector(**data, mode='predict')]
    return dict(
        loss=losses.item(),
        grads=grads,
        boxes=[result.bboxes.tolist() for result in results],
        scores=[result.scores.tolist() for result in results],
        mask_areas=[
            result.masks.sum((1, 2)).tolist() for result in results if 'masks' in result
        ],
    )


def main():
    """Print the results of all detectors, and the operators they used."""
    import mmcv.ops
    import torch

    refusal = ''
    try:
        mmcv.ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)
    except RuntimeError as error:  # NotImplementedError is one
        refusal = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        found = pkgutil.find_loader('mmcv._ext') is not None
    report = dict(
        operators=mmcv.ops.get_compiler_version(),
        source=sys.modules['mmcv._ext'].__file__,
        found=found,
        refusal=refusal,
        results={name: run(name) for name in CONFIGS},
    )
    print('REPORT' + json.dumps(report))


if __name__ == '__main__':
    main()
