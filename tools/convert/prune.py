"""Prune redundant layer attentions of a trained checkpoint.

It measures the KL divergence between adjacent attentions on the test data of the
config, lets a policy decide once, and writes a pruned checkpoint. It trains
nothing, so plan to fine-tune afterwards.

Example:
  mmela prune my_config.py epoch_12.pth pruned.pth \\
      --policy type=EBQM gamma=0.5 mu=0.2 --batches 50
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmela_light.arguments import Settings, add_cfg_options, tool_parser

if TYPE_CHECKING:
    from mmela.pruning import PruningDecision, PruningPolicy


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('prune', __doc__)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='trained checkpoint')
    parser.add_argument('out', help='pruned checkpoint to write')
    parser.add_argument(
        '--policy',
        nargs='+',
        action=Settings,
        default=dict(type='EBQM'),
        metavar='KEY=VALUE',
        help='pruning policy (default: type=EBQM)',
    )
    parser.add_argument(
        '--batches',
        type=int,
        default=100,
        help='number of batches of test data to measure (default: %(default)s)',
    )
    parser.add_argument(
        '--reduction',
        default='mean_kl',
        choices=['mean_kl', 'mean_distribution'],
        help='how to average divergences (default: %(default)s)',
    )
    parser.add_argument(
        '--keep-value',
        action='store_true',
        help='let later attentions still see the key and value of pruned ones',
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def decide(
    model,
    dataloader,
    batches: int,
    reduction: str,
    policy: 'PruningPolicy',
    keep_value: bool,
) -> 'PruningDecision':
    """Let a policy decide on the divergences over some batches of data."""
    import torch
    from mmengine.utils import track_iter_progress

    from mmela.hooks import NetworkKLMeter
    from mmela.structure import attention_stages

    meter = NetworkKLMeter(attention_stages(model), reduction)
    meter.attach()
    model.eval()
    count = min(batches, len(dataloader))
    batches = itertools.islice(dataloader, count)
    with torch.no_grad():
        for batch in track_iter_progress((batches, count)):
            model.test_step(batch)
    print()
    meter.detach()
    return meter.decide(policy, keep_value)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.batches < 1:
        raise SystemExit(f'error: --batches={args.batches} is not positive')
    import torch
    from mmengine.device import get_device
    from mmengine.runner import Runner

    from mmela.command_line import one_line_errors
    from mmela.convert.networks import build_network, load_fitting, open_network
    from mmela.engine.tables import decision_table
    from mmela.files import replacing, write_text
    from mmela.pruning import build_policy
    from mmela.pruning.record import FORMAT
    from mmela.structure import attention_stages, prune

    try:
        policy = build_policy(args.policy)
    except ValueError as error:
        raise SystemExit(f'error: --policy: {error}') from error
    out = Path(args.out)
    report = out.with_suffix('.json')
    if out == report:
        raise SystemExit(
            f'error: {out} must not end with .json, which is the name of its report'
        )
    cfg, meta, state_dict = open_network(args.config, args.checkpoint, out, report)
    cfg.merge_from_dict(args.cfg_options)
    with one_line_errors(KeyError, OSError, TypeError, ValueError):
        model = build_network(cfg.model, args.config)
        stages = attention_stages(model)
        if not any(a.prunable for s in stages.values() for a in s.attentions):
            raise ValueError(f'{args.config} has no prunable layer attention')
        load_fitting(model, state_dict, args.config, args.checkpoint)
        if not cfg.get('test_dataloader'):
            raise ValueError(f'{args.config} has no test_dataloader')
        dataloader = Runner.build_dataloader(cfg.test_dataloader)
    model.to(get_device())
    with one_line_errors(ValueError):
        decision = decide(
            model, dataloader, args.batches, args.reduction, policy, args.keep_value
        )
    prune(model, decision.pruned, args.keep_value)
    print(decision_table(decision.layers))
    if decision.warning:
        print(f'warning: {decision.warning}.')

    content = dict(format=FORMAT, pruned=decision.pruned, **decision.to_dict())
    with one_line_errors(OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as weights:
            torch.save(
                dict(meta=meta, state_dict=model.to('cpu').state_dict()), weights
            )
            write_text(report, json.dumps(content, indent=2))
    print(
        f'{len(decision.layers)} -> {len(decision.active)} active attentions, '
        f'{policy}\n{out}\n{report}'
    )


if __name__ == '__main__':
    main()
