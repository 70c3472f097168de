"""Remove pruned layer attentions from a checkpoint and its config.

The slim network gives the same outputs: the tool compares both backbones and
fails if they differ. Optimizer and training state are left out.

Example:
  python tools/convert/slim.py work_dirs/ela/my_config.py \\
      work_dirs/ela/epoch_12.pth slim.pth
"""

import argparse
from pathlib import Path

import torch
from mmengine.registry import MODELS

import mmela  # noqa: F401
from mmela.command_line import one_line
from mmela.convert.networks import load_fitting, open_network
from mmela.convert.slim import slim_config, slim_state_dict


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the pruned network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='slim checkpoint to write (.pth)')
    parser.add_argument(
        '--out-config', help='config to write (default: the slim checkpoint with .py)'
    )
    parser.add_argument(
        '--size',
        type=int,
        default=128,
        help='image size of the comparison in pixels (default: %(default)s)',
    )
    return parser.parse_args(argv)


@torch.no_grad()
def difference(networks, size: int) -> float:
    """Largest absolute difference of the outputs of two backbones.

    Args:
        networks (Sequence[tuple]): Of both, the config, its path, the state
            dict and its path.
        size (int): Height and width of the images in pixels.

    Raises:
        ValueError: If a state dict is of another network.
    """
    outputs = []
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, size, size, generator=generator)
    for config, config_path, state, state_path in networks:
        # Nothing is to be downloaded: the checkpoint follows.
        backbone_cfg = dict(config.model.backbone, init_cfg=None)
        backbone = MODELS.build(backbone_cfg)
        prefix = 'backbone.'
        load_fitting(
            backbone,
            {
                key[len(prefix) :]: value
                for key, value in state.items()
                if key.startswith(prefix)
            },
            config_path,
            state_path,
        )
        backbone.eval()
        outputs.append(backbone(x))
    return max(float((a - b).abs().max()) for a, b in zip(*outputs))


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    out_config = Path(args.out_config or out.with_suffix('.py'))
    cfg, checkpoint, state_dict = open_network(
        args.config, args.checkpoint, out, out_config
    )
    try:
        slim_state, blocks = slim_state_dict(state_dict)
        slim_cfg = slim_config(cfg, blocks)
    except ValueError as error:
        raise SystemExit(f'error: {args.checkpoint}: {error}')

    try:
        gap = difference(
            [
                (cfg, args.config, state_dict, args.checkpoint),
                (slim_cfg, out_config, slim_state, out),
            ],
            args.size,
        )
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f'error: {one_line(error)}')
    if gap != 0:
        raise SystemExit(f'error: the outputs differ by {gap}')
    meta = {
        key: value
        for key, value in checkpoint.get('meta', {}).items()
        if key in ('dataset_meta', 'epoch', 'iter')
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(meta=meta, state_dict=slim_state), out)
    slim_cfg.dump(out_config)
    before, after = [
        sum(v.numel() for v in state.values()) for state in (state_dict, slim_state)
    ]
    print(
        f'{out}: {len(slim_state)} of {len(state_dict)} tensors, '
        f'{after / 1e6:.3f} of {before / 1e6:.3f} M values; '
        'outputs differ by 0'
    )
    for prefix, stages in blocks.items():
        print(f'{out_config}: {prefix}attention_blocks={stages}')


if __name__ == '__main__':
    main()
