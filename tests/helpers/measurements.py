"""Made-up measurements of layer attentions."""

import json

import numpy as np

from mmela.pruning import EBQM, LayerDecision, PruningDecision


def stage(states, heads=2, **kwargs):
    """A stage with uniform attention weights."""
    rows = [[None] * len(states) for _ in states]
    for i, state in enumerate(states):
        seen = [j for j in range(i + 1) if states[j] in ('active', 'value_only')]
        if state == 'active':
            for j in seen:
                rows[i][j] = 1 / len(seen)
    cosine = [
        dict(blocks=[i - 1, i], mean=0.9, std=0.05) for i in range(1, len(states))
    ]
    return dict(
        dict(
            attention='MRLABase',
            prunable=True,
            heads=heads,
            states=states,
            maps=dict(mean=rows, heads=[rows] * heads),
            features=cosine,
            queries=cosine,
            contributions=None,
        ),
        **kwargs,
    )


def measurement(stages):
    """Random divergences with the decision of the default policy."""
    layers = [
        (f'{name}.{block}.layer_attn', name, state)
        for name, values in stages.items()
        for block, state in enumerate(values['states'])
    ]
    kl = np.random.default_rng(0).gamma(1.0, size=len(layers))
    # The first attention of a stage has no divergence
    values = [
        None if i == 0 or layers[i - 1][1] != stage else kl[i]
        for i, (_, stage, _) in enumerate(layers)
    ]
    policy = EBQM()
    decided = policy(values, [x[1] for x in layers], [x[0] for x in layers])
    decision = PruningDecision(
        tuple(
            layer if state == 'active' else LayerDecision(name, stage, reason='✕')
            for layer, (name, stage, state) in zip(decided, layers)
        ),
        policy.config,
    )
    return dict(
        stages=stages, histogram=[1] * 20, decision=decision.to_dict(), left_out=[]
    )


def write_measurement(work_dir, epoch, stages):
    """Write ``layer_attention.json`` to the path that the report reads."""
    path = work_dir / 'layer_attention' / f'epoch_{epoch}'
    path.mkdir(parents=True)
    content = dict(
        measurement(stages),
        format=2,
        images=3,
        data='validation data',
        checkpoint=f'epoch_{epoch}.pth',
    )
    (path / 'layer_attention.json').write_text(json.dumps(content))
    return path / 'layer_attention.json'


SMALL = {
    'backbone.layer1': stage(['active', 'pruned', 'active', 'active']),
    'backbone.layer2': stage(['active', 'value_only', 'active'], heads=1),
}
