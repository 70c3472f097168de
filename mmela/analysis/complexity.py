"""Cost of networks and savings by pruning: FLOPs, parameters, memory."""

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, enable_grad, nn, no_grad, rand, zeros
from torch.autograd.graph import saved_tensors_hooks

from ..attach import input_channels
from ..layers import AttentionState
from ..structure import layer_attentions, prune
from .work_dir import Run

# Elementwise products, which mmengine does not count
_PRODUCTS = ('aten::mul', 'aten::mul_', 'aten::addcmul', 'aten::lerp')


@dataclass
class Complexity:
    """Cost of a backbone between two prunings.

    Attributes:
        label (str): Start of the period, such as ``'after epoch 1'``.
        active (int): Number of active attentions.
        flops (float): Multiply-adds for one image. Elementwise operations, such as
            the weighted sum of the values, are not counted.
        parameters (int): Number of parameters in use.
    """

    label: str
    active: int
    flops: float
    parameters: int


def input_size(cfg: Config) -> Tuple[int, int]:
    """Image size of a config's test pipeline.

    Args:
        cfg (Config): Config of an mmdet or mmpretrain project.

    Returns:
        tuple[int, int]: Height and width in pixels after the last crop or resize to a
        fixed size; or else 32 x 32 for CIFAR and 224 x 224 for other data.
    """
    size = None
    dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get(
        'dataset'
    ) or {}
    while dataset.get('dataset'):
        dataset = dataset['dataset']
    for step in dataset.get('pipeline') or cfg.get('test_pipeline') or []:
        target = None
        if str(step.get('type')).endswith('Crop'):
            target = step.get('crop_size')
        elif str(step.get('type')).endswith('Resize'):
            target = step.get('scale')
            if isinstance(target, (tuple, list)):
                target = tuple(target)[::-1]  # given as (width, height)
        if isinstance(target, int):
            target = (target, target)
        if (
            isinstance(target, (tuple, list))
            and len(target) == 2
            and all(isinstance(x, int) for x in target)
        ):
            size = tuple(target)
    if size is None:
        size = (32, 32) if 'CIFAR' in str(dataset.get('type')) else (224, 224)
    return size


class ForImages(nn.Module):
    """A model that takes only images.

    Args:
        model (nn.Module): A backbone, or a model of a toolbox. For a detector, this
            class adds the data samples that its proposals need.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor):
        """Run the model on images, (B, C, H, W), without its post-processing."""
        if 'BaseDetector' not in {cls.__name__ for cls in type(self.model).__mro__}:
            return self.model(inputs)
        from mmdet.structures import DetDataSample

        size = tuple(map(int, inputs.shape[2:]))
        info = dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1, 1),
        )
        samples = [DetDataSample(metainfo=info) for _ in range(len(inputs))]
        return self.model(inputs, samples)


def count_flops(
    network: nn.Module, size: Sequence[int], products: bool = False
) -> float:
    """Count the FLOPs of a network for one image with mmengine.

    Args:
        network (nn.Module): A backbone, or a model that takes only images, in eval
            mode.
        size (Sequence[int]): Height and width of the image in pixels.
        products (bool): Also count what mmengine leaves out: elementwise products,
            such as those in the weighted sum of the values, and fused self-attention.
            Defaults to False.

    Returns:
        float: Number of multiply-adds.
    """
    counter = FlopAnalyzer(network, (zeros(1, input_channels(network), *size),))
    if products:
        counter.set_op_handle(
            **dict.fromkeys(_PRODUCTS, _product_flops),
            **{'aten::scaled_dot_product_attention': _self_attention_flops},
        )
    counter.unsupported_ops_warnings(False)
    counter.uncalled_modules_warnings(False)
    counter.tracer_warnings('none')
    with no_grad():  # takes a third of the memory
        return float(counter.total())


def _product_flops(inputs: list, outputs: list) -> int:
    """FLOPs of an elementwise product: one for each element of the result."""
    shape = get_shape(outputs[0])
    return math.prod(shape) if shape else 0


def _self_attention_flops(inputs: list, outputs: list) -> int:
    """FLOPs of queries (..., L, d) times keys (..., S, d), and of the sum of values."""
    query, key = map(get_shape, inputs[:2])
    return 2 * math.prod(query) * key[-2]


def kept_memory(network: nn.Module, size: Sequence[int]) -> float:
    """Memory for one image that a training step keeps for its backward pass.

    This is the part that grows with the batch: features, but not weights, gradients or
    optimizer state. It counts the tensors that autograd saves, so it is the same on all
    machines.

    Args:
        network (nn.Module): See :func:`count_flops`. It runs two images, which changes
            the statistics of its norms.
        size (Sequence[int]): Height and width of the image in pixels.

    Returns:
        float: Number of bytes.
    """
    inputs = rand(2, input_channels(network), *size)
    permanent = {
        tensor.untyped_storage().data_ptr()
        for tensor in (inputs, *network.parameters(), *network.buffers())
    }
    # Keep the storages alive, so that no address is reused
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent:
            kept[storage.data_ptr()] = storage
        return tensor

    network.train()
    with enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        network(inputs)
    network.eval()
    return sum(storage.nbytes() for storage in kept.values()) / len(inputs)


def used_parameters(backbone: nn.Module) -> int:
    """Number of parameters of a network without those of pruned attentions."""
    unused = sum(
        param.numel()
        for attention in layer_attentions(backbone).values()
        if attention.attention_state == AttentionState.PRUNED
        for param in attention.parameters()
    )
    return sum(param.numel() for param in backbone.parameters()) - unused


def backbone_complexity(
    run: Run,
) -> Tuple[List[Complexity], Optional[Tuple[int, int]], str]:
    """Count the cost of a run's backbone before and after each pruning.

    Args:
        run (Run): A run with a dumped config. The config is executed.

    Returns:
        tuple: The costs in order (list[Complexity], empty if they cannot be counted),
        the image size in pixels (tuple[int, int] | None), and the reason if they
        cannot be counted (str).
    """
    if not run.config:
        return [], None, 'there is no dumped config'
    try:
        cfg = Config.fromfile(run.config_path)
        if not (cfg.get('model') or {}).get('backbone'):
            return [], None, 'the config has no model.backbone'
        with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            backbone = registry.build(cfg.model.backbone)
        backbone.eval()  # on its own line: the toolboxes' ResNet returns None
        size = input_size(cfg)
        return _phases(run, backbone, size), size, ''
    # A user's code may raise anything, and the page is useful without the costs
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        return [], None, f'the backbone does not run ({reason[:300]})'


def _phases(run: Run, backbone: nn.Module, size: Tuple[int, int]) -> List[Complexity]:
    prefix = 'backbone.'
    attentions = layer_attentions(backbone)

    def cost(label: str) -> Complexity:
        return Complexity(
            label,
            sum(a.active for a in attentions.values()),
            count_flops(backbone, size),
            used_parameters(backbone),
        )

    if not run.decisions:
        return [cost('as configured')]
    measured = {layer.name for layer in run.decisions[0].layers}
    # A run may start from a pruned network
    prune(backbone, [n for n in attentions if prefix + n not in measured])
    costs = [cost('before pruning')]
    for decision in run.decisions:
        names = [n[len(prefix) :] for n in decision.pruned if n.startswith(prefix)]
        prune(backbone, names, decision.keep_value)
        costs.append(cost(f'after {decision.unit} {decision.window[1]}'))
    return costs
