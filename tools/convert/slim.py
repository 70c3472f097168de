"""Remove pruned layer attentions from a checkpoint and its config.

The slim network gives the same outputs: the tool compares both backbones and
fails if they differ. Optimizer and training state are left out.

Example:
  python tools/convert/slim.py work_dirs/ela/my_config.py \\
      work_dirs/ela/epoch_12.pth slim.pth
"""

import argparse
from pathlib import Path
from typing import Iterable

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import mmela  # noqa: F401
from mmela.command_line import one_line
from mmela.convert.networks import NETWORK_ERRORS, load_fitting, open_network
from mmela.convert.slim import slim_config, slim_state_dict
from mmela.structure import layer_attentions


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


def build(cfg: Config) -> nn.Module:
    """Build a network in evaluation mode; nothing is downloaded for it."""
    model = MODELS.build(cfg.model)
    model.eval()
    return model


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, names: Iterable[str], size: int):
    """Largest absolute difference of the outputs of two networks' backbones.

    Args:
        one (nn.Module): A network.
        other (nn.Module): Another.
        names (Iterable[str]): Names of their backbones.
        size (int): Height and width of the images in pixels.

    Returns:
        float: The difference.
    """
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return max(
        float((a - b).abs().max())
        for name in names
        for a, b in zip(*(m.get_submodule(name)(x) for m in (one, other)))
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    out_config = Path(args.out_config or out.with_suffix('.py'))
    cfg, meta, state_dict = open_network(args.config, args.checkpoint, out, out_config)
    try:
        model = build(cfg)
        if not layer_attentions(model):
            raise ValueError(f'{args.config} has no layer attention')
        load_fitting(model, state_dict, args.config, args.checkpoint)
        slim_state, blocks = slim_state_dict(model)
        slim_cfg = slim_config(cfg, blocks)
        slim = build(slim_cfg)
        load_fitting(slim, slim_state, out_config, out)
        gap = difference(model, slim, blocks, args.size)
    except NETWORK_ERRORS as error:
        raise SystemExit(f'error: {one_line(error)}') from error
    if gap != 0:
        raise SystemExit(f'error: the outputs differ by {gap}')
    meta = {
        key: value
        for key, value in meta.items()
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
    for name, stages in blocks.items():
        print(f'{out_config}: blocks with attention in {name}: {stages}')


if __name__ == '__main__':
    main()
