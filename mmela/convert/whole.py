"""Exportable modules of whole networks: tensors in, tensors out.

A toolbox's detector processes images one by one, returns lists of objects, and
branches on the values of tensors. The modules here run its backbone, neck, heads,
anchors and box coders, and select detections with operators that the exchange formats
have: top-k, NonMaxSuppression, RoiAlign.
"""

from typing import Any, List, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SUPPORTED = (
    'ImageClassifier of mmpretrain with one softmax head; single-stage detectors of '
    'mmdet whose head keeps the decoding of BaseDenseHead (RetinaNet, FCOS, ATSS, '
    'SSD); and Faster R-CNN and Mask R-CNN of mmdet with RPNHead and StandardRoIHead'
)


class WholeNetwork(nn.Module):
    """A network with its pre-processing, from images to results.

    Args:
        model (nn.Module): A network of mmpretrain or mmdet.
        raw (bool): Take images as loaded, and normalize and pad them like the
            network's pre-processing. Otherwise images must be normalized. Defaults
            to True.

    Attributes:
        output_names (tuple[str]): Names of the outputs of :meth:`forward`.

    Raises:
        ValueError: If the network is not supported.
    """

    output_names: Tuple[str, ...]

    def __init__(self, model: nn.Module, raw: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        self.raw = raw
        self.check()

    def check(self) -> None:
        """Raise a ValueError if this class does not compute the network correctly."""
        raise NotImplementedError

    def results(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, ...]:
        """Compute the outputs.

        Args:
            x (Tensor): Normalized images, (B, C, H, W).
            size (Sequence[int]): Height and width of the images without padding.

        Returns:
            tuple[Tensor]: The outputs that the class documents.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Run the network.

        Args:
            images (Tensor): Images, (B, C, H, W). With ``raw``, values are 0 to 255
                of any type, with channels in the order in which the config loads
                them.

        Returns:
            tuple[Tensor]: The outputs in the order of ``output_names``.
        """
        with _ExportablePooling():
            return self.results(self.prepare(images), images.shape[-2:])

    def prepare(self, images: Tensor) -> Tensor:
        """Apply the network's pre-processing.

        This reimplements it, because the original code uses the image size as a
        number and so cannot be exported.

        Args:
            images (Tensor): See :meth:`forward`.

        Returns:
            Tensor: Normalized and padded images in float32, (B, C, H, W).
        """
        preprocessor = self.model.data_preprocessor
        x = images.float()
        if self.raw:
            # The names in mmengine's class, which mmdet inherits, and in mmpretrain's
            names = '_channel_conversion', 'to_rgb'
            flips = any(getattr(preprocessor, name, False) for name in names)
            if x.size(1) == 3 and flips:
                x = x.flip(1)
            if preprocessor._enable_normalize:
                x = (x - preprocessor.mean) / preprocessor.std
        divisor = preprocessor.pad_size_divisor
        if divisor == 1:
            return x
        # Pad too much and crop: if the traced size needed no padding, the exporter
        # would drop it for all sizes. Not -(-n // divisor): ONNX rounds towards zero.
        height, width = (
            (n + divisor - 1) // divisor * divisor for n in images.shape[-2:]
        )
        x = F.pad(x, (0, divisor, 0, divisor), value=preprocessor.pad_value)
        return x[..., :height, :width]


class _ExportablePooling(TorchFunctionMode):
    """Replaces max-pooling with kernel size 1 by slicing.

    FPN computes its smallest map that way. For a pooling, the exporter tests whether
    the traced size is even and then assumes so for all images.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.max_pool2d and args[1:] == (1,):
            step = kwargs.get('stride')
            other = kwargs.get('padding') or kwargs.get('return_indices')
            if isinstance(step, int) and not other:
                return args[0][..., ::step, ::step]
        return func(*args, **kwargs)


class Classifier(WholeNetwork):
    """A classifier: scores of shape (B, classes), which sum to 1."""

    output_names = ('scores',)

    def check(self) -> None:
        from mmpretrain.models.heads import ClsHead, MultiLabelClsHead

        head = self.model.head
        softmax = isinstance(head, ClsHead) and not isinstance(head, MultiLabelClsHead)
        if not softmax or not _inherits(head, ClsHead, '_get_predictions'):
            _refuse(f'the head {type(head).__name__}')

    def results(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, ...]:
        return (self.model(x, mode='tensor').softmax(-1),)


class SingleStage(WholeNetwork):
    """A single-stage detector.

    It returns ``K`` boxes for each image, the best ones first, where ``K`` is
    ``max_per_img`` of the config: corners x1, y1, x2, y2 in pixels of the input image,
    (B, K, 4), scores (B, K) and labels (B, K). If there are fewer detections, the rest
    has score 0 and label -1.
    """

    output_names = ('boxes', 'scores', 'labels')

    def check(self) -> None:
        from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

        head = self.model.bbox_head
        _check_dense(head, BaseDenseHead)

    def results(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, ...]:
        head = self.model.bbox_head
        return _detections(head, self.model.extract_feat(x), size)


class TwoStage(WholeNetwork):
    """Faster R-CNN or Mask R-CNN.

    It returns the outputs of :class:`SingleStage`. Mask R-CNN also returns ``masks``,
    (B, K, 28, 28): for each pixel of a grid over the box, the probability that it
    belongs to the object.
    """

    def check(self) -> None:
        from mmcv.ops import RoIAlign
        from mmdet.models.dense_heads import RPNHead
        from mmdet.models.roi_heads import StandardRoIHead
        from mmdet.models.roi_heads.bbox_heads import BBoxHead
        from mmdet.models.roi_heads.mask_heads import FCNMaskHead
        from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

        roi_head = self.model.roi_head
        _check_dense(self.model.rpn_head, RPNHead)
        _check_selection(roi_head.test_cfg)
        if type(roi_head) is not StandardRoIHead:
            _refuse(f'a two-stage detector with a {type(roi_head).__name__}')
        head = roi_head.bbox_head
        if not _inherits(head, BBoxHead, '_predict_by_feat_single', 'predict_by_feat'):
            _refuse(f'the box head {type(head).__name__}')
        if not (head.with_cls and head.with_reg) or head.custom_cls_channels:
            _refuse(f'a {type(head).__name__} without boxes or with custom scores')
        extractors = [roi_head.bbox_roi_extractor]
        self.output_names = SingleStage.output_names
        if roi_head.with_mask:
            if type(roi_head.mask_head) is not FCNMaskHead:
                _refuse(f'the mask head {type(roi_head.mask_head).__name__}')
            extractors.append(roi_head.mask_roi_extractor)
            self.output_names += ('masks',)
        for extractor in extractors:
            layers = getattr(extractor, 'roi_layers', [None])
            if type(extractor) is not SingleRoIExtractor or any(
                not isinstance(layer, RoIAlign) or layer.pool_mode != 'avg'
                for layer in layers
            ):
                _refuse(f'{type(extractor).__name__} with {type(layers[0]).__name__}')

    def results(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, ...]:
        roi_head = self.model.roi_head
        cfg = roi_head.test_cfg
        feats = self.model.extract_feat(x)
        proposals, _, labels = _detections(self.model.rpn_head, feats, size, rpn=True)
        rois = _rois(proposals, labels >= 0)
        # The box coder needs the first check, index arithmetic the second
        torch._check(rois.size(0) > 0)
        torch._check(rois.size(0) < 2**31)
        head = roi_head.bbox_head
        pooled = _align(roi_head.bbox_roi_extractor, feats, rois)
        if roi_head.with_shared_head:
            pooled = roi_head.shared_head(pooled)
        logits, deltas = head(pooled)
        classes = 1 if head.reg_class_agnostic else head.num_classes
        boxes = head.bbox_coder.decode(
            rois[:, 1:].repeat_interleave(classes, dim=0),
            deltas.reshape(-1, head.bbox_coder.encode_size),
            max_shape=size,
        ).reshape(-1, classes, 4)
        scores = logits.softmax(-1)[:, : head.num_classes]
        roi, label = (scores > cfg.score_thr).nonzero(as_tuple=True)
        boxes, scores, labels = _suppress(
            boxes[roi, label if classes > 1 else 0],
            scores[roi, label],
            label,
            label,
            rois[:, 0].long()[roi],
            x.size(0),
            cfg,
        )
        if not roi_head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self.masks(feats, boxes, labels)

    def masks(self, feats: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Compute the masks of detections.

        Args:
            feats (Sequence[Tensor]): Outputs of the neck.
            boxes (Tensor): Boxes of the detections, (B, K, 4).
            labels (Tensor): Their labels, (B, K); -1 for no detection.

        Returns:
            Tensor: The masks, (B, K, h, w).
        """
        roi_head = self.model.roi_head
        image, place = (labels >= 0).nonzero(as_tuple=True)
        pooled = _align(roi_head.mask_roi_extractor, feats, _rois(boxes, labels >= 0))
        if roi_head.with_shared_head:
            pooled = roi_head.shared_head(pooled)
        probs = roi_head.mask_head(pooled).sigmoid()
        channel = (
            torch.zeros_like(place) if probs.size(1) == 1 else labels[image, place]
        )
        probs = probs[torch.arange(probs.size(0), device=probs.device), channel]
        masks = probs.new_zeros(*labels.shape, *probs.shape[-2:])
        return masks.index_put((image, place), probs)


def _detections(
    head: Any, feats: Sequence[Tensor], size: Sequence[int], rpn: bool = False
) -> Tuple[Tensor, Tensor, Tensor]:
    """Compute the detections of a dense head.

    Args:
        head (BaseDenseHead): The head.
        feats (Sequence[Tensor]): Outputs of the neck.
        size (Sequence[int]): Height and width of the images.
        rpn (bool): Whether the head proposes regions. Proposals have no score
            threshold, and those of different levels do not suppress each other.
            Defaults to False.

    Returns:
        tuple[Tensor]: Boxes, scores and labels, see :class:`SingleStage`.
    """
    cfg = head.test_cfg
    threshold = -0.5 if rpn else cfg.get('score_thr', 0)
    outs = head(feats)
    factors = outs[2] if len(outs) > 2 else [None] * len(outs[0])
    priors = head.prior_generator.grid_priors(
        [level.shape[-2:] for level in outs[0]], outs[0][0].dtype, outs[0][0].device
    )
    levels: List[Tuple[Tensor, ...]] = []
    for number, (logits, deltas, prior, factor) in enumerate(
        zip(outs[0], outs[1], priors, factors)
    ):
        logits = _last(logits, head.cls_out_channels)
        deltas = _last(deltas, head.bbox_coder.encode_size)
        if head.use_sigmoid_cls:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(-1)[..., :-1]
        batch, num, classes = scores.shape
        # Pad levels with fewer than nms_pre boxes with an impossible score
        scores, index = F.pad(scores.flatten(1), (0, cfg.nms_pre), value=-1.0).topk(
            cfg.nms_pre
        )
        labels = index % classes
        anchor = (index // classes).clamp(max=num - 1)
        deltas = deltas.gather(1, anchor[..., None].expand(-1, -1, deltas.size(-1)))
        boxes = head.bbox_coder.decode(
            prior[anchor.flatten()], deltas.flatten(0, 1), max_shape=size
        )
        boxes = boxes.reshape(batch, cfg.nms_pre, 4)
        keep = scores > threshold
        if cfg.get('min_bbox_size', -1) >= 0:
            keep &= ((boxes[..., 2:] - boxes[..., :2]) > cfg.min_bbox_size).all(-1)
        if factor is not None:
            scores = scores * _last(factor, 1)[..., 0].sigmoid().gather(1, anchor)
        groups = torch.full_like(labels, number) if rpn else labels
        levels.append((boxes, scores, labels, groups, keep))
    boxes, scores, labels, groups, keep = (torch.cat(x, 1) for x in zip(*levels))
    image, place = keep.nonzero(as_tuple=True)
    boxes, scores, labels, groups = (
        x[image, place] for x in (boxes, scores, labels, groups)
    )
    return _suppress(boxes, scores, labels, groups, image, keep.size(0), cfg)


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    groups: Tensor,
    image: Tensor,
    batch: int,
    cfg: Any,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Run non-maximum suppression for several images at once.

    Args:
        boxes (Tensor): Boxes of all images, (M, 4).
        scores (Tensor): Their scores, (M,).
        labels (Tensor): Their labels, (M,).
        groups (Tensor): Groups of boxes; boxes of different groups do not suppress
            each other, (M,).
        image (Tensor): Index of the image of each box, (M,).
        batch (int): Number of images.
        cfg (ConfigDict): ``nms`` and ``max_per_img``, as in a ``test_cfg``.

    Returns:
        tuple[Tensor]: Boxes, scores and labels, see :class:`SingleStage`.
    """
    # Two dummy boxes, because torchvision makes the exporter assume that at least
    # two boxes are kept
    boxes = torch.cat([boxes, boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]] * 2)])
    image = torch.cat([image, image.new_tensor([-1, -2])])
    scores = F.pad(scores, (0, 2))
    labels, groups = (F.pad(x, (0, 2)) for x in (labels, groups))
    # Shift groups horizontally and images vertically, so that none overlap. Shifting
    # both in one direction would lose precision.
    span = boxes.max() - boxes.min() + 1
    if cfg.nms.get('class_agnostic', False):
        groups = torch.zeros_like(groups)
    shift = torch.stack([groups, image, groups, image], -1) * span
    kept = torch.ops.torchvision.nms(boxes + shift, scores, cfg.nms.iou_threshold)
    boxes, scores, labels, image = (x[kept] for x in (boxes, scores, labels, image))
    # Collect the best boxes of each image in a table with max_per_img columns
    of_image = image == torch.arange(batch, device=image.device)[:, None]
    number = cfg.max_per_img
    table = F.pad(torch.where(of_image, scores, -1.0), (0, number), value=-1.0)
    scores, index = table.topk(number)
    boxes = F.pad(boxes, (0, 0, 0, number))[index]
    labels = F.pad(labels, (0, number), value=-1)[index]
    missing = scores < 0
    return (
        boxes.masked_fill(missing[..., None], 0.0),
        scores.clamp(min=0),
        # An empty place may point to the detection of another image
        labels.masked_fill(missing, -1),
    )


def _align(extractor: Any, feats: Sequence[Tensor], rois: Tensor) -> Tensor:
    """Pool the features of RoIs (R, 5), each from the level that fits its size."""
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    total = 0
    for number, (layer, feat) in enumerate(zip(layers, feats)):
        on_level = (levels == number)[:, None]
        # Boxes of other levels become a point, which is cheap. They are masked
        # below, since OpenVINO returns NaN for a point.
        pooled = torch.ops.torchvision.roi_align(
            feat,
            rois * on_level,
            layer.spatial_scale,
            *layer.output_size,
            layer.sampling_ratio,
            layer.aligned,
        )
        total = total + pooled.masked_fill(~on_level[..., None, None], 0.0)
    return total


def _rois(boxes: Tensor, keep: Tensor) -> Tensor:
    """Select boxes, (B, K, 4), and add the index of their image, (R, 5)."""
    image, place = keep.nonzero(as_tuple=True)
    return torch.cat([image[:, None].to(boxes), boxes[image, place]], 1)


def _inherits(instance: Any, cls: type, *names: str) -> bool:
    """Whether an instance inherits methods of a class unchanged."""
    return isinstance(instance, cls) and all(
        getattr(type(instance), name) is getattr(cls, name) for name in names
    )


def _check_dense(head: nn.Module, cls: type) -> None:
    names = '_predict_by_feat_single', 'predict_by_feat', '_bbox_post_process'
    if not _inherits(head, cls, *names) or not hasattr(head, 'prior_generator'):
        _refuse(f'the head {type(head).__name__}')
    _check_selection(head.test_cfg, 'nms_pre')


def _check_selection(cfg: Any, *names: str) -> None:
    for name in ('max_per_img', *names):
        if cfg.get(name, -1) < 1:
            _refuse(f'{name}={cfg.get(name)} in test_cfg; it must be at least 1')
    if cfg.nms.get('type', 'nms') != 'nms':
        _refuse(f'nms type={cfg.nms.type!r}; it must be nms')


def _refuse(what: str) -> None:
    raise ValueError(f'export does not support {what}. Supported are {SUPPORTED}.')


def _last(x: Tensor, channels: int) -> Tensor:
    """Reshape (B, A * channels, H, W) to (B, H * W * A, channels)."""
    return x.permute(0, 2, 3, 1).reshape(x.size(0), -1, channels)


def whole_network(model: nn.Module, raw: bool = True) -> WholeNetwork:
    """Wrap a whole network in an exportable module.

    Args:
        model (nn.Module): A network of mmpretrain or mmdet. This function sets it to
            eval mode.
        raw (bool): See :class:`WholeNetwork`. Defaults to True.

    Returns:
        WholeNetwork: The module. It shares the weights of ``model``.

    Raises:
        ValueError: If the network is not supported.
    """
    kinds: List[Tuple[str, str, Type[WholeNetwork]]] = [
        ('mmpretrain.models', 'ImageClassifier', Classifier),
        ('mmdet.models', 'SingleStageDetector', SingleStage),
        ('mmdet.models', 'TwoStageDetector', TwoStage),
    ]
    for package, name, kind in kinds:
        # By name, so that no toolbox has to be imported
        if any(
            base.__name__ == name and base.__module__.startswith(package)
            for base in type(model).__mro__
        ):
            return kind(model.eval(), raw).eval()
    _refuse(type(model).__name__)
    raise AssertionError
