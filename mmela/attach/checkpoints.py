"""Checkpoints of earlier versions, which held some attentions under other names."""

import re
from typing import Any, Dict, List, Sequence

OLD_KEY = re.compile(r'layer_attn_stages\.(\d+)\.([^.]+)\.(layer_attn(?:\..*)?)$')


class OlderCheckpoints:
    """Pre-hook of a network's ``load_state_dict``: today's keys for earlier ones.

    Up to version 0.1, and in versions of 0.2 before its release, attentions of
    networks other than ResNets were in
    ``layer_attn_stages.<stage>.<block>.layer_attn`` of the network.

    Args:
        stages (Sequence[Sequence[str]]): Names of the blocks of each stage.
        left_out (Sequence[str]): Blocks without an attention, as the backbone
            freezes them; earlier versions gave them one that stayed zero.
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
        """Today's name for one of an earlier version.

        Args:
            key (str): A key of the network, or the name of an attention.

        Returns:
            str: The new one; the same for a key of today.
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
                    'there, as the stage is frozen and zero_init or small_init is '
                    'set; set neither to use it'
                )
            del state_dict[key]
