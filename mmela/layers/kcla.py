import math
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor

from ..arguments import check_choice, check_count, check_number
from ..registry import LAYER_ATTENTIONS
from .base import QKVLayerAttention, StageMemory, channel_conv, pool

HEAD_ATTENTIONS = ('linear', 'plain', 'none')


@LAYER_ATTENTIONS.register_module()
class KCLA(QKVLayerAttention):
    r"""Key-correlated layer attention (KCLA, sections IV, IV-A and IV-B).

    KCLA assumes that all keys of a head have the same direction. Then only their norms
    weigh the layers, and one running mean of the block outputs replaces all of them.
    With :math:`k_g` and :math:`q_g` of head ``g`` and its fixed temperature
    :math:`s_g`:

    .. math::
        w^t &= \exp(\min(\lVert k_g^t \rVert s_g, 10)), \quad
        z^t = z^{t-1} + w^t, \quad u^t = u^{t-1} + w^t X^t \quad
        \text{(eq. 10)} \\
        O^t &= \sigma(W_e e^t) f_V^t(u^t / (z^t + 10^{-3})), \quad
        e_g^t = q_g^t \cdot k_g^t / \lVert k_g^t \rVert \quad
        \text{(eq. 11)} \\
        Y^t &= X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    The memory holds the mean :math:`u / z` and not the sum, which could overflow in
    half precision. Cost and memory per block do not depend on the number of blocks.

    The attention computes no distribution over layers, so the pruning hook cannot
    measure it. :func:`mmela.structure.prune` still prunes it.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head: 16 on CIFAR, 32 on
            ImageNet; 64 in the authors' detectors. Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.2, as published.
        temperature (float): First of the head temperatures, which go from here to its
            inverse in equal logarithmic steps. 1 makes all equal (table V, a);
            1 / 0.7 gives the order of the authors' first detectors. Defaults to 0.7.
        exp_norm (bool): Weigh by the exponential of the key norm; if False, by the
            norm itself (table V, b). Defaults to True.
        head_attention (str): How to weigh heads: ``'linear'`` as in eq. 11;
            ``'plain'`` without the linear layer, as in the authors' segmentation
            networks; ``'none'`` for no weights (table V, c). Defaults to
            ``'linear'``.
        recurrent (bool): Average the values instead of the block outputs, so that
            earlier outputs are not transformed again (table V, d). Defaults to
            False.
        cross_stage (bool): Start from the mean of the previous stage (section IV-B;
            table V, f is without). Defaults to True.
        previous_channels (int, optional): Channels of the previous stage. The
            backbone sets it for the first attention of a stage. Defaults to None:
            start without the previous stage.
        stride (int): Stride between the stages. Defaults to 1.
        relu (bool): Apply a ReLU after the normalization; the authors' segmentation
            networks have none. Defaults to True.
        restart_blocks (Sequence[int]): Indices, from 0, of blocks that normalize the
            mean so far and continue with it as a single token, as the first block of
            a stage does. The authors' ResNets for ImageNet use (11,), which only the
            third stage of a ResNet-101 reaches. Defaults to ().
        block (int): Index of the block in its stage. The backbone sets it. Defaults
            to 0.
        direction (str): The key that a head scores its query with: ``'own'`` as in
            eq. 11, or ``'sum'``, the sum of all keys of the stage so far, as in the
            authors' first detectors. Defaults to ``'own'``.
        cross_stage_groups (bool): Whether the convolution between stages is
            grouped by heads; in the authors' first U-Net it is not. Defaults to
            True.
        accumulate (bool): Whether later blocks of a stage see earlier ones. In the
            authors' newest U-Net they do not: only the first block of a stage sees
            an earlier one, the last block of the previous stage. Defaults to True.
        eps (float): Constant added to :math:`z` before the division; 0 in the
            authors' U-Net. Defaults to 1e-3.
        shared_key (bool): Compute the key of the previous stage's mean with the same
            convolution as the block's own key, as in the authors' U-Net. Defaults to
            False.
        **kwargs: ``norm_cfg``, ``value_act_cfg``, ``zero_init``,
            ``token_norm_cfg``, ``small_init`` and ``init_cfg``, see
            :class:`QKVLayerAttention`.

    Raises:
        ValueError: If ``head_attention`` or ``direction`` is unknown,
            ``temperature`` is not positive, ``eps`` is negative, or the number of
            heads does not divide ``previous_channels``, and as in
            :class:`QKVLayerAttention`.
    """

    @dataclass
    class Memory(StageMemory):
        """The running mean over the blocks so far.

        Attributes:
            mean (Tensor, optional): :math:`u / z`, (B, C, H, W).
            mass (Tensor, optional): :math:`z`, (B, G).
            keys (Tensor, optional): Sum of the keys, (B, G, d), with
                ``direction='sum'``.
            before (KCLA.Memory, optional): Final memory of the previous stage.
        """

        mean: Optional[Tensor] = None
        mass: Optional[Tensor] = None
        keys: Optional[Tensor] = None
        before: Optional['KCLA.Memory'] = None

    crosses_stages = True

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        drop_path: float = 0.2,
        temperature: float = 0.7,
        exp_norm: bool = True,
        head_attention: str = 'linear',
        recurrent: bool = False,
        cross_stage: bool = True,
        previous_channels: Optional[int] = None,
        stride: int = 1,
        relu: bool = True,
        restart_blocks: Sequence[int] = (),
        block: int = 0,
        direction: str = 'own',
        cross_stage_groups: bool = True,
        accumulate: bool = True,
        eps: float = 1e-3,
        shared_key: bool = False,
        **kwargs,
    ) -> None:
        check_choice('head_attention', head_attention, HEAD_ATTENTIONS)
        check_choice('direction', direction, ('own', 'sum'))
        check_number('temperature', temperature, 0, open_low=True)
        check_number('eps', eps, 0)
        check_count('stride', stride, 1)
        if previous_channels is not None:
            check_count('previous_channels', previous_channels, 1)
        check_count('block', block, 0)
        super().__init__(channels, head_dim, drop_path, **kwargs)
        self.exp_norm = exp_norm
        self.recurrent = recurrent
        self.relu = relu
        self.temperature = temperature
        self.direction = direction
        self.cross_stage_groups = cross_stage_groups
        self.accumulate = accumulate
        self.eps = eps
        self.shared_key = shared_key
        self.crosses_stages = cross_stage
        self.head_attention_type = head_attention
        if head_attention == 'linear':
            self.head_attention = nn.Linear(self.num_heads, self.num_heads, bias=False)
        self.restarts = block > 0 and block in restart_blocks
        if self.restarts or cross_stage and previous_channels is not None:
            self.cross_stage = CrossStage(
                channels,
                self.num_heads if cross_stage_groups else 1,
                None if self.restarts else previous_channels,
                stride,
                kwargs.get('norm_cfg') or dict(type='BN'),
            )
            if shared_key:
                self.cross_stage.key = self.key  # type: ignore[assignment]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.query.weight)
        nn.init.xavier_uniform_(self.key.weight)
        if hasattr(self, 'head_attention'):
            nn.init.xavier_uniform_(self.head_attention.weight)
        if hasattr(self, 'cross_stage'):
            self.cross_stage.reset_parameters()

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        pooled = pool(x)
        query, key = self.heads(self.query(pooled)), self.heads(self.key(pooled))
        norm = key.norm(dim=-1)  # (B, G)
        token = self.value_act(self.value(x)) if self.recurrent else x

        self._take_over(memory)
        weight = self.weigh(norm)
        if memory.mean is None or memory.mass is None:
            memory.mean, memory.mass = token, weight
        else:
            memory.mass = memory.mass + weight
            share = self.per_channel(weight / memory.mass, token)
            memory.mean = torch.lerp(memory.mean.to(token.dtype), token, share)

        # From u / z to u / (z + eps): a factor per head. It commutes with the
        # depth-wise convolution, so it joins the gate at no extra cost.
        gate = memory.mass / (memory.mass + self.eps)
        if self.head_attention_type != 'none':
            if self.direction == 'sum':
                memory.keys = key if memory.keys is None else memory.keys + key
                key, norm = memory.keys, memory.keys.norm(dim=-1)
            # A zero key has no direction and gives a score of 0
            scores = (query * key).sum(-1) / norm.clamp_min(1e-12)
            if self.head_attention_type == 'linear':
                weight = self.head_attention.weight.to(scores.dtype)
                scores = F.linear(scores, weight)
            gate = gate * scores.sigmoid()
        out = memory.mean
        if not self.recurrent:
            out = self.value_act(self.value(out))
        return self.norm_relu(out * self.per_channel(gate, out))

    @property
    def scales(self) -> Tensor:
        """Tensor: Temperatures of the heads, (G,), in single precision."""
        # Not a buffer: a cast would round it and `to_empty` would lose it
        end, device = math.log(self.temperature), self.key.weight.device
        return torch.linspace(end, -end, self.num_heads, device=device).exp()

    def weigh(self, norm: Tensor) -> Tensor:
        """Weight of a token from the norm of its key, (B, G) to (B, G)."""
        scaled = norm * self.scales.to(norm.dtype)
        return scaled.clamp_max(10).exp() if self.exp_norm else scaled

    def _take_over(self, memory: Memory) -> None:
        """Start from the mean of the previous stage, or restart within a stage."""
        if self.restarts:
            mean, memory.keys = memory.mean, None
        else:
            # None if there is no previous stage or all its attentions are pruned
            mean, memory.before = getattr(memory.before, 'mean', None), None
        if not self.accumulate:
            memory.mean = memory.mass = None
        if hasattr(self, 'cross_stage') and mean is not None:
            memory.mean, key = self.cross_stage(mean)
            memory.mass = self.weigh(self.heads(key).norm(dim=-1))

    def fingerprint(self) -> str:
        # Only values other than the default, as in older checkpoints
        rest = '' if self.relu else ', relu=False'
        rest += '' if self.direction == 'own' else f', direction={self.direction}'
        rest += '' if self.accumulate else ', accumulate=False'
        rest += '' if self.eps == 1e-3 else f', eps={self.eps:g}'
        rest += ', shared_key=True' if self.shared_key else ''
        return (
            f'{super().fingerprint()[:-1]}, temperature={self.temperature:g}, '
            f'exp_norm={self.exp_norm}, head_attention={self.head_attention_type}, '
            f'recurrent={self.recurrent}{rest})'
        )


class CrossStage(nn.Module):
    """Bring the mean of a stage to the shape of the next one (KCLA, algorithm 1).

    It applies a 1x1 convolution, grouped by heads and with the stride of the stage,
    and a normalization, and computes a key of the result.

    Args:
        channels (int): Channels ``C`` of the next stage.
        heads (int): Its number of heads ``G``, or 1 for no groups.
        previous_channels (int, optional): Channels ``C'`` of the stage; None for a
            restart within a stage, which needs no convolution.
        stride (int): Stride between the two.
        norm_cfg (dict): Normalization.

    Raises:
        ValueError: If ``previous_channels`` is not a multiple of ``heads``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        previous_channels: Optional[int],
        stride: int,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        if previous_channels is not None and previous_channels % heads:
            raise ValueError(
                f'the {heads} heads of a stage do not divide the '
                f'{previous_channels} channels of the previous stage; choose another '
                'head_dim or set cross_stage=False'
            )
        self.reduce = (
            nn.Identity()
            if previous_channels is None
            else nn.Conv2d(
                previous_channels, channels, 1, stride, groups=heads, bias=False
            )
        )
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.key = channel_conv(channels)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        if isinstance(self.reduce, nn.Conv2d):
            nn.init.kaiming_normal_(self.reduce.weight, mode='fan_out')
        nn.init.xavier_uniform_(self.key.weight)
        nn.init.constant_(self.norm.weight, 1.0)
        nn.init.constant_(self.norm.bias, 0.0)

    def forward(self, mean: Tensor):
        """Convert a mean to the next stage.

        Args:
            mean (Tensor): (B, C', H', W').

        Returns:
            tuple[Tensor, Tensor]: The mean (B, C, H, W) and its key (B, 1, C).
        """
        mean = self.norm(self.reduce(mean))
        return mean, self.key(pool(mean))
