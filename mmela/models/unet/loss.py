from typing import Optional

from mmseg.models.losses import DiceLoss
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class ForegroundDiceLoss(DiceLoss):
    """Dice loss of the foreground, for a head with one output channel.

    With one output channel, ``DiceLoss`` compares it with the one-hot label of the
    background, which is the opposite target of binary cross entropy. This loss
    compares the channel with the foreground, label 1.

    Args:
        naive_dice (bool): Sum the probabilities in the denominator rather than
            their squares. Defaults to True.
        eps (float): Constant added to numerator and denominator, in pixels.
            Defaults to 1.
        **kwargs: All further arguments of ``mmseg.models.DiceLoss``.
    """

    def __init__(self, naive_dice: bool = True, eps: float = 1.0, **kwargs) -> None:
        super().__init__(naive_dice=naive_dice, eps=eps, **kwargs)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Optional[Tensor] = None,
        ignore_index: Optional[int] = 255,
        **kwargs,
    ) -> Tensor:
        """Compute the loss.

        Args:
            pred (Tensor): Scores before the sigmoid, (B, 1, H, W).
            target (Tensor): Labels 0, 1 or ``ignore_index``, (B, H, W).
            weight (Tensor, optional): Weights of the samples, (B,). Defaults
                to None.
            ignore_index (int, optional): Label of pixels to ignore. Defaults to
                255.
            **kwargs: ``avg_factor`` and ``reduction_override``, see
                ``mmseg.models.DiceLoss``.

        Returns:
            Tensor: The loss, a scalar unless the reduction is 'none'.

        Raises:
            ValueError: If ``pred`` does not have one channel.
        """
        if pred.shape[1] != 1:
            raise ValueError(
                'ForegroundDiceLoss needs a head with '
                f'out_channels=1, got {pred.shape[1]} channels'
            )
        target = target.unsqueeze(1)
        if ignore_index is not None:
            # Probability 0 at label 0 adds nothing to the sums.
            ignored = target == ignore_index
            pred = pred.masked_fill(ignored, float('-inf'))
            target = target.masked_fill(ignored, 0)
        # DiceLoss takes ignore_index as a channel to leave out.
        return super().forward(pred, target, weight, ignore_index=None, **kwargs)
