from typing import Dict, List, Optional

from ..layers import AttentionStage
from ..pruning import PruningPolicy


def decide(
    stages: Dict[str, AttentionStage],
    kl: Dict[str, List[Optional[float]]],
    policy: PruningPolicy,
) -> List[dict]:
    names, indices, values = [], [], []
    for index, (stage_name, stage) in enumerate(stages.items()):
        names += [
            f'{stage_name}.{n}' for n, a in stage.named_attentions().items() if a.active
        ]
        indices += [index] * len(kl[stage_name])
        values += kl[stage_name]
    decision = policy(
        [float('nan') if value is None else value for value in values],
        stages=indices,
        measured=[value is not None for value in values],
        names=names,
    )
    stage_names = list(stages)
    return [
        dict(row, stage=stage_names[index])
        for row, index in zip(decision.rows(), indices)
    ]
