import json
from pathlib import Path
from typing import Any, Dict, List, Union

import torch
from mmengine.model import BaseModel
from torch import Tensor


class ExportedDetector(BaseModel):
    """A detector that :func:`mmela.convert.export.export_network` has written.

    It stands for the detector in a runner of mmengine, so that the data,
    metrics and tools of a config tell what a file is worth. Images go one by
    one, as a data loader gives them.

    Args:
        path (str | Path): ``.onnx``, which onnxruntime runs; ``.pt2``, which
            torch runs; ``.xml`` for OpenVINO.
        mask_threshold (float): Pixels of a mask from here on are of the object;
            a config's ``mask_thr_binary``. Defaults to 0.5.

    Raises:
        ValueError: If the file name ends otherwise.
    """

    def __init__(self, path: Union[str, Path], mask_threshold: float = 0.5) -> None:
        super().__init__()
        self.mask_threshold = mask_threshold
        self.run = _runner(Path(path))

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'predict'):
        """Detect objects.

        Args:
            inputs (list[Tensor]): Images of shape (C, H, W), not normalized.
            data_samples (list[DetDataSample]): Where the images are from.
            mode (str): Only ``'predict'``.

        Returns:
            list[DetDataSample]: The same, with ``pred_instances`` in pixels of
            the original images.
        """
        if mode != 'predict':
            raise ValueError(f"mode={mode!r}; an exported network has 'predict' alone")
        for image, sample in zip(inputs, data_samples):
            sample.pred_instances = self._instances(self.run(image[None]), sample)
        return data_samples

    def _instances(self, found: Dict[str, Tensor], sample: Any) -> Any:
        from mmengine.structures import InstanceData

        found = {name: value[0] for name, value in found.items()}
        here = found['labels'] >= 0
        width, height = sample.metainfo.get('scale_factor', (1, 1))[:2]
        scale = torch.tensor([width, height, width, height])
        instances = InstanceData(
            bboxes=found['boxes'][here] / scale,
            scores=found['scores'][here],
            labels=found['labels'][here],
        )
        if 'masks' in found:
            instances.masks = paste_masks(
                found['masks'][here],
                instances.bboxes,
                sample.metainfo['ori_shape'][:2],
                self.mask_threshold,
            )
        return instances


def paste_masks(
    masks: Tensor, boxes: Tensor, size: Any, threshold: float = 0.5
) -> Tensor:
    """Masks of whole images from those of boxes, as mmdet pastes them.

    Args:
        masks (Tensor): How likely a pixel is of the object, (N, h, w).
        boxes (Tensor): Corners x1, y1, x2, y2, (N, 4).
        size (tuple[int]): Height ``H`` and width ``W`` of the image.
        threshold (float): Pixels from here on are of the object. Defaults to
            0.5.

    Returns:
        Tensor: Shape (N, H, W), bool.
    """
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    pasted: List[Tensor] = [torch.zeros(0, *size, dtype=torch.bool)]
    for mask, box in zip(masks, boxes):
        whole, _ = _do_paste_mask(mask[None, None], box[None], *size, skip_empty=False)
        pasted.append(whole >= threshold)
    return torch.cat(pasted)


def _runner(path: Path) -> Any:
    """A function from images to results by name."""
    if path.suffix == '.onnx':
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f'{path} needs onnxruntime: pip install "mmela[export]"'
            ) from error

        session = onnxruntime.InferenceSession(str(path))
        names = [output.name for output in session.get_outputs()]

        def run(images: Tensor) -> Dict[str, Tensor]:
            values = session.run(None, dict(images=images.numpy()))
            return dict(zip(names, map(torch.from_numpy, values)))

    elif path.suffix == '.pt2':
        import torchvision  # noqa: F401  (has the operators)

        files = dict(mmela='')
        program = torch.export.load(path, extra_files=files).module()
        names = json.loads(files['mmela'])['outputs']

        def run(images: Tensor) -> Dict[str, Tensor]:
            with torch.no_grad():
                return dict(zip(names, program(images)))

    elif path.suffix == '.xml':
        import openvino

        # By default it computes in bfloat16 where the processor can
        exact = dict(INFERENCE_PRECISION_HINT='f32')
        compiled = openvino.Core().compile_model(path, 'CPU', exact)
        names = [output.get_any_name() for output in compiled.outputs]

        def run(images: Tensor) -> Dict[str, Tensor]:
            values = compiled(images.numpy()).values()
            return {n: torch.from_numpy(v.copy()) for n, v in zip(names, values)}

    else:
        raise ValueError(f'{path} must end with .onnx, .pt2 or .xml')
    return run
