"""Variants of one network, ready to run a step.

All variants start from the same weights, as far as they share them. Images and labels
are random; nothing is downloaded.
"""

import argparse
import contextlib
import copy
import re
import time
from typing import Callable, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmela_light.measuring import DTYPES, VARIANTS, WHOLE, WITH_BACKEND

from ..analysis.complexity import input_size
from ..arguments import arguments_of
from ..attach import input_channels
from ..command_line import find_config, one_line
from ..convert.networks import NETWORK_ERRORS
from ..hooks import use_channels_last
from ..ops import BACKENDS
from ..pruning import PruningReport
from ..registry import find_layer_attention
from ..structure import layer_attentions, prune
from . import published_form  # noqa: F401  (registration)
from .memory import peak_rise, storage_bytes, tensors_in
from .rounds import synchronize


class Network:
    """The network of ``--net``, in all its variants.

    Args:
        args (argparse.Namespace): Options. Missing ``size`` and ``batch`` are set.

    Raises:
        ValueError: If an option is invalid.
        FileNotFoundError: If the config does not exist.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        for variant in args.variants:
            name, _, form = variant.partition(':')
            backends = BACKENDS if name in WITH_BACKEND else ()
            if name not in VARIANTS or form not in ('', WHOLE, *backends):
                raise ValueError(
                    f'--variants: {variant!r} is unknown; allowed are '
                    f'{", ".join(VARIANTS)}, any with :{WHOLE}, and '
                    f'{", ".join(WITH_BACKEND)} with one of :{", :".join(BACKENDS)}'
                )
        if len(set(args.variants)) < len(args.variants):
            raise ValueError(
                f'--variants={" ".join(args.variants)} has a variant twice'
            )
        self.args = args
        self.weights: Dict[str, Tensor] = {}
        self.pruned, self.keep_value = _to_prune(args.prune)
        known = re.fullmatch(r'(r|cifar)(\d+)', args.net)
        cfg = _resnet(known[1] == 'cifar', int(known[2])) if known else _read(args.net)
        self.scope = cfg.get('default_scope')
        self.model = cfg.get('model') or {}
        if not isinstance(self.model.get('backbone'), dict):
            raise ValueError(f'--net={args.net} has no model.backbone')
        if self.scope not in ('mmdet', 'mmpretrain'):
            raise ValueError(
                f'--net={args.net} has default_scope={self.scope!r}; allowed are '
                'mmpretrain (a classifier) and mmdet (a detector)'
            )
        self.attention = self.model.backbone.pop('layer_attention', None) or {}
        self.is_detector = self.scope == 'mmdet'
        args.size = args.size or input_size(cfg)
        batch = 2 if self.is_detector else 128 if args.size == (32, 32) else 8
        args.batch = batch if args.batch is None else args.batch
        if args.batch < 1:
            raise ValueError(f'--batch={args.batch} is not positive')
        self._batch: Optional[dict] = None

    def build(self, variant: str) -> nn.Module:
        """Build a variant; for ``ela``, with pruned attentions.

        Args:
            variant (str): Its name.

        Returns:
            nn.Module: A classifier or detector, on the CPU.

        Raises:
            ValueError: If it cannot be built.
        """
        name, _, form = variant.partition(':')
        model = copy.deepcopy(self.model)
        backbone = model.backbone
        if str(backbone.type).endswith('WithLayerAttention'):
            backbone = backbone.backbone
        backbone.init_cfg = None
        plain = re.sub(r'(^|\.)ELA', r'\1', str(backbone.type))
        with_attention = re.sub(r'(^|\.)(\w+)$', r'\1ELA\2', plain)
        backbone.type = plain
        torch.manual_seed(0)
        with MODELS.switch_scope_and_registry(self.scope) as registry:
            config = VARIANTS[name]
            if config is not None:
                attention = dict(config, drop_path=0.0)
                if 'head_dim' in arguments_of(find_layer_attention(config['type'])):
                    attention['head_dim'] = self.args.head_dim or self.attention.get(
                        'head_dim', 16 if self.args.net.startswith('cifar') else 32
                    )
                if form in BACKENDS:
                    attention['backend'] = form
                if registry.get(with_attention) is None:
                    backbone = dict(type='mmela.WithLayerAttention', backbone=backbone)
                else:
                    backbone.type = with_attention
                backbone['layer_attention'] = attention
            model.backbone = backbone
            try:
                built = registry.build(model)
            except NETWORK_ERRORS as error:
                raise ValueError(
                    f'{variant} of --net={self.args.net} cannot be built: '
                    f'{one_line(error)}'
                ) from error
        state = built.state_dict()
        for key, value in state.items():
            known = self.weights.setdefault(key, value.clone())
            if known.shape == value.shape:
                state[key] = known
        built.load_state_dict(state)
        if name == 'ela':
            names = list(layer_attentions(built))
            pruned = half(names) if self.pruned is None else self.pruned
            prune(built, pruned, self.keep_value)
        return built

    def batch(self, model: nn.Module, device: torch.device) -> dict:
        """Draw random images with annotations for the losses.

        Args:
            model (nn.Module): A variant.
            device (torch.device): Its device.

        Returns:
            dict: ``inputs`` (B, C, H, W) and ``data_samples``.
        """
        if self._batch is None:
            channels = input_channels(model)
            if self.is_detector:
                from mmdet.testing import demo_mm_inputs

                count = self.args.batch
                head = getattr(model, 'bbox_head', None) or model.roi_head.bbox_head
                packed = demo_mm_inputs(
                    count,
                    [(channels, *self.args.size)] * count,
                    num_items=[8] * count,
                    num_classes=head.num_classes,
                    with_mask=getattr(model, 'with_mask', False),
                )
                self._batch = model.data_preprocessor(packed, True)
            else:
                from mmpretrain.structures import DataSample

                inputs = torch.randn(self.args.batch, channels, *self.args.size)
                labels = torch.randint(model.head.num_classes, (self.args.batch,))
                samples = [DataSample().set_gt_label(int(n)) for n in labels]
                self._batch = dict(inputs=inputs, data_samples=samples)
        form = (
            torch.channels_last if self.args.channels_last else torch.contiguous_format
        )
        return dict(
            inputs=self._batch['inputs'].to(device).contiguous(memory_format=form),
            data_samples=[s.to(device) for s in self._batch['data_samples']],
        )


def _read(config: str) -> Config:
    path = find_config(config)
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is code and may raise anything
        raise ValueError(f'{config} cannot be read: {one_line(error)}') from error


def _resnet(cifar: bool, depth: int) -> Config:
    plain, channels, classes = (
        ('BottleneckResNet_CIFAR', 256, 100) if cifar else ('ResNet', 2048, 1000)
    )
    head = dict(type='LinearClsHead', num_classes=classes, in_channels=channels)
    model = dict(
        type='ImageClassifier',
        backbone=dict(type=plain, depth=depth),
        neck=dict(type='GlobalAveragePooling'),
        head=head,
    )
    data = dict(dataset=dict(type='CIFAR100')) if cifar else {}
    return Config(dict(default_scope='mmpretrain', model=model, test_dataloader=data))


def _to_prune(names: Optional[Sequence[str]]) -> tuple:
    """Names from ``--prune`` (None for the default), and whether values are kept."""
    if names and names[0].endswith('.json'):
        if len(names) > 1:
            raise ValueError(
                f'--prune={" ".join(names)} must be one pruning.json or names of blocks'
            )
        decisions = PruningReport.read(names[0]).decisions
        keep = {d.keep_value for d in decisions}
        return [n for d in decisions for n in d.pruned], keep == {True}
    return names, False


def half(names: Sequence[str]) -> List[str]:
    """Choose the second, fourth, ... attention of each stage.

    Args:
        names (Sequence[str]): Attentions in the order of the network, such as
            ``backbone.layer1.0.layer_attn``.

    Returns:
        list[str]: Attentions to prune.
    """
    stages: Dict[str, List[str]] = {}
    for name in names:
        stages.setdefault(name.rsplit('.', 2)[0], []).append(name)
    return [name for stage in stages.values() for name in stage[1::2]]


class Contestant:
    """A variant of a network with its batch and optimizer.

    Args:
        variant (str): Its name.
        network (Network): The network.
        device (torch.device): Its device.
    """

    def __init__(self, variant: str, network: Network, device: torch.device) -> None:
        self.args = network.args
        self.device = device
        self.is_detector = network.is_detector
        self.model = model = network.build(variant)
        self.batch = network.batch(model, device)
        model.to(device)
        if self.args.channels_last:
            use_channels_last(model)
        if variant.endswith(f':{WHOLE}'):
            model.backbone.compile()
        # A low rate, so that random data does not lead to infinite weights
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=1e-5,
            momentum=0.9,
            weight_decay=1e-4,
        )
        scaled = self.args.dtype == 'fp16' and device.type == 'cuda'
        scaler = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)
        self.scaler = scaler(enabled=scaled)

    def autocast(self):
        """Context of a forward pass: autocast, except for fp32."""
        if self.args.dtype == 'fp32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, DTYPES[self.args.dtype]))

    def train_step(self) -> Tensor:
        """Run forward, backward and an SGD step; returns the loss, ()."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self.model(**self.batch, mode='loss')
        loss = self.model.parse_losses(losses)[0]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> object:
        """Run inference; returns class scores, or detections of a detector."""
        with self.autocast():
            if self.is_detector:
                return self.model(**self.batch, mode='predict')
            return self.model(self.batch['inputs'], mode='tensor')

    def prepare(self, train: bool, warmup: int) -> Dict[str, object]:
        """Warm up, and measure everything except the time.

        Args:
            train (bool): Whether to run training steps; otherwise inference.
            warmup (int): Number of unmeasured steps.

        Returns:
            dict: ``parameters``; ``attentions`` and ``active``, the numbers of layer
            attentions; ``first_seconds``, the time of the first step with compilation;
            ``graphs``, the number of compiled graphs; ``loss`` of the first training
            step; ``peak_bytes``.
        """
        self.model.train(train)
        step: Callable[[], object] = self.train_step if train else self.infer
        attentions = layer_attentions(self.model)
        graphs = compiled_graphs()
        result: Dict[str, object] = dict(
            parameters=sum(p.numel() for p in self.model.parameters()),
            attentions=len(attentions),
            active=sum(a.active for a in attentions.values()),
        )
        torch.manual_seed(0)  # a detector samples proposals
        for index in range(warmup):
            start = time.perf_counter()
            out = step()
            synchronize(self.device)
            if index == 0:
                result['first_seconds'] = time.perf_counter() - start
                result['loss'] = float(out) if train else None
        del out
        self.optimizer.zero_grad(set_to_none=True)
        alive = [
            *self.model.parameters(),
            *self.model.buffers(),
            *([list(s.values()) for s in self.optimizer.state.values()] * train),
            self.batch,
        ]
        peak = storage_bytes(tensors_in(alive)) + peak_rise(step, self.device)
        return dict(result, graphs=compiled_graphs() - graphs, peak_bytes=peak)


def compiled_graphs() -> int:
    """Number of graphs that ``torch.compile`` has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters['stats']['unique_graphs']
