from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """MMPretrain's linear classifier after a dropout, as in EfficientNet.

    Args:
        *args: Positional arguments of ``LinearClsHead``.
        dropout (float): Dropout rate of the features. Defaults to 0.2.
        **kwargs: Keyword arguments of ``LinearClsHead``.

    Raises:
        ValueError: If ``dropout`` is not in [0, 1).
    """

    def __init__(self, *args, dropout: float = 0.2, **kwargs) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f'dropout={dropout} is not a probability in [0, 1)')
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(dropout)

    def pre_logits(self, feats) -> Tensor:
        """The features of the last stage, with dropout in training."""
        return self.dropout(super().pre_logits(feats))
