"""Test which backbones layer attention can be attached to.

Builds each backbone of the configs that a toolbox ships, or the smallest model of each
family of timm. Attaches layer attention with ``blocks='auto'`` and ``zero_init=True``,
and checks that

- the keys of the backbone do not change, and the outputs are equal bit for bit,
- every attention gets a gradient in a training step,
- an attention can be pruned by its divergence, or by name if none is measured, and
- the slim network, built from explicit names, has the same outputs.

Weights are random, images are small, and deep networks have fewer layers. --results
keeps the results, so that a stopped run can continue, and --table writes them as
Markdown.

Example:
  python tools/analysis/coverage.py mmdet mmpretrain mmseg timm \\
      --results work_dirs/coverage.json --table docs/coverage.md
"""

import argparse
import copy
import json
import logging
import signal
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS

import mmela
from mmela.attach import input_channels, other_arguments, sizes_to_try
from mmela.command_line import one_line
from mmela.convert.slim import slim_state_dict
from mmela.files import write_text
from mmela.hooks import NetworkKLMeter
from mmela.layers import LayerAttention
from mmela.layers.features import tensors
from mmela.pruning import FixedCount
from mmela.structure import attention_stages, layer_attentions, prune

TOOLBOXES = ('mmdet', 'mmpretrain', 'mmseg')
SMALL = [(64, 96), (128, 160)]
# Arguments that do not change the structure of a backbone
ASIDE = ('init_cfg', 'frozen_stages', 'norm_eval', 'with_cp', 'pretrained')


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', nargs='+', choices=(*TOOLBOXES, 'timm'))
    parser.add_argument(
        '--results',
        default='work_dirs/coverage.json',
        metavar='FILE',
        help='file of results; backbones that it has are skipped '
        '(default: %(default)s)',
    )
    parser.add_argument('--table', metavar='FILE', help='Markdown file to write')
    parser.add_argument('--only', help='only try backbones whose name contains this')
    parser.add_argument(
        '--first', action='store_true', help='only try one variant of each kind'
    )
    parser.add_argument(
        '--retry', action='store_true', help='try failed backbones again'
    )
    parser.add_argument(
        '--seconds',
        type=int,
        default=180,
        help='time limit for one backbone (default: %(default)s)',
    )
    return parser.parse_args(argv)


def backbones_of_configs(toolbox):
    """Find the backbones of the configs that a toolbox ships.

    Args:
        toolbox (str): Import name of the toolbox.

    Returns:
        dict[str, tuple[dict, int]]: Config and number of files of each backbone, by
        name and arguments.
    """
    root = Path(import_module(toolbox).__file__).parent / '.mim' / 'configs'
    backbones = {}
    for path in sorted(root.rglob('*.py')):
        if '_base_' in path.parts or 'datasets' in path.parts:
            continue
        try:
            cfg = Config.fromfile(path)
        except Exception as error:  # missing packages or broken configs
            print(f'{path.name} cannot be read: {one_line(error)}')
            continue
        for backbone in _find(cfg.get('model') or {}):
            backbone = copy.deepcopy(backbone.to_dict())
            for key in ASIDE:
                backbone.pop(key, None)
            kind = backbone['type']
            if not isinstance(kind, str):
                backbone['type'] = kind = kind.__name__
            small = backbone
            try:
                small = reduced(toolbox, backbone)
            except Exception as error:  # the attempt reports it, too
                print(f'{path.name}: {one_line(error)}')
            arguments = json.dumps(small, sort_keys=True, default=str)
            key = f'{toolbox} {kind} {arguments}'
            count = backbones.get(key, (None, 0))[1]
            backbones[key] = backbone, count + 1
    return backbones


def _find(node):
    """Find the configs of backbones in the config of a model."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == 'backbone' and isinstance(value, dict) and value.get('type'):
                yield value
            else:
                yield from _find(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _find(value)


def families_of_timm():
    """Find the smallest model of each family (module) of timm."""
    import timm
    from timm.models._registry import _model_to_module as modules

    names = {}
    for name in timm.list_models():
        names.setdefault(modules[name], []).append(name)
    smallest = {}
    for family, members in sorted(names.items()):
        sizes = {}
        for name in members:
            if name.startswith('test_') and len(members) > 1:
                continue  # models for timm's tests have too few blocks
            if len(members) > 40 and not any(
                word in name for word in ('18', 'tiny', 'nano', 'small', 'test', 'b0')
            ):
                continue
            with torch.device('meta'):
                try:
                    sizes[name] = sum(
                        p.numel() for p in timm.create_model(name).parameters()
                    )
                except Exception:
                    sizes[name] = 10**12
        name = min(sizes, key=sizes.get)
        smallest[f'timm {family} {name}'] = name, 1
    return smallest


def build(toolbox, cfg):
    """Build a backbone with random weights, as small as possible.

    Args:
        toolbox (str): Name of the toolbox, or ``timm``.
        cfg (dict | str): Config or name of the backbone.

    Returns:
        tuple: The backbone, an input and its outputs.
    """
    reason = None
    for make in _makers(toolbox, cfg):
        try:
            torch.manual_seed(0)
            network = make()
            network.eval()  # some networks return None here
        except Exception as error:
            reason = error
            continue
        sizes = sizes_to_try(network)
        for size in [*SMALL, *sizes] if len(sizes) > 2 else sizes:
            shape = (2, input_channels(network), *size)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            try:
                with torch.no_grad():
                    outs = run(network, x)
                    finite = all(out.isfinite().all() for out in outs)
                    if not finite and hasattr(network, 'init_weights'):
                        network.init_weights()
                        outs = run(network, x)
                return network, x, outs
            except TimeoutError:
                raise
            except Exception as error:
                reason = error
    raise RuntimeError(f'cannot be built or run: {one_line(reason)}')


def _makers(toolbox, cfg):
    """List functions that build a backbone, the smallest one first."""
    if toolbox == 'timm':
        import timm

        return [lambda: timm.create_model(cfg)]
    import_module(f'{toolbox}.models')

    def make(cfg):
        with MODELS.switch_scope_and_registry(toolbox) as registry:
            return registry.build(copy.deepcopy(cfg))

    small = reduced(toolbox, cfg)
    cfgs = [dict(small, img_size=64), dict(small, img_size=56), small, cfg]
    return [lambda cfg=cfg: make(cfg) for cfg in cfgs]


def reduced(toolbox, cfg):
    """Change the config of a backbone to fewer blocks of the same kinds.

    Args:
        toolbox (str): Name of the toolbox.
        cfg (dict): Config of the backbone.

    Returns:
        dict: A changed copy.
    """
    cfg = copy.deepcopy(cfg)
    import_module(f'{toolbox}.models')
    with MODELS.switch_scope_and_registry(toolbox) as registry:
        kind = registry.get(cfg['type'])
    for zoo in ('arch_zoo', 'arch_settings'):
        zoo = getattr(kind, zoo, {})
        arch = cfg.get('arch', cfg.get('depth'))
        if isinstance(arch, str) and isinstance(zoo.get(arch), dict):
            cfg['arch'] = copy.deepcopy(zoo[arch])
    if cfg.get('depth') in (101, 152):
        cfg['depth'] = 50
    for node in (cfg, cfg['arch']) if isinstance(cfg.get('arch'), dict) else (cfg,):
        for key, value in node.items():
            if key in ('num_layers', 'depth', 'depths', 'num_blocks', 'layers'):
                if isinstance(value, (list, tuple)) and len(value) == 4:
                    if all(isinstance(n, int) for n in value):
                        node[key] = [min(n, 2) for n in value]
                elif isinstance(value, int) and key != 'depth':
                    out = cfg.get('out_indices', -1)
                    last = max(out) if isinstance(out, (list, tuple)) else out
                    if last < 0:
                        node[key] = min(value, 6)
    return cfg


def run(network, x):
    # Some networks draw random masks in every forward pass
    torch.manual_seed(1)
    return [t for _, t in tensors(network(x, *other_arguments(network)))]


def attach(network, size, blocks='auto'):
    return mmela.attach_layer_attention(
        network,
        dict(type='MRLABase', zero_init=True),
        blocks=blocks,
        input_size=size,
    )


def same(outs, expected):
    """Whether outputs are equal, except those that overflow with random weights."""
    finite = [(a, b) for a, b in zip(outs, expected) if b.isfinite().all()]
    return bool(finite) and all(torch.equal(a, b) for a, b in finite)


def check(network, x, before):
    """Attach layer attention, compare, train a step, prune and slim.

    Args:
        network (nn.Module): A backbone.
        x (Tensor): An input.
        before (list[Tensor]): Outputs of the backbone.

    Returns:
        str: Description of the attached attentions.
    """
    size = tuple(x.shape[2:])
    net = attach(copy.deepcopy(network), size)
    keys = {k for k in net.state_dict() if '.layer_attn.' not in k}
    assert keys == set(network.state_dict()), 'keys have changed'
    net.eval()
    with torch.no_grad():
        assert same(run(net, x), before), 'not equal'

    stages = attention_stages(net)
    attentions = layer_attentions(net)
    meter = NetworkKLMeter(stages)
    meter.attach()
    net.train()
    outs = [out for out in run(net, x) if out.requires_grad]
    sum(out.float().square().mean() for out in outs).backward()
    meter.detach()
    for name, attention in attentions.items():
        for key, param in attention.named_parameters():
            assert param.grad is not None, f'no gradient at {name}.{key}'
    params = [p for p in net.parameters() if p.grad is not None]
    torch.optim.SGD(params, lr=1e-4).step()
    net.eval()

    values = [v for v in meter.compute().values() if v is not None]
    if values:
        pruned = meter.decide(FixedCount(count=1)).pruned
    else:
        pruned = [list(attentions)[-1]]
    assert len(pruned) == 1, f'pruned {pruned}'
    prune(net, pruned)
    state, blocks = slim_state_dict(net)
    with torch.no_grad():
        expected = run(net, x)
        slim = attach(copy.deepcopy(network), size, blocks[''])
        # Some networks drop their buffers from the state dict that they load
        missing, unexpected = slim.load_state_dict(state, strict=False)
        wrong = [*unexpected, *(k for k in missing if '.layer_attn.' in k)]
        assert not wrong, f'slim: {wrong[0]}'
        slim.eval()
        left = sum(isinstance(m, LayerAttention) for m in slim.modules())
        assert left == len(attentions) - 1, f'{left} attentions are left'
        assert same(run(slim, x), expected), 'slim: not equal'
    kinds = dict.fromkeys(type(b).__name__ for s in stages.values() for b in s.blocks)
    how = '' if values else ', none measured'
    return f'{len(attentions)} in {len(stages)} stages of {", ".join(kinds)}{how}'


@contextmanager
def limit(seconds):
    def stop(*args):
        raise TimeoutError(f'not done after {seconds} s')

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def attempt(toolbox, cfg, seconds):
    """Test one backbone.

    Args:
        toolbox (str): Name of the toolbox, or ``timm``.
        cfg (dict | str): Config or name of the backbone.
        seconds (int): Time limit.

    Returns:
        dict: ``ok`` and ``note``.
    """
    began = time.time()
    try:
        with limit(seconds):
            note = check(*build(toolbox, cfg))
        result = dict(ok=True, note=note)
    except Exception as error:
        result = dict(ok=False, note=f'{type(error).__name__}: {one_line(error)}'[:300])
    return dict(result, seconds=round(time.time() - began, 1))


def write_table(results, path):
    """Write the results as Markdown, with a row for each kind of backbone.

    A variant that was not tried counts like the others of its kind if these all agree.
    """
    lines = [
        '# Coverage',
        '',
        '`tools/analysis/coverage.py` writes this page. It attaches layer attention',
        "with `blocks='auto'` to every backbone. A variant that was not tried counts",
        'like the others of its kind if these agree, and as not attached otherwise.',
        '',
        '| from | attached | of | share | tried |',
        '| --- | --- | --- | --- | --- |',
    ]
    sections = []
    for toolbox in (*TOOLBOXES, 'timm'):
        kinds = {}
        for key, result in results.items():
            if key.split(' ')[0] == toolbox:
                kinds.setdefault(key.split(' ')[1], []).append((key, result))
        if not kinds:
            continue
        total = good = tried = 0
        rows = []
        for kind, variants in kinds.items():
            count = sum(r['count'] for _, r in variants)
            seen = [r for _, r in variants if r['ok'] is not None]
            done = sum(r['count'] for r in seen if r['ok'])
            if seen and all(r['ok'] for r in seen):
                done = count
            total, good = total + count, good + done
            tried += sum(r['count'] for r in seen)
            notes = [r['note'] for r in seen if not r['ok']]
            notes = notes or [r['note'] for r in seen] or ['not tried']
            name = variants[0][0].split(' ')[2] if toolbox == 'timm' else ''
            what = f'{kind} ({name})' if name else kind
            rows.append((what, done, count, f'{len(seen)}/{len(variants)}', notes[0]))
        version = import_module(toolbox).__version__
        what = 'families' if toolbox == 'timm' else 'backbones in configs'
        lines.append(
            f'| {toolbox} {version}, {what} | {good} | {total} | '
            f'{100 * good / total:.1f} % | {tried} |'
        )
        sections += ['', f'## {toolbox}', '']
        sections += ['| kind | attached | of | variants tried | example or reason |']
        sections += ['| --- | --- | --- | --- | --- |']
        rows.sort(key=lambda row: (-row[2], row[0]))
        sections += ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows]
    text = '\n'.join([*lines, *sections]) + '\n'
    write_text(path, text)


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.disable(logging.WARNING)
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    path = Path(args.results)
    results = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for toolbox in args.what:
        timm = toolbox == 'timm'
        backbones = families_of_timm() if timm else backbones_of_configs(toolbox)
        # One of each kind first
        first = {key.split(' ')[1]: key for key in reversed(list(backbones))}
        order = sorted(backbones, key=lambda key: key not in first.values())
        for number, key in enumerate(order, 1):
            cfg, count = backbones[key]
            old = results.setdefault(key, dict(ok=None, count=count))
            done = old['ok'] or (old['ok'] is False and not args.retry)
            done = done or (args.first and key not in first.values())
            if done or args.only and args.only not in ' '.join(key.split(' ')[:2]):
                continue
            results[key] = dict(attempt(toolbox, cfg, args.seconds), count=count)
            write_text(path, json.dumps(results, indent=1))
            r = results[key]
            word = 'ok' if r['ok'] else 'FAILED'
            name = key if timm else ' '.join(key.split(' ')[:2])
            print(
                f'{number}/{len(backbones)} {name} x{count}: {word} '
                f'{r["note"]} ({r["seconds"]} s)',
                flush=True,
            )
        write_text(path, json.dumps(results, indent=1))
    if args.table:
        write_table(results, args.table)


if __name__ == '__main__':
    main()
