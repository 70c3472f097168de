"""Score-CAM of residual blocks: which parts of an image a block's features use."""

import copy
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structure import attention_stages
from .attention import measure_attention, stage_blocks
from .patch_attention import PatchSize, is_transformer, layer_names

try:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import (
        ClassifierOutputTarget,
        FasterRCNNBoxScoreTarget,
    )
except ImportError as error:
    raise ImportError(
        f'Score-CAM needs pytorch-grad-cam ({error}); install it with: pip install '
        'grad-cam==1.5.5'
    ) from error

IOU_THRESHOLD = 0.5


class StreamedScoreCAM(ScoreCAM):
    """Score-CAM (Wang et al., 2020) of one image, a few channels at a time.

    The class in the library masks the image with all channels at once, which takes
    26 GB for the 2048 channels of a ResNet-50's last block at 800x1333 pixels.

    Args:
        model (nn.Module): Model from images, (B, 3, H, W), to ``B`` outputs.
        layer (nn.Module): Layer whose output to explain.
        batch_size (int): Number of masked images per batch. Defaults to 16.
        max_channels (int, optional): Number of channels to use, those that vary most
            over the image; the others get no weight. Defaults to None: all channels,
            as published.
        progress (Callable[[int], None], optional): Called after each batch with its
            number of images. Defaults to None.
        reshape_transform (Callable[[Tensor], Tensor], optional): Converts the output
            to (B, C, h, w) if needed. Defaults to None.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        batch_size: int = 16,
        max_channels: Optional[int] = None,
        progress: Optional[Callable[[int], None]] = None,
        reshape_transform: Optional[Callable[[Tensor], Tensor]] = None,
    ) -> None:
        super().__init__(model, [layer], reshape_transform)
        self.batch_size = batch_size
        self.max_channels = max_channels
        self.progress = progress

    @torch.no_grad()
    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Sequence[Callable],
        activations: np.ndarray,
        grads: Optional[np.ndarray],
    ) -> np.ndarray:
        """Compute the weight of each channel: the softmax over scores of its mask.

        Args:
            input_tensor (Tensor): The image, (1, 3, H, W).
            target_layer (nn.Module): The layer.
            targets (Sequence[Callable[[Any], Tensor]]): One function that scores an
                output.
            activations (ndarray): Output of the layer, (1, C, h, w).
            grads (ndarray | None): Not used.

        Returns:
            ndarray: The weights, (1, C).
        """
        # Otherwise the hooks keep the activations of all masked images
        self.activations_and_grads.release()
        maps = torch.from_numpy(activations[0]).float()
        channels = select_channels(maps, self.max_channels)
        scores = torch.full((len(maps),), -torch.inf)
        for part in channels.split(self.batch_size):
            masks = F.interpolate(
                maps[part][:, None].to(self.device),
                size=input_tensor.shape[-2:],
                mode='bilinear',
                align_corners=True,
            )
            low = masks.amin((2, 3), keepdim=True)
            high = masks.amax((2, 3), keepdim=True)
            outputs = self.model(input_tensor * (masks - low) / (high - low + 1e-8))
            scores[part] = torch.tensor(
                [float(targets[0](output)) for output in outputs]
            )
            if self.progress is not None:
                self.progress(len(part))
        return scores.softmax(0)[None].numpy()


def select_channels(maps: Tensor, number: Optional[int]) -> Tensor:
    """Select the channels that vary most.

    Args:
        maps (Tensor): Activations, (C, h, w).
        number (int | None): Number of channels; None for all.

    Returns:
        Tensor: Indices in ascending order.
    """
    if number is None or number >= len(maps):
        return torch.arange(len(maps))
    order = maps.flatten(1).var(1).argsort(descending=True, stable=True)
    return order[:number].sort().values


class DetectorOutputs(nn.Module):
    """A detector of mmdet with the interface that pytorch-grad-cam expects.

    Args:
        model (nn.Module): The detector. Its mask head is removed, because it would
            only cost time.
        data_sample (DetDataSample): Sample of the image; all images of a batch are
            variants of it.
    """

    def __init__(self, model: nn.Module, data_sample) -> None:
        super().__init__()
        self.model = model
        self.data_sample = data_sample
        roi_head = getattr(model, 'roi_head', None)
        if getattr(roi_head, 'mask_head', None) is not None:
            roi_head.mask_head = None

    def forward(self, inputs: Tensor) -> List[Dict[str, Tensor]]:
        """Detect objects.

        Args:
            inputs (Tensor): Normalised images, (B, 3, H, W).

        Returns:
            list[dict[str, Tensor]]: ``boxes`` (N, 4), ``labels`` (N, ) and
            ``scores`` (N, ) of each image.
        """
        samples = [copy.deepcopy(self.data_sample) for _ in inputs]
        results = [
            sample.pred_instances
            for sample in self.model(inputs, samples, mode='predict')
        ]
        # The library's target puts its boxes on the GPU if there is one
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        return [
            dict(
                boxes=r.bboxes.to(device),
                labels=r.labels.to(device),
                scores=r.scores.to(device),
            )
            for r in results
        ]


def is_detector(model: nn.Module) -> bool:
    """Whether a model is a detector of mmdet, or a classifier of mmpretrain.

    Raises:
        ValueError: If it is neither.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if 'BaseDetector' in names:
        return True
    if 'BaseClassifier' in names:
        return False
    raise ValueError(
        f'{type(model).__name__} is neither a detector of mmdet nor a classifier of '
        'mmpretrain'
    )


def target_layers(model: nn.Module) -> Dict[str, Any]:
    """Find the blocks of a backbone, whose outputs include layer attention.

    Args:
        model (nn.Module): A model whose backbone is a ResNet, with or without layer
            attention; another network with (B, C, H, W) features and layer attention;
            or a vision transformer of MMPretrain such as DeiT.

    Returns:
        dict[str, nn.Module]: The blocks in order, by their names in the backbone,
        such as ``layer1.2``.

    Raises:
        ValueError: If the backbone is of another kind.
    """
    backbone = getattr(model, 'backbone', nn.Module())
    layers: Dict[str, Any] = {}
    for name in getattr(backbone, 'res_layers', ()):
        blocks = enumerate(getattr(backbone, name))
        layers.update({f'{name}.{index}': block for index, block in blocks})
    if layers:
        return layers
    if is_transformer(backbone):
        return {name: backbone.get_submodule(name) for name in layer_names(backbone)}
    for stage in attention_stages(backbone).values():
        if stage.attentions[0].place.features.layout == 'BCHW':
            layers.update(stage.blocks)
    if not layers:
        raise ValueError(
            f'the backbone of {type(model).__name__} has no residual blocks with '
            '(B, C, H, W) features and is not a vision transformer of MMPretrain'
        )
    return layers


def target_layer(model: nn.Module, name: str) -> nn.Module:
    """Look up one of the :func:`target_layers`.

    Args:
        model (nn.Module): A model.
        name (str): Name of the block, such as ``layer1.2``.

    Returns:
        nn.Module: The block.

    Raises:
        ValueError: If the name is unknown.
    """
    layers = target_layers(model)
    if name.startswith('backbone.'):
        name = name[len('backbone.') :]
    if name not in layers:
        raise ValueError(
            f'the backbone has no block {name}; allowed are {", ".join(layers)}'
        )
    return layers[name]


def last_blocks(model: nn.Module) -> List[str]:
    """Names of the last block of each stage of a model's backbone."""
    last = {name.rpartition('.')[0]: name for name in target_layers(model)}
    return list(last.values())


class ImageCAM:
    """Score-CAMs of blocks of one or two networks for one image.

    All networks use the same target, so that their maps are comparable: the prediction
    of the first network, unless a class is given.

    The score of a classifier is the logit of the class. The score of a detector is a
    sum over the detections of the first network in the unmasked image. Each detection
    adds the IoU with its best match plus the score of that match, if the IoU exceeds
    0.5 and the labels agree, or else 0. This is ``FasterRCNNBoxScoreTarget`` of
    pytorch-grad-cam.

    Args:
        models (Sequence[nn.Module]): Networks of one toolbox with the same classes.
        batch (dict): The image as a batch of one, from the test pipeline.
        target (int, optional): Class for a classifier. Defaults to None: the
            predicted class.
        score_thr (float): Minimum score of a detection. Defaults to 0.3.

    Attributes:
        target (str): Description of the target.

    Raises:
        ValueError: If ``target`` is out of range, or nothing is detected.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        batch: dict,
        target: Optional[int] = None,
        score_thr: float = 0.3,
    ) -> None:
        self.models = list(models)
        self.batch = batch
        self._networks, self._inputs = [], []
        for model in self.models:
            data = model.data_preprocessor(copy.deepcopy(batch), False)
            self._inputs.append(data['inputs'])
            self._networks.append(
                DetectorOutputs(model, data['data_samples'][0])
                if is_detector(model)
                else model
            )
        with torch.no_grad():
            output = self._networks[0](self._inputs[0])[0]
        if is_detector(self.models[0]):
            if target is not None:
                raise ValueError(
                    f'target={target} is only for classifiers, but the network is a '
                    'detector'
                )
            self._target = self._detections(output, score_thr)
        else:
            self._target = self._class(output, target)

    def _class(self, logits: Tensor, target: Optional[int]) -> Callable:
        if target is not None and not 0 <= target < len(logits):
            raise ValueError(
                f'target={target} is not a class; allowed are 0 to {len(logits) - 1}'
            )
        category = int(logits.argmax()) if target is None else target
        kind = 'predicted class' if target is None else 'class'
        self.target = f'{kind} {category}'
        return ClassifierOutputTarget(category)

    def _detections(self, output: dict, score_thr: float) -> Callable:
        chosen = output['scores'] >= score_thr
        count = int(chosen.sum())
        if not count:
            best = output['scores'].max().item() if len(output['scores']) else 0
            raise ValueError(
                f'nothing is detected with a score of at least {score_thr:g}; the best '
                f'score is {best:.3g}. Lower score_thr'
            )
        self.target = (
            f'{count} detection{"s" if count > 1 else ""} with a '
            f'score of at least {score_thr:g}'
        )
        return FasterRCNNBoxScoreTarget(
            output['labels'][chosen].cpu().numpy(),
            output['boxes'][chosen].cpu().numpy(),
            iou_threshold=IOU_THRESHOLD,
        )

    def compute(self, index: int, block: str, **kwargs) -> np.ndarray:
        """Compute the Score-CAM of a block.

        Args:
            index (int): Index of the network.
            block (str): Name of the block, such as ``layer1.2``.
            **kwargs: Arguments of :class:`StreamedScoreCAM`.

        Returns:
            ndarray: The map, (h, w), from 0 to 1, without the padding of the input.
        """
        model = self.models[index]
        layer = target_layer(model, block)
        with ExitStack() as stack:
            if is_transformer(model.backbone):
                size = PatchSize(model.backbone)
                stack.callback(size.remove)
                kwargs['reshape_transform'] = size.to_map
            stack.enter_context(torch.no_grad())
            cam = StreamedScoreCAM(self._networks[index], layer, **kwargs)
            stack.enter_context(cam)
            result = cam(self._inputs[index], [self._target])[0]
        height, width = self.batch['inputs'][0].shape[-2:]
        return np.clip(result[:height, :width], 0, 1)

    def notes(self, index: int) -> Dict[str, str]:
        """Describe each block, measured on this image alone.

        Args:
            index (int): Index of the network.

        Returns:
            dict[str, str]: For each block, its KL divergence from the previous active
            attention, or that its attention is pruned.
        """
        model = self.models[index]
        stages = attention_stages(model)
        if not stages:
            return {}
        names = {module: name for name, module in model.named_modules()}
        result = measure_attention(model, [copy.deepcopy(self.batch)])
        rows = (result['decision'] or dict(layers=[]))['layers']
        kl = {row['name']: row['divergence'] for row in rows}
        notes = {}
        for stage in stages.values():
            for block, attention in stage_blocks(stage):
                name = names[block][len('backbone.') :]
                if attention is None:
                    continue
                value = kl.get(names[attention])
                notes[name] = (
                    'attention pruned'
                    if not attention.active
                    else ''
                    if value is None
                    else f'KL {value:.3g}'
                )
        return notes


def channel_count(model: nn.Module, block: str) -> int:
    """Number of channels of a block's output, for a progress bar.

    Args:
        model (nn.Module): A model with a backbone of residual blocks.
        block (str): Name of the block.

    Returns:
        int: The number of channels.
    """
    target_layer(model, block)
    name = block[len('backbone.') :] if block.startswith('backbone.') else block
    if is_transformer(model.backbone):
        return model.backbone.embed_dims
    modules = model.backbone.get_submodule(name).modules()
    return [m.num_features for m in modules if hasattr(m, 'num_features')][-1]
