"""A network of two stages that trains in milliseconds, and runs of it."""

from uuid import uuid4

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import Dataset

from mmela import attach_layer_attention

CHANNELS = 8


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


@MODELS.register_module()
class ToyNetwork(BaseModel):
    def __init__(
        self, layer_attention=None, depth=4, norm_eval=False, frozen_stages=0, **kwargs
    ):
        super().__init__(**kwargs)
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        for name in ('layer1', 'layer2'):
            blocks = [ResidualBlock() for _ in range(depth)]
            setattr(self, name, nn.Sequential(*blocks))
        self.head = nn.Linear(CHANNELS, 1)
        if layer_attention:
            blocks = [
                [f'{name}.{i}' for i in range(depth)] for name in ('layer1', 'layer2')
            ]
            attach_layer_attention(self, layer_attention, blocks, input_size=(6, 8))

    def train(self, mode=True):
        super().train(mode)
        if self.frozen_stages:
            self.layer1.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, inputs, target, mode='tensor'):
        out = self.layer2(self.layer1(inputs))
        out = self.head(out.mean((2, 3)))[:, 0]
        if mode == 'loss':
            return dict(loss=F.mse_loss(out, target))
        return list(out) if mode == 'predict' else out


@DATASETS.register_module()
class ToyDataset(Dataset):
    """``size`` fixed random images and targets."""

    def __init__(self, size=12):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, CHANNELS, 6, 6, generator=generator)
        self.targets = torch.randn(size, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index], target=self.targets[index])


@METRICS.register_module()
class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(x) for x in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


def toy_config(
    work_dir,
    hook=None,
    epochs=4,
    size=12,
    batch_size=4,
    head_dim=4,
    layer_attention='MRLABase',
    lr=0.001,
    norm_eval=False,
    **kwargs,
):
    """Create the config of a run; ``hook`` has the pruning hook's arguments."""
    attention = (
        dict(type=layer_attention, head_dim=head_dim) if layer_attention else None
    )
    loader = dict(
        dataset=dict(type='ToyDataset', size=size),
        sampler=dict(type='DefaultSampler', shuffle=True, seed=0),
        collate_fn=dict(type='default_collate'),
        batch_size=batch_size,
        num_workers=0,
    )
    cfg = dict(
        default_scope='mmengine',
        model=dict(type='ToyNetwork', layer_attention=attention, norm_eval=norm_eval),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=lr, momentum=0.9, weight_decay=0.01)
        ),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1),
        ),
        custom_hooks=[],
        randomness=dict(seed=0),
        log_level='WARNING',
        # Otherwise runs started in the same second would share a log
        experiment_name=f'toy_{uuid4().hex}',
    )
    if hook is not None:
        cfg['custom_hooks'] = [dict(type='LayerAttentionPruningHook', **hook)]
    cfg.update(kwargs)
    return Config(cfg)


def train(cfg, **kwargs):
    """Train with a config, changed by ``kwargs``, and return the runner."""
    cfg = Config(dict(cfg, **kwargs))
    cfg.experiment_name = f'toy_{uuid4().hex}'
    runner_type = FlexibleRunner if 'strategy' in cfg else Runner
    runner = runner_type.from_cfg(cfg)
    runner.train()
    return runner
