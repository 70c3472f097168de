"""Whole networks as modules that can be exported: tensors in, tensors out.

A toolbox's detector returns lists of objects, one image after the other, by
code that asks for the values of tensors. The modules here run its own backbone,
neck, heads, anchors and box coders, and select by operators that the exchange
formats have: top-k, NonMaxSuppression, RoiAlign.
"""

from typing import Any, List, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SUPPORTED = (
    'ImageClassifier of mmpretrain with one head of scores by softmax; of mmdet, '
    'single-stage detectors whose head is decoded as BaseDenseHead does (RetinaNet, '
    'FCOS, ATSS, SSD), and Faster R-CNN and Mask R-CNN, which are an RPNHead and a '
    'StandardRoIHead'
)


class WholeNetwork(nn.Module):
    """A network with its pre-processing, from images to results.

    Args:
        model (nn.Module): A network of mmpretrain or mmdet.
        raw (bool): Take images as they are loaded, and normalize and pad them as
            the network's own pre-processing does. Otherwise images are
            normalized already. Defaults to True.

    Attributes:
        output_names (tuple[str]): What :meth:`forward` returns.

    Raises:
        ValueError: If the network is none of the kinds supported.
    """

    output_names: Tuple[str, ...]

    def __init__(self, model: nn.Module, raw: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        self.raw = raw
        self.check()

    def check(self) -> None:
        """Raise a ValueError where the network is computed in another way."""
        raise NotImplementedError

    def results(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, ...]:
        """What the network finds.

        Args:
            x (Tensor): Normalized images, (B, C, H, W).
            size (Sequence[int]): Height and width of what of them is no padding.

        Returns:
            tuple[Tensor]: Results, as the class says.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Run the network.

        Args:
            images (Tensor): Shape (B, C, H, W). With ``raw``, values 0 to 255 of
                any type, the channels in the order in which the config loads
                them.

        Returns:
            tuple[Tensor]: As ``output_names`` says.
        """
        with _ExportablePooling():
            return self.results(self.prepare(images), images.shape[-2:])

    def prepare(self, images: Tensor) -> Tensor:
        """What the network's pre-processing makes of images.

        Its own code asks for their size as a number, so this does the same.

        Args:
            images (Tensor): See :meth:`forward`.

        Returns:
            Tensor: Normalized and padded images in float32, (B, C, H, W).
        """
        own = self.model.data_preprocessor
        x = images.float()
        if self.raw:
            # By mmengine's class, which mmdet has, and by that of mmpretrain
            names = '_channel_conversion', 'to_rgb'
            if x.size(1) == 3 and any(getattr(own, name, False) for name in names):
                x = x.flip(1)
            if own._enable_normalize:
                x = (x - own.mean) / own.std
        divisor = own.pad_size_divisor
        if divisor == 1:
            return x
        # Too much, and then a part of it: where a size needs no padding, the
        # exporter would take it that none does
        # and not -(-n // divisor), as ONNX rounds towards zero
        height, width = (
            (n + divisor - 1) // divisor * divisor for n in images.shape[-2:]
        )
        x = F.pad(x, (0, divisor, 0, divisor), value=own.pad_value)
        return x[..., :height, :width]


class _ExportablePooling(TorchFunctionMode):
    """Takes every other pixel by a slice where a network does by max-pooling.

    FPN does so for its smallest map. The exporter asks a pooling whether the
    size is even, and then takes it for so with all images.
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
        own = isinstance(head, ClsHead) and not isinstance(head, MultiLabelClsHead)
        if not own or not _inherits(head, ClsHead, '_get_predictions'):
            _refuse(f'the head {type(head).__name__}')

    def results(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, ...]:
        return (self.model(x, mode='tensor').softmax(-1),)


class SingleStage(WholeNetwork):
    """A single-stage detector.

    Results are ``K`` boxes of each image, the best first, where ``K`` is the
    ``max_per_img`` of the config: corners x1, y1, x2, y2 in pixels of the
    image given, (B, K, 4), scores (B, K) and labels (B, K). Where there are
    fewer detections, the rest has score 0 and label -1.
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

    Results are those of :class:`SingleStage`. Mask R-CNN has ``masks`` too,
    (B, K, 28, 28): how likely each pixel of a grid over the box is of the
    object.
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
            _refuse(f'a {type(head).__name__} without boxes or with scores of its own')
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
        proposals, _, found = _detections(self.model.rpn_head, feats, size, rpn=True)
        rois = _rois(proposals, found >= 0)
        # The coder asks for the first, the exporter multiplies the second
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
        """Masks of detections.

        Args:
            feats (Sequence[Tensor]): What the neck returns.
            boxes (Tensor): Their boxes, (B, K, 4).
            labels (Tensor): Their labels, (B, K), -1 where there is none.

        Returns:
            Tensor: Shape (B, K, h, w).
        """
        roi_head = self.model.roi_head
        image, place = (labels >= 0).nonzero(as_tuple=True)
        pooled = _align(roi_head.mask_roi_extractor, feats, _rois(boxes, labels >= 0))
        if roi_head.with_shared_head:
            pooled = roi_head.shared_head(pooled)
        found = roi_head.mask_head(pooled).sigmoid()
        one = torch.zeros_like(place) if found.size(1) == 1 else labels[image, place]
        found = found[torch.arange(found.size(0), device=found.device), one]
        masks = found.new_zeros(*labels.shape, *found.shape[-2:])
        return masks.index_put((image, place), found)


def _detections(
    head: Any, feats: Sequence[Tensor], size: Sequence[int], rpn: bool = False
) -> Tuple[Tensor, Tensor, Tensor]:
    """What a dense head detects.

    Args:
        head (BaseDenseHead): The head.
        feats (Sequence[Tensor]): What the neck returns.
        size (Sequence[int]): Height and width of the images.
        rpn (bool): Whether it proposes regions: these have no threshold, and
            those of different levels do not suppress each other. Defaults to
            False.

    Returns:
        tuple[Tensor]: As :class:`SingleStage` says.
    """
    cfg = head.test_cfg
    threshold = -0.5 if rpn else cfg.get('score_thr', 0)
    outs = head(feats)
    factors = outs[2] if len(outs) > 2 else [None] * len(outs[0])
    priors = head.prior_generator.grid_priors(
        [level.shape[-2:] for level in outs[0]], outs[0][0].dtype, outs[0][0].device
    )
    found: List[Tuple[Tensor, ...]] = []
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
        # Places that a small level lacks get a score that none has
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
        found.append((boxes, scores, labels, groups, keep))
    boxes, scores, labels, groups, keep = (torch.cat(x, 1) for x in zip(*found))
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
    """Non-maximum suppression of the boxes of several images at once.

    Args:
        boxes (Tensor): Boxes of all images, (M, 4).
        scores (Tensor): Their scores, (M,).
        labels (Tensor): Their labels, (M,).
        groups (Tensor): Boxes of different groups do not meet, (M,).
        image (Tensor): Index of the image of each, (M,).
        batch (int): Number of images.
        cfg (ConfigDict): ``nms`` and ``max_per_img``, as in a ``test_cfg``.

    Returns:
        tuple[Tensor]: As :class:`SingleStage` says.
    """
    # Two boxes that no image has: torchvision tells the exporter that at least two
    # are kept
    boxes = torch.cat([boxes, boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]] * 2)])
    image = torch.cat([image, image.new_tensor([-1, -2])])
    scores = F.pad(scores, (0, 2))
    labels, groups = (F.pad(x, (0, 2)) for x in (labels, groups))
    # Groups lie side by side, images below each other, so that none overlap.
    # With both in one row, coordinates would lose precision.
    span = boxes.max() - boxes.min() + 1
    if cfg.nms.get('class_agnostic', False):
        groups = torch.zeros_like(groups)
    shift = torch.stack([groups, image, groups, image], -1) * span
    kept = torch.ops.torchvision.nms(boxes + shift, scores, cfg.nms.iou_threshold)
    boxes, scores, labels, image = (x[kept] for x in (boxes, scores, labels, image))
    # The best of each image, in a table that is as wide for all
    own = image == torch.arange(batch, device=image.device)[:, None]
    number = cfg.max_per_img
    table = F.pad(torch.where(own, scores, -1.0), (0, number), value=-1.0)
    scores, index = table.topk(number)
    boxes = F.pad(boxes, (0, 0, 0, number))[index]
    labels = F.pad(labels, (0, number), value=-1)[index]
    missing = scores < 0
    return (
        boxes.masked_fill(missing[..., None], 0.0),
        scores.clamp(min=0),
        # A place may be that of another image's detection
        labels.masked_fill(missing, -1),
    )


def _align(extractor: Any, feats: Sequence[Tensor], rois: Tensor) -> Tensor:
    """Features of RoIs (R, 5), each from the level that fits its size."""
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    total = 0
    for number, (layer, feat) in enumerate(zip(layers, feats)):
        here = (levels == number)[:, None]
        # The boxes of other levels shrink to a point, which takes no time; of a
        # point OpenVINO makes NaN
        pooled = torch.ops.torchvision.roi_align(
            feat,
            rois * here,
            layer.spatial_scale,
            *layer.output_size,
            layer.sampling_ratio,
            layer.aligned,
        )
        total = total + pooled.masked_fill(~here[..., None, None], 0.0)
    return total


def _rois(boxes: Tensor, keep: Tensor) -> Tensor:
    """(B, K, 4) to (R, 5): those to keep, with the index of their image."""
    image, place = keep.nonzero(as_tuple=True)
    return torch.cat([image[:, None].to(boxes), boxes[image, place]], 1)


def _inherits(instance: Any, cls: type, *names: str) -> bool:
    """Whether an instance has methods of a class as they are."""
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
    """(B, A * channels, H, W) to (B, H * W * A, channels)."""
    return x.permute(0, 2, 3, 1).reshape(x.size(0), -1, channels)


def whole_network(model: nn.Module, raw: bool = True) -> WholeNetwork:
    """A module of a whole network that can be exported.

    Args:
        model (nn.Module): A network of mmpretrain or mmdet; set to eval mode here.
        raw (bool): See :class:`WholeNetwork`. Defaults to True.

    Returns:
        WholeNetwork: It shares the weights of ``model``.

    Raises:
        ValueError: If the network is none of the kinds supported.
    """
    kinds: List[Tuple[str, str, Type[WholeNetwork]]] = [
        ('mmpretrain.models', 'ImageClassifier', Classifier),
        ('mmdet.models', 'SingleStageDetector', SingleStage),
        ('mmdet.models', 'TwoStageDetector', TwoStage),
    ]
    for package, name, kind in kinds:
        # Not imported: who has such a network has the package
        if any(
            base.__name__ == name and base.__module__.startswith(package)
            for base in type(model).__mro__
        ):
            return kind(model.eval(), raw).eval()
    _refuse(type(model).__name__)
    raise AssertionError
