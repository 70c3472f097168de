from dataclasses import dataclass
from typing import Optional, Tuple

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..arguments import building, check_count
from ..layers import StageMemory
from ..registry import LAYER_ATTENTIONS
from .branch import (
    BranchAttention,
    Replacements,
    SummedConv2d,
    Taps,
    convolutions,
)


@LAYER_ATTENTIONS.register_module()
class RLAg(BranchAttention):
    r"""Recurrent layer aggregation (RLA-Net, Zhao et al. 2021, section 3.3).

    A narrow map :math:`h` accompanies the blocks. Each block sees it beside its input
    and adds its residual branch :math:`F` to it:

    .. math::
        F^t = f^t([X^t, h^{t-1}]), \quad X^{t+1} = \mathrm{ReLU}(X^t + F^t),
        \quad h^t = g_2(\tanh(\mathrm{BN}^t(g_1(F^t) + h^{t-1})))

    The blocks of a stage share the 1x1 convolution :math:`g_1` and the 3x3 convolution
    :math:`g_2`. A block with a stride pools :math:`h`, and so does the step from one
    stage to the next. The first convolution of :math:`f` is split into one over ``X``
    (in the block) and one over ``h`` (here), whose sum is the same.

    The authors' code computes the sum in place before :math:`g_1`, so that its
    :math:`F^t` is in effect :math:`X^{t+1}`; this class follows the paper.

    The classifier sees only the output of the last block, as in the authors' detectors;
    their classifiers also see :math:`h` (0.03 M more parameters).

    Args:
        channels (int): Channels ``C`` of the block's output.
        hidden (int): Channels of ``h``: 32 on ImageNet. Defaults to 32.
        norm_cfg (dict): Normalization. Defaults to ``dict(type='BN')``.
        **kwargs: ``owns_shared`` and ``init_cfg``, see :class:`BranchAttention`.

    Raises:
        ValueError: If ``hidden`` is less than 1, ``drop_path`` is set, or the block
            is not from a network of the ResNet family.
    """

    @dataclass
    class Memory(StageMemory):
        """The map that accompanies the blocks.

        Attributes:
            hidden (Tensor, optional): :math:`h`, (B, hidden, H, W).
            before (RLAg.Memory, optional): Final memory of the previous stage.
        """

        hidden: Optional[Tensor] = None
        before: Optional['RLAg.Memory'] = None

    shared = ('reduce', 'recur')
    crosses_stages = True

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        **kwargs,
    ) -> None:
        check_count('hidden', hidden, 1)
        if kwargs.get('drop_path'):
            raise ValueError(
                f'drop_path={kwargs["drop_path"]} cannot be set, because RLAg adds no '
                'branch to drop'
            )
        super().__init__(channels, **kwargs)
        self.hidden = hidden
        with building('norm_cfg', norm_cfg):
            self.norm = build_norm_layer(norm_cfg or dict(type='BN'), hidden)[1]
        if self.owns_shared:
            self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
            self.recur = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)

    def connect(self, block: nn.Module) -> Tuple[Taps, Replacements]:
        taps, _ = super().connect(block)
        conv = SummedConv2d(convolutions(block)['conv1'])
        self.input = nn.Conv2d(
            self.hidden,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=False,
        )
        return {'conv1': 'add_hidden', **taps}, {'conv1': conv}

    def add_hidden(
        self, x: Tensor, output: Tensor, memory: Optional[Memory]
    ) -> Optional[Tensor]:
        """Add the part of ``h`` to the output of the first convolution.

        Args:
            x (Tensor): Input of the convolution, (B, C_in, H_in, W_in).
            output (Tensor): Its output, (B, C_out, H, W).
            memory (RLAg.Memory, optional): Memory of the stage.

        Returns:
            Tensor | None: The sum, (B, C_out, H, W).
        """
        if self.runs_alone(memory):
            return None
        if memory.before is not None:
            memory.hidden = memory.before.hidden
            memory.before = None
        if memory.hidden is None:
            memory.hidden = x.new_zeros(len(x), self.hidden, *x.shape[2:])
        if memory.hidden.shape[2:] != x.shape[2:]:  # after a block without attention
            size = (x.shape[2], x.shape[3])
            memory.hidden = F.adaptive_avg_pool2d(memory.hidden, size)
        # The norm of the last block is unused, but stays in the graph, because
        # distributed training waits for the gradient of every parameter.
        unused = 0 * (self.norm.weight + self.norm.bias)
        memory.hidden = memory.hidden + unused[:, None, None].to(memory.hidden.dtype)
        return output + self.input(memory.hidden)

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        hidden, first = memory.hidden, memory.first or self
        assert hidden is not None  # add_hidden() ran before
        if hidden.shape[2:] != x.shape[2:]:
            hidden = F.adaptive_avg_pool2d(hidden, (x.shape[2], x.shape[3]))
        hidden = self.norm(hidden + first.reduce(x))
        memory.hidden = first.recur(hidden.tanh())
        return x.clone()  # the block adds to it in place

    def fingerprint(self) -> str:
        return f'RLAg(hidden={self.hidden})'
