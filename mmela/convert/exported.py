import json
from pathlib import Path
from typing import Any, Dict, List, Union

import torch
from mmengine.model import BaseModel
from torch import Tensor


class ExportedDetector(BaseModel):
    """A detector written by :func:`mmela.convert.export.export_network`.

    It replaces the detector in an mmengine runner, so you can evaluate the file with
    the data, metrics and tools of a config. It runs images one by one, as a data
    loader yields them.

    Args:
        path (str | Path): The file: ``.onnx``, run by onnxruntime; ``.pt2``, run by
            torch; or ``.xml``, run by OpenVINO.
        mask_threshold (float): Minimum probability of a pixel of a mask, the
            ``mask_thr_binary`` of a config. Defaults to 0.5.

    Raises:
        ImportError: If the package that runs the file is not installed.
        ValueError: If the file name has another ending.
    """

    def __init__(self, path: Union[str, Path], mask_threshold: float = 0.5) -> None:
        super().__init__()
        self.mask_threshold = mask_threshold
        self.run = _runner(Path(path))

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'predict'):
        """Detect objects.

        Args:
            inputs (list[Tensor]): Images of shape (C, H, W), not normalized.
            data_samples (list[DetDataSample]): Samples with the metadata of the
                images.
            mode (str): Must be ``'predict'``.

        Returns:
            list[DetDataSample]: The same, with ``pred_instances`` in pixels of
            the original images.
        """
        if mode != 'predict':
            raise ValueError(
                f"mode={mode!r} is unknown; an exported network only has mode='predict'"
            )
        for image, sample in zip(inputs, data_samples):
            sample.pred_instances = self._instances(self.run(image[None]), sample)
        return data_samples

    def _instances(self, outputs: Dict[str, Tensor], sample: Any) -> Any:
        from mmengine.structures import InstanceData

        outputs = {name: value[0] for name, value in outputs.items()}
        valid = outputs['labels'] >= 0
        width, height = sample.metainfo.get('scale_factor', (1, 1))[:2]
        scale = torch.tensor([width, height, width, height])
        instances = InstanceData(
            bboxes=outputs['boxes'][valid] / scale,
            scores=outputs['scores'][valid],
            labels=outputs['labels'][valid],
        )
        if 'masks' in outputs:
            instances.masks = paste_masks(
                outputs['masks'][valid],
                instances.bboxes,
                sample.metainfo['ori_shape'][:2],
                self.mask_threshold,
            )
        return instances


def paste_masks(
    masks: Tensor, boxes: Tensor, size: Any, threshold: float = 0.5
) -> Tensor:
    """Paste masks of boxes into masks of the whole image, as mmdet does.

    Args:
        masks (Tensor): Probabilities of the pixels, (N, h, w).
        boxes (Tensor): Corners x1, y1, x2, y2, (N, 4).
        size (tuple[int]): Height ``H`` and width ``W`` of the image.
        threshold (float): Minimum probability of a pixel of the object. Defaults to
            0.5.

    Returns:
        Tensor: Boolean masks, (N, H, W).
    """
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    pasted: List[Tensor] = [torch.zeros(0, *size, dtype=torch.bool)]
    for mask, box in zip(masks, boxes):
        whole, _ = _do_paste_mask(mask[None, None], box[None], *size, skip_empty=False)
        pasted.append(whole >= threshold)
    return torch.cat(pasted)


def _runner(path: Path) -> Any:
    """Load a file as a function from images to named outputs."""
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
        import torchvision  # noqa: F401  (registers the operators)

        files = dict(mmela='')
        program = torch.export.load(path, extra_files=files).module()
        names = json.loads(files['mmela'])['outputs']

        def run(images: Tensor) -> Dict[str, Tensor]:
            with torch.no_grad():
                return dict(zip(names, program(images)))

    elif path.suffix == '.xml':
        import openvino

        # By default OpenVINO computes in bfloat16 on processors that support it
        exact = dict(INFERENCE_PRECISION_HINT='f32')
        compiled = openvino.Core().compile_model(path, 'CPU', exact)
        names = [output.get_any_name() for output in compiled.outputs]

        def run(images: Tensor) -> Dict[str, Tensor]:
            values = compiled(images.numpy()).values()
            return {n: torch.from_numpy(v.copy()) for n, v in zip(names, values)}

    else:
        raise ValueError(f'{path} must end with .onnx, .pt2 or .xml')
    return run
