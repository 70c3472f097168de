"""Stages of blocks with single attentions attached."""

from torch import nn

from mmela.layers.features import Features
from mmela.layers.stage import Place, Stage, attach_hooks, ensure_tap


class BlockStage(nn.Sequential):
    """Blocks in sequence, some with an attention."""

    def __init__(self, *blocks, before=None):
        super().__init__(*blocks)
        self.place = Stage([str(i) for i in range(len(blocks))])
        if before is not None:
            self.place.before = before.place
            before.place.hands_over = True

    def attach(self, index, attention):
        """Attach an attention to a block. Call this in the order of the blocks."""
        block = self[index]
        shortcut = getattr(block, 'downsample', None) and 'downsample'
        number = self.place.size
        attention.place = Place(
            self.place, str(index), number, Features(), shortcut=shortcut
        )
        attention.taps, replacements = attention.connect(block)
        for name, module in replacements.items():
            setattr(block, name, module)
        block.layer_attn = attention
        attach_hooks(block)
        for name, method in attention.taps.items():
            ensure_tap(block, name, attention, method)
        self.place.set_size(number + 1)

    @property
    def attentions(self):
        return [block.layer_attn for block in self if hasattr(block, 'layer_attn')]

    @property
    def observer(self):
        return self.place.observer

    @observer.setter
    def observer(self, observer):
        self.place.observer = observer


def run_one(attention, x, memory):
    """Get the output of a block that returns ``x``, after its attention."""
    if attention.place is None:
        attention.place = Place(Stage(['0']), '0', 0)
    return attention.update(x, memory, (x,), x)
