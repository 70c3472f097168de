"""Networks to measure: one network with different layer attentions.

All start with the same weights as far as they have them in common, so
variants that are the same function (MRLA-base in all its forms) have the same
loss in the first step. Nothing is downloaded.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmela.hooks import use_channels_last
from mmela.ops import BACKENDS
from mmela.pruning import PruningReport
from mmela.structure import layer_attentions, prune

from . import published_form  # noqa: F401  (registration)
from .common import DTYPES, autocast, parse_size, synchronize
from .memory import peak_rise, storage_bytes, tensors_in
from .traffic import sum_traffic

ROOT = Path(__file__).resolve().parents[2]

# Layer attention of each variant
VARIANTS = {
    'resnet': None,
    'published': 'PublishedMRLABase',
    'mla': 'MLA',
    'mrla-base': 'MRLABase',
    'mrla-light': 'MRLALight',
    'ela': 'MRLABase',
    'kcla': 'KCLA',
}
WITH_BACKEND = ('mrla-base', 'ela')

IMAGENET = dict(r50=50, r101=101, r152=152)
CIFAR = dict(cifar20=20, cifar56=56, cifar110=110)
DETECTORS = {
    'faster-rcnn': 'faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py',
    'faster-rcnn-r101': 'faster_rcnn/faster-rcnn_r101_ela_fpn_1x_coco.py',
    'mask-rcnn': 'mask_rcnn/mask-rcnn_r50_ela_fpn_1x_coco.py',
    'mask-rcnn-r101': 'mask_rcnn/mask-rcnn_r101_ela_fpn_1x_coco.py',
}
NETS = (*IMAGENET, *CIFAR, *DETECTORS)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to measure.

    Args:
        parser (argparse.ArgumentParser): The tool's parser.
    """
    parser.add_argument(
        '--net', choices=NETS, default='r50', help='network (default: r50)'
    )
    parser.add_argument(
        '--size',
        type=parse_size,
        metavar='N|HxW',
        help='image size in pixels (default: 224, CIFAR 32, detectors '
        '800x1333 on a GPU and 192x256 on a CPU)',
    )
    parser.add_argument(
        '--batch',
        type=int,
        help='images (default: 8; 128 for CIFAR; detectors 2 on a GPU and 1 on a CPU)',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        default=list(VARIANTS),
        metavar='NAME',
        help=f'what to compare: {", ".join(VARIANTS)}; mrla-base and ela with '
        'a backend as in mrla-base:reference (default: all)',
    )
    parser.add_argument(
        '--backend',
        choices=BACKENDS,
        default='auto',
        help='backend of mrla-base and ela where the name has none (default: auto)',
    )
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument(
        '--prune',
        nargs='+',
        metavar='BLOCK',
        help='attentions that ela goes without, e.g. layer3.1 layer3.2 '
        '(default: the second, fourth, ... of each stage)',
    )
    mask.add_argument(
        '--mask',
        metavar='FILE',
        help='the same from pruning.json of a run, the JSON file of '
        'tools/convert/prune.py, or a JSON list of names',
    )
    parser.add_argument(
        '--head-dim',
        type=int,
        help='channels of a head (default: 16 for CIFAR, else 32; for kcla in '
        'detectors 64)',
    )
    parser.add_argument(
        '--drop-path',
        type=float,
        default=0.0,
        help='drop rate of the attention branch (default: 0 for all variants)',
    )
    parser.add_argument(
        '--compile', action='store_true', help='torch.compile the backbones'
    )


def complete_options(args: argparse.Namespace, device: torch.device) -> None:
    """Check the options of :func:`add_network_options`; fill in defaults.

    Args:
        args (argparse.Namespace): Parsed options. Afterwards ``size`` is a
            pair and ``prune`` the list of names, None for the default mask.
        device (torch.device): Device to measure on.

    Raises:
        SystemExit: If an option is wrong.
    """
    for variant in args.variants:
        name, *backend = variant.split(':')
        if name not in VARIANTS:
            raise SystemExit(
                f'error: --variants: {name!r} is unknown; '
                f'allowed are {", ".join(VARIANTS)}'
            )
        if (
            backend
            and name not in WITH_BACKEND
            or len(backend) > 1
            or not set(backend) <= set(BACKENDS)
        ):
            raise SystemExit(
                f'error: --variants: {variant!r}; {" and ".join(WITH_BACKEND)}'
                f' take one of the backends {", ".join(BACKENDS)}'
            )
    if len(set(args.variants)) < len(args.variants):
        raise SystemExit(
            f'error: --variants names a variant twice: {" ".join(args.variants)}'
        )
    on_gpu = device.type == 'cuda'
    if args.net in DETECTORS:
        size = (800, 1333) if on_gpu else (192, 256)
        batch = 2 if on_gpu else 1
    else:
        size = (32, 32) if args.net in CIFAR else (224, 224)
        batch = 128 if args.net in CIFAR else 8
    args.size = args.size or size
    args.batch = batch if args.batch is None else args.batch
    if args.batch < 1:
        raise SystemExit(f'error: --batch={args.batch} is not positive')
    if args.mask:
        args.prune = read_mask(args.mask)


def read_mask(path: str) -> List[str]:
    """Names of pruned attentions from a JSON file.

    Args:
        path (str): ``pruning.json`` of the pruning hook, whose decisions are
            taken together; the report of ``tools/convert/prune.py``; or a list
            of names.

    Returns:
        list[str]: The names.

    Raises:
        SystemExit: If it is none of these.
    """
    try:
        content = json.loads(Path(path).read_text())
        if isinstance(content, dict) and 'hook' in content:
            decisions = PruningReport.read(path).decisions
            if any(decision.keep_value for decision in decisions):
                raise ValueError('keep_value=True is not supported')
            content = [name for decision in decisions for name in decision.pruned]
        elif isinstance(content, dict):
            content = content['pruned']
        if not isinstance(content, list) or not all(
            isinstance(name, str) for name in content
        ):
            raise ValueError('no list of names in it')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f'error: --mask={path}: {error!r}') from None
    return content


def half_mask(names: Sequence[str]) -> List[str]:
    """Every second attention of each stage, the first not among them.

    Args:
        names (Sequence[str]): Attentions in the order of the network, e.g.
            ``backbone.layer1.0.layer_attn``.

    Returns:
        list[str]: Those to prune.
    """
    stages: Dict[str, List[str]] = {}
    for name in names:
        stages.setdefault(name.rsplit('.', 2)[0], []).append(name)
    return [name for stage in stages.values() for name in stage[1::2]]


def find_attentions(blocks: Sequence[str], names: Sequence[str]) -> List[str]:
    """Full names of attentions that are named by their blocks.

    Args:
        blocks (Sequence[str]): Names such as ``layer3.1``, with or without
            ``backbone.`` before and ``.layer_attn`` behind.
        names (Sequence[str]): Full names of all attentions.

    Returns:
        list[str]: Those that are meant.

    Raises:
        SystemExit: If there is no such attention.
    """
    short = {re.sub(r'.*(layer\d+\.\d+)\.layer_attn$', r'\1', n): n for n in names}
    found = []
    for block in blocks:
        key = block.replace('backbone.', '').replace('.layer_attn', '')
        if key not in short:
            raise SystemExit(
                f'error: {block!r} has no layer attention; '
                f'allowed are {", ".join(short)}'
            )
        found.append(short[key])
    return found


def attention_config(variant: str, args: argparse.Namespace) -> Optional[dict]:
    """Config of the layer attention of a variant; None for none."""
    name, *backend = variant.split(':')
    if VARIANTS[name] is None:
        return None
    head_dim = args.head_dim
    if head_dim is None:
        head_dim = 16 if args.net in CIFAR else 32
        if name == 'kcla' and args.net in DETECTORS:
            head_dim = 64
    config = dict(type=VARIANTS[name], head_dim=head_dim, drop_path=args.drop_path)
    if name in WITH_BACKEND:
        config['backend'] = backend[0] if backend else args.backend
    return config


def build_network(variant: str, args: argparse.Namespace) -> nn.Module:
    """Build a variant of the network.

    Args:
        variant (str): Its name.
        args (argparse.Namespace): Options.

    Returns:
        nn.Module: An ``ImageClassifier`` or a detector, on the CPU. In ``ela``
        attentions are pruned.

    Raises:
        SystemExit: If the network cannot be built so.
    """
    attention = attention_config(variant, args)
    try:
        model = (
            _detector(attention, args)
            if args.net in DETECTORS
            else _classifier(attention, args)
        )
    except ValueError as error:
        raise SystemExit(f'error: {variant}: {error}') from None
    return model


def prune_network(variant: str, model: nn.Module, args: argparse.Namespace) -> None:
    """Prune the attentions of ``ela`` that the options name."""
    if variant.split(':')[0] != 'ela':
        return
    names = list(layer_attentions(model))
    prune(
        model,
        half_mask(names) if args.prune is None else find_attentions(args.prune, names),
    )


def _classifier(attention: Optional[dict], args: argparse.Namespace) -> nn.Module:
    from mmpretrain.registry import MODELS

    if args.net in IMAGENET:
        plain, channels, classes = 'ResNet', 2048, 1000
        depth = IMAGENET[args.net]
    else:
        plain, channels, classes = 'BottleneckResNet_CIFAR', 256, 100
        depth = CIFAR[args.net]
    backbone = dict(type=plain, depth=depth)
    if attention is not None:
        backbone.update(type=f'ELA{plain}', layer_attention=attention)
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=classes, in_channels=channels),
        )
    )


def _detector(attention: Optional[dict], args: argparse.Namespace) -> nn.Module:
    from mmdet.registry import MODELS

    config = Config.fromfile(ROOT / 'configs' / DETECTORS[args.net]).model
    config.backbone.init_cfg = None
    config.backbone.layer_attention = attention
    if attention is None:
        config.backbone.pop('layer_attention')
        config.backbone.type = 'ResNet'
    return MODELS.build(config)


def fake_batch(model: nn.Module, args: argparse.Namespace) -> dict:
    """Random images with annotations, as the network's losses take them.

    Args:
        model (nn.Module): A network of :func:`build_network`.
        args (argparse.Namespace): Options.

    Returns:
        dict: ``inputs`` (B, 3, H, W) and ``data_samples``, on the CPU.
    """
    height, width = args.size
    if args.net in DETECTORS:
        from mmdet.testing import demo_mm_inputs

        packed = demo_mm_inputs(
            args.batch,
            [(3, height, width)] * args.batch,
            num_items=[8] * args.batch,
            num_classes=80,
            with_mask=args.net.startswith('mask'),
        )
        return model.data_preprocessor(packed, True)
    from mmpretrain.structures import DataSample

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(args.batch, 3, height, width, generator=generator)
    labels = torch.randint(model.head.num_classes, (args.batch,), generator=generator)
    return dict(
        inputs=inputs, data_samples=[DataSample().set_gt_label(int(n)) for n in labels]
    )


class Contestant:
    """A network together with what a step of it needs.

    Args:
        variant (str): Name of the variant.
        args (argparse.Namespace): Options.
        device (torch.device): Where it runs.
        weights (dict[str, Tensor]): Weights to start with where name and shape
            fit. Those that it adds are put in.
        batch (dict, optional): Batch on the device. Defaults to None, which
            makes one.
        train (bool): For training steps; otherwise for inference. Defaults to
            True.
    """

    def __init__(
        self,
        variant: str,
        args: argparse.Namespace,
        device: torch.device,
        weights: Dict[str, Tensor],
        batch: Optional[dict] = None,
        train: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.args = args
        self.device = device
        self.model = model = build_network(variant, args)
        state = model.state_dict()
        state.update(
            {
                key: value
                for key, value in weights.items()
                if key in state and value.shape == state[key].shape
            }
        )
        model.load_state_dict(state)
        for key, value in state.items():
            weights.setdefault(key, value.clone())
        prune_network(variant, model, args)
        if batch is None:
            batch = fake_batch(model, args)
            batch['inputs'] = batch['inputs'].to(device)
            batch['data_samples'] = [
                sample.to(device) for sample in batch['data_samples']
            ]
        model.to(device)
        if args.channels_last:
            use_channels_last(model)
            batch['inputs'] = batch['inputs'].contiguous(
                memory_format=torch.channels_last
            )
        self.batch = batch
        model.train(train)
        self.optimizer = self.scaler = None
        if train:
            # So slow that random data does not lead to infinite weights
            self.optimizer = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad],
                lr=1e-5,
                momentum=0.9,
                weight_decay=1e-4,
            )
            if args.dtype == 'fp16' and device.type == 'cuda':
                self.scaler = torch.cuda.amp.GradScaler()

    def loss(self) -> Tensor:
        """Forward pass and losses.

        Returns:
            Tensor: The sum of the losses, ().
        """
        with autocast(self.device, self.args.dtype):
            losses = self.model(**self.batch, mode='loss')
        return self.model.parse_losses(losses)[0]

    def train_step(self) -> Tensor:
        """Forward, backward and SGD step.

        Returns:
            Tensor: The loss, ().
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> object:
        """Class scores, or the detections of a detector.

        Returns:
            object: What the network's forward returns.
        """
        detector = self.args.net in DETECTORS
        with autocast(self.device, self.args.dtype):
            if detector:
                return self.model(**self.batch, mode='predict')
            return self.model(self.batch['inputs'], mode='tensor')

    def step(self) -> object:
        """What is measured: a training step or inference."""
        return self.infer() if self.optimizer is None else self.train_step()

    def prepare(self, warmup: int) -> dict:
        """Warm up, and measure all but the time.

        Args:
            warmup (int): Steps before anything is measured.

        Returns:
            dict: ``parameters`` and ``trainable``, their numbers;
            ``attentions`` and ``active``, numbers of layer attentions;
            ``pruned``, their names; ``loss`` of the first step (training);
            ``peak_bytes``; ``resident_bytes``, the part of it that is there
            before the step; ``traffic``, see :func:`traffic.sum_traffic`.
        """
        attentions = layer_attentions(self.model)
        params = list(self.model.parameters())
        result = dict(
            parameters=sum(p.numel() for p in params),
            trainable=sum(p.numel() for p in params if p.requires_grad),
            attentions=len(attentions),
            active=sum(a.active for a in attentions.values()),
            pruned=[n for n, a in attentions.items() if not a.active],
        )
        # Before it is compiled: hooks would have it compiled anew
        torch.manual_seed(0)  # a detector samples proposals
        forward = self.infer if self.optimizer is None else self.loss
        itemsize = torch.empty(0, dtype=DTYPES[self.args.dtype]).element_size()
        result['traffic'] = sum_traffic(self.model, forward, itemsize)
        if self.args.compile:
            self.model.backbone.compile()
        torch.manual_seed(0)
        for index in range(warmup):
            out = self.step()
            if index == 0 and self.optimizer is not None:
                result['loss'] = float(out)
        del out
        synchronize(self.device)
        state = []
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
            state = [list(s.values()) for s in self.optimizer.state.values()]
        resident = storage_bytes(
            tensors_in([params, list(self.model.buffers()), state, self.batch])
        )
        result.update(
            resident_bytes=resident,
            peak_bytes=resident + peak_rise(self.step, self.device),
        )
        return result
