"""Load checkpoints of earlier versions, which used other keys for some attentions."""

import re
from typing import Any, Dict, List, Sequence

OLD_KEY = re.compile(r'layer_attn_stages\.(\d+)\.([^.]+)\.(layer_attn(?:\..*)?)$')


class OlderCheckpoints:
    """Pre-hook of a network's ``load_state_dict`` that renames older keys.

    Up to version 0.1, and in versions of 0.2 before its release, networks other
    than ResNets held their attentions as
    ``layer_attn_stages.<stage>.<block>.layer_attn``.

    Args:
        stages (Sequence[Sequence[str]]): Names of the blocks of each stage.
        left_out (Sequence[str]): Blocks that have no attention because the backbone
            freezes them; in earlier versions they had one that stayed zero.
    """

    def __init__(
        self, stages: Sequence[Sequence[str]], left_out: Sequence[str]
    ) -> None:
        self.stages = [list(stage) for stage in stages]
        self.left_out = list(left_out)

    def __call__(self, state_dict: Dict[str, Any], prefix: str, *args) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:
            new = self.rename(key[len(prefix) :])
            if prefix + new != key:
                state_dict[prefix + new] = state_dict.pop(key)
        for block in self.left_out:
            self._drop(state_dict, f'{prefix}{block}.layer_attn.')

    def rename(self, key: str) -> str:
        """Convert a name of an earlier version.

        Args:
            key (str): A key of the network, or the name of an attention.

        Returns:
            str: The current name; a current one comes back unchanged.
        """
        match = OLD_KEY.match(key)
        if match is None or int(match[1]) >= len(self.stages):
            return key
        blocks: List[str] = self.stages[int(match[1])]
        names = {name.replace('.', '-'): name for name in blocks}
        slot = match[2]
        block = names.get(slot) or names.get(slot.rstrip('-'))
        if block is None and slot.isdigit() and int(slot) < len(blocks):
            block = blocks[int(slot)]
        return key if block is None else f'{block}.{match[3]}'

    @staticmethod
    def _drop(state_dict: Dict[str, Any], prefix: str) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:
            if key[len(prefix) :] in ('norm.weight', 'scale') and state_dict[key].any():
                raise RuntimeError(
                    'the checkpoint has a trained layer attention at '
                    f'{prefix[: -len(".layer_attn.")]}, but the network has none '
                    'there, because the stage is frozen and zero_init or small_init '
                    'is set. Remove zero_init and small_init to load it'
                )
            del state_dict[key]
