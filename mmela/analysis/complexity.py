"""What networks cost, and what pruning saves: FLOPs, parameters, memory."""

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
        label (str): From when on, such as ``'after epoch 1'``.
        active (int): Active attentions.
        flops (float): Of one image, a multiplication with its addition
            counted once. Elementwise operations, the weighted sum of the
            values among them, are not counted.
        parameters (int): Parameters in use.
    """

    label: str
    active: int
    flops: float
    parameters: int


def input_size(cfg: Config) -> Tuple[int, int]:
    """Image size that a config tests with.

    Args:
        cfg (Config): Config of an mmdet or mmpretrain project.

    Returns:
        tuple[int, int]: Height and width in pixels: of the last crop or resize
        to a fixed size in the test pipeline, 32 x 32 for CIFAR, or else
        224 x 224.
    """
    size = None
    dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get(
        'dataset'
    ) or {}
    while dataset.get('dataset'):
        dataset = dataset['dataset']
    for step in dataset.get('pipeline') or cfg.get('test_pipeline') or []:
        found = None
        if str(step.get('type')).endswith('Crop'):
            found = step.get('crop_size')
        elif str(step.get('type')).endswith('Resize'):
            found = step.get('scale')
            if isinstance(found, (tuple, list)):
                found = tuple(found)[::-1]  # width first there
        if isinstance(found, int):
            found = (found, found)
        if (
            isinstance(found, (tuple, list))
            and len(found) == 2
            and all(isinstance(x, int) for x in found)
        ):
            size = tuple(found)
    if size is None:
        size = (32, 32) if 'CIFAR' in str(dataset.get('type')) else (224, 224)
    return size


class ForImages(nn.Module):
    """A model as a function of images alone.

    Args:
        model (nn.Module): A backbone, or a model of a toolbox. A detector gets
            the data samples that its proposals need.
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
    """FLOPs of a network for one image, as mmengine counts them.

    Args:
        network (nn.Module): A backbone, or a model that takes images alone; in
            evaluation mode.
        size (Sequence[int]): Height and width of the image in pixels.
        products (bool): Count what mmengine leaves out, too: elementwise
            products, the weighted sum of the values among them, and fused
            self-attention. Defaults to False.

    Returns:
        float: The number; a multiplication with its addition counts once.
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
    with no_grad():  # a third of the memory
        return float(counter.total())


def _product_flops(inputs: list, outputs: list) -> int:
    """Of an elementwise product: one for each element of the result."""
    shape = get_shape(outputs[0])
    return math.prod(shape) if shape else 0


def _self_attention_flops(inputs: list, outputs: list) -> int:
    """Of queries (..., L, d) with keys (..., S, d), and of the sum of values."""
    query, key = map(get_shape, inputs[:2])
    return 2 * math.prod(query) * key[-2]


def kept_memory(network: nn.Module, size: Sequence[int]) -> float:
    """Memory that a training step keeps for its backward pass, for one image.

    That is what grows with the batch: features and the like, without weights,
    gradients and the state of the optimizer. It is counted, by the tensors that
    autograd saves, and so is the same on all machines.

    Args:
        network (nn.Module): As of :func:`count_flops`. Its norms see two
            images, and their statistics change.
        size (Sequence[int]): Height and width of the image in pixels.

    Returns:
        float: Bytes.
    """
    inputs = rand(2, input_channels(network), *size)
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (inputs, *network.parameters(), *network.buffers())
    }
    # The storages themselves, so that none is freed and its address used again
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    network.train()
    with enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        network(inputs)
    network.eval()
    return sum(storage.nbytes() for storage in kept.values()) / len(inputs)


def used_parameters(backbone: nn.Module) -> int:
    """Parameters of a network without those of attentions pruned whole."""
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
    """Count what the backbone of a run costs before and after each pruning.

    Args:
        run (Run): A run with a dumped config, which is executed.

    Returns:
        tuple: The costs in order (list[Complexity], empty where they cannot be
        counted), the image size in pixels (tuple[int, int] | None), and why
        they cannot be counted (str).
    """
    if not run.config:
        return [], None, 'there is no dumped config'
    try:
        cfg = Config.fromfile(run.config_path)
        if not (cfg.get('model') or {}).get('backbone'):
            return [], None, 'the config has no model.backbone'
        with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            backbone = registry.build(cfg.model.backbone)
        backbone.eval()  # the toolboxes' ResNet returns nothing here
        size = input_size(cfg)
        return _phases(run, backbone, size), size, ''
    # Somebody else's code may raise anything, and the page is of use without.
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        return [], None, f'the backbone cannot be run ({reason[:300]})'


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
    # A run may start with a pruned network.
    prune(backbone, [n for n in attentions if prefix + n not in measured])
    costs = [cost('before pruning')]
    for decision in run.decisions:
        names = [n[len(prefix) :] for n in decision.pruned if n.startswith(prefix)]
        prune(backbone, names, decision.keep_value)
        costs.append(cost(f'after {decision.unit} {decision.window[1]}'))
    return costs
