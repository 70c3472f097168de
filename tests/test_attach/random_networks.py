"""Random networks, given attentions and compared with a wiring by hand.

As a script it prints counts: ``python tests/test_attach/random_networks.py 1000``,
or from another seed on: ``... 1000 5000``.
"""

import copy
import logging
import math
import pickle
import random
import sys
import traceback
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from mmela import attach_layer_attention
from mmela.convert.slim import slim_state_dict
from mmela.structure import layer_attentions, prune

SIZE = (16, 24)


def map_of(value):
    """The map in what a block returns."""
    if isinstance(value, dict):
        return value['out']
    return value[0] if isinstance(value, tuple) else value


class Block(nn.Module):
    """A residual block that is written in one of many ways."""

    def __init__(self, draw, ins, outs, stride=1, conv=None, form='tensor'):
        super().__init__()
        self.kind = draw.choice(['post', 'pre', 'clobber', 'bottleneck'])
        self.add = draw.choice(['new', 'in place', 'onto the input'])
        self.relu = draw.choice(['none', 'new', 'in place'])
        self.gated = draw.random() < 0.3
        self.form = form
        self.conv = conv or nn.Conv2d(ins, outs, 3, stride, 1)
        self.norm = nn.BatchNorm2d(outs)
        self.last = nn.Conv2d(outs, outs, 1) if self.kind == 'bottleneck' else None
        changes = ins != outs or stride > 1
        self.down = nn.Conv2d(ins, outs, 1, stride) if changes else None
        if changes:
            self.add = 'new'

    def forward(self, x):
        x = map_of(x)
        if self.kind == 'clobber':
            x = x.relu_()
        out = self.conv(F.relu(x) if self.kind == 'pre' else x)
        out = self.norm(out)
        if self.last is not None:
            out = self.last(F.relu(out))
        if self.gated and x.mean() > 0.1:  # decided anew in each pass
            out = out * 1.5
        identity = x if self.down is None else self.down(x)
        if self.add == 'new':
            out = out + identity
        elif self.add == 'in place':
            out += identity
        else:
            identity += out
            out = identity
        if self.relu != 'none':
            out = F.relu(out, inplace=self.relu == 'in place')
        if self.form == 'tuple':
            return out, None
        return dict(out=out, note='text') if self.form == 'dict' else out


class Network(nn.Module):
    """A random network; its forward pass follows a plan.

    Args:
        seed (str): What it is made from.
    """

    never_skips = False

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(draw.getrandbits(31))
        self.result = draw.choice(['tensor', 'tuple', 'dict'])
        self.plan = []  # what happens, in order: (what, name)
        self.stages = []  # names of the blocks of each width and resolution
        width = draw.choice([4, 6, 8])
        self.stem = nn.Conv2d(3, width, 3, draw.choice([1, 2]), 1)
        for number in range(draw.randint(1, 3)):
            width = self._add_stage(draw, number, width)

    def _add_stage(self, draw, number, ins):
        outs = draw.choice([4, 6, 8, 12])
        stride = draw.choice([1, 2])
        form = draw.choice(['tensor', 'tensor', 'tensor', 'tuple', 'dict'])
        if draw.random() < 0.3:  # a layer that changes the shape before the blocks
            self.add_module(f'into{number}', nn.Conv2d(ins, outs, 3, stride, 1))
            self.plan.append(('layer', f'into{number}'))
            ins, stride = outs, 1
        shared = nn.Conv2d(outs, outs, 3, 1, 1) if draw.random() < 0.25 else None
        blocks, names, repeated = [], [], set()
        for index in range(draw.choice([1, 2, 3, 3, 4, 4])):
            conv = shared if index else None
            block = Block(draw, ins, outs, stride, conv, form)
            blocks.append(block)
            names.append(f'stage{number}.{index}')
            ins, stride = outs, 1
        whole = form == 'tensor' and draw.random() < 0.4
        holder = nn.Sequential(*blocks) if whole else nn.ModuleList(blocks)
        self.add_module(f'stage{number}', holder)
        for index, name in enumerate(names):
            if whole:
                continue
            chance = draw.random()
            what = 'maybe' if index and chance < 0.1 else 'block'
            self.plan.append((what, name))
            if index and 0.1 < chance < 0.2:
                self.plan.append(('block', name))  # runs twice
                repeated.add(name)
            if 0.2 < chance < 0.35:
                self.plan.append(('in place', ''))
        if whole:
            self.plan.append(('stage', f'stage{number}'))
        self.plan.append(('feature', ''))
        self.stages.append([name for name in names if name not in repeated])
        return outs

    def forward(self, x):
        return self.run(x)

    def run(self, x, attend=None):
        """The forward pass; ``attend`` is called with the name and map of blocks."""

        def block(name, x):
            out = self.get_submodule(name)(x)
            if attend is None:
                return out
            return attend(name, map_of(out))

        x, features = self.stem(x), []
        for what, name in self.plan:
            if what == 'layer':
                x = self.get_submodule(name)(map_of(x))
            elif what == 'block':
                x = block(name, x)
            elif what == 'maybe':
                if self.never_skips or map_of(x).mean() > 0:
                    x = block(name, x)
            elif what == 'in place':
                x = map_of(x).mul_(0.7)
            elif what == 'feature':
                features.append(map_of(x).mean((2, 3)))
            elif attend is None:
                x = self.get_submodule(name)(map_of(x))
            else:
                for index in range(len(self.get_submodule(name))):
                    x = block(f'{name}.{index}', x)
        if self.result == 'tensor':
            return map_of(x)
        if self.result == 'tuple':
            return (*features, map_of(x))
        return dict(features=features, out=map_of(x))


def naive(network, weights, stages, gone=(), values=()):
    """A forward pass with MRLA-base by hand (MRLA, equations 6 and 9).

    Args:
        network (Network): Without attentions.
        weights (dict): Entries ``<block>.layer_attn.*`` of a state dict.
        stages (list[list[str]]): Names of the blocks with attention.
        gone (Sequence[str]): Blocks whose attention is pruned.
        values (Sequence[str]): Blocks of which the key and value alone are left.
    """
    stage_of = {name: i for i, names in enumerate(stages) for name in names}

    def forward(x, training):
        memory = [[] for _ in stages]

        def attend(name, out):
            if name not in stage_of or name in gone:
                return out
            part = {
                key: weights[f'{name}.layer_attn.{key}.weight']
                for key in ('query', 'key', 'value')
            }
            seen = out.clone()  # the next block may change it in place
            channels = seen.shape[1]
            pooled = seen.mean((2, 3))[:, None]
            size = part['query'].shape[-1] // 2
            query = F.conv1d(pooled, part['query'], padding=size)[:, 0]
            key = F.conv1d(pooled, part['key'], padding=size)[:, 0]
            value = F.conv2d(seen, part['value'], padding=1, groups=channels)
            earlier = memory[stage_of[name]]
            earlier.append((key, value))
            if name in values:
                return out
            retrieved = []
            for sample in range(len(seen)):
                # The channels of a block are one head
                scores = [query[sample] @ k[sample] for k, _ in earlier]
                weight = torch.stack(scores).div(math.sqrt(channels)).softmax(0)
                maps = [w * v[sample] for w, (_, v) in zip(weight, earlier)]
                retrieved.append(sum(maps))
            norm = f'{name}.layer_attn.norm'
            normed = F.batch_norm(
                torch.stack(retrieved),
                weights[f'{norm}.running_mean'].clone(),
                weights[f'{norm}.running_var'].clone(),
                weights[f'{norm}.weight'],
                weights[f'{norm}.bias'],
                training,
                0.1,
                1e-5,
            )
            return seen + F.relu(normed)

        network.train(training)
        return network.run(x, attend)

    return forward


def tensors(output):
    if torch.is_tensor(output):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts for t in tensors(part)]


def outputs(network, x, training=False):
    network.train(training)
    with torch.no_grad():
        return [t.clone() for t in tensors(network(x))]


def same(one, other, what, exactly=True):
    assert len(one) == len(other), what
    for a, b in zip(one, other):
        if exactly:
            assert torch.equal(a, b), what
        else:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m: what)


def trainable(seed):
    """The first network of a seed that trains without attentions.

    A random order of operations in place can destroy what a gradient needs.
    """
    for attempt in range(100):
        network = Network(f'network {seed} {attempt}').double()
        x = torch.randn(2, 3, *SIZE).double()
        try:
            sum(t.square().mean() for t in tensors(network(x))).backward()
        except RuntimeError:
            continue
        network.zero_grad()
        return network
    raise ValueError(f'no network of seed {seed} trains')


def stir(network, generator):
    """Weights and statistics as after some training."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.3, 0.3),
                ):
                    new = torch.rand(tensor.shape, generator=generator)
                    tensor.copy_(new * (high - low) + low)
            elif isinstance(module, nn.Conv1d):
                new = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(new * 2)
    return network


class DoesNotTrain(Exception):
    """The network's own operations in place destroy what a gradient needs."""


def backward(outputs):
    """What autograd refuses in a backward pass, None if nothing."""
    try:
        sum(t.square().mean() for t in outputs).backward()
    except RuntimeError as error:
        if 'inplace operation' not in str(error):
            raise
        return str(error)


def names_a_block(error, network):
    names = [name for names in network.stages for name in names]
    return any(name in str(error) for name in names) or 'no blocks' in str(error)


def check(seed):
    """Check one network.

    Args:
        seed (int): Seed of the network.

    Returns:
        str: ``'right'``, ``'refused'`` at attach, ``'refused later'``, or ``'does not
        train'`` if a pass takes a way on which a wiring by hand does not train either.

    Raises:
        AssertionError: If anything is wrong, in silence.
    """
    draw = random.Random(f'check {seed}')
    generator = torch.Generator().manual_seed(seed)
    plain = stir(trainable(seed), generator)
    x = torch.randn(2, 3, *SIZE, generator=generator).double()
    blocks = 'auto'
    if draw.random() < 0.4:
        chosen = [[n for n in names if draw.random() < 0.9] for names in plain.stages]
        blocks = [names for names in chosen if names] or 'auto'

    def give(network, blocks=blocks, **kwargs):
        # One head of all channels, of which there are up to 12: the default
        attention = dict(type='MRLABase', **kwargs)
        return attach_layer_attention(network, attention, blocks, input_size=SIZE)

    network = copy.deepcopy(plain)
    try:
        give(network)
    except ValueError as error:
        assert names_a_block(error, plain), error
        for training in (False, True):
            found = outputs(network, x, training)
            same(found, outputs(copy.deepcopy(plain), x, training), 'after refusal')
        return 'refused'
    try:
        _check_attached(plain, network, give, blocks, x, draw, generator)
    except DoesNotTrain:
        return 'does not train'
    except RuntimeError as error:
        if not names_a_block(error, plain):
            raise AssertionError(f'not clear: {error}') from error
        return 'refused later'
    return 'right'


def stages_of(network, names, x):
    """Consecutive blocks of one width and resolution, as ``blocks='auto'`` has them."""
    stages, shapes = [], []
    network.eval()
    handles = []
    for name in names:
        module = network.get_submodule(name)

        def note(module, args, out, name=name):
            shape = map_of(out).shape
            if shapes[-1:] == [shape]:
                stages[-1].append(name)
            else:
                stages.append([name])
            shapes.append(shape)

        handles.append(module.register_forward_hook(note))
    network.never_skips = True
    outputs(network, x)
    network.never_skips = False
    for handle in handles:
        handle.remove()
    return stages


def _check_attached(plain, network, give, blocks, x, draw, generator):
    # 1. What starts at zero changes nothing, not even statistics of norms
    zero, other = give(copy.deepcopy(plain), zero_init=True), copy.deepcopy(plain)
    for training in (False, True, False):
        found = outputs(zero, x, training)
        same(found, outputs(other, x, training), f'zero_init, training={training}')
    for key, value in other.state_dict().items():
        assert torch.equal(zero.state_dict()[key], value), key

    # 2. Outputs and gradients are those of a wiring by hand
    names = [key[: -len('.layer_attn')] for key in layer_attentions(network)]
    stages = stages_of(plain, names, x) if blocks == 'auto' else blocks
    assert sorted(names) == sorted(n for s in stages for n in s), 'other blocks'
    for attention in layer_attentions(network).values():
        stir(attention, generator)
    for attempt in range(2):
        _compare(plain, network, stages, x * (1 + attempt), (), ())
    taller = torch.randn(3, 3, 32, 16, generator=generator).double()
    _compare(plain, network, stages, taller, (), ())

    # 3. Round trips
    before = outputs(network, x)
    fresh = give(copy.deepcopy(plain))
    fresh.load_state_dict(network.state_dict())
    for copied in (
        fresh,
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
    ):
        same(outputs(copied, x), before, 'round trip')
    del fresh, copied

    # 4. Pruning, also of all but key and value
    gone = [name for name in names if draw.random() < 0.3]
    values = [n for n in names if n not in gone and draw.random() < 0.3]
    pruned = copy.deepcopy(network)
    prune(pruned, [f'{name}.layer_attn' for name in gone])
    prune(pruned, [f'{name}.layer_attn' for name in values], keep_value=True)
    _compare(plain, pruned, stages, x, gone, values)
    same(outputs(network, x), before, 'the original after pruning a copy')
    back = give(copy.deepcopy(plain))
    back.load_state_dict(pruned.state_dict())
    same(outputs(back, x), outputs(pruned, x), 'state dict of a pruned network')

    # 5. Without what is pruned
    state_dict, remaining = slim_state_dict(pruned)
    slim = copy.deepcopy(plain)
    if any(remaining['']):
        give(slim, remaining[''])
    slim.load_state_dict(state_dict, strict=True)
    same(outputs(slim, x), outputs(pruned, x), 'slim')


def _compare(plain, network, stages, x, gone, values):
    """Compare with a wiring by hand, in evaluation and training."""
    entries = {
        **dict(network.named_parameters()),
        **dict(network.named_buffers()),
    }
    weights = {k: v.detach().clone() for k, v in entries.items() if 'layer_attn' in k}
    base = copy.deepcopy(plain)
    base.load_state_dict(
        {k: v for k, v in network.state_dict().items() if 'layer_attn' not in k}
    )
    leaves = {
        key: value.requires_grad_()
        for key, value in weights.items()
        if isinstance(entries[key], nn.Parameter)
    }
    by_hand = naive(base, weights, stages, gone, values)
    with torch.no_grad():
        expected = tensors(by_hand(x, False))
    same(outputs(network, x), expected, 'output', exactly=False)

    trained = copy.deepcopy(network).train()
    trained.zero_grad()
    image = x.clone().requires_grad_()
    out = tensors(trained(image))
    base.zero_grad()
    other = x.clone().requires_grad_()
    reference = tensors(by_hand(other, True))
    mine, theirs = backward(out), backward(reference)
    assert (mine is None) == (theirs is None), mine or theirs
    if mine:
        raise DoesNotTrain
    same(
        [t.detach() for t in out],
        [t.detach() for t in reference],
        'output in training',
        exactly=False,
    )
    same([image.grad], [other.grad], 'gradient of the image', exactly=False)
    expected = {**{k: p.grad for k, p in base.named_parameters()}}
    expected.update({k: v.grad for k, v in leaves.items()})
    for key, param in trained.named_parameters():
        mine = torch.zeros_like(param) if param.grad is None else param.grad
        theirs = expected[key]
        theirs = torch.zeros_like(param) if theirs is None else theirs
        same([mine], [theirs], f'gradient of {key}', exactly=False)


def main(count, first=0):
    counts = Counter()
    for seed in range(first, first + count):
        try:
            counts[check(seed)] += 1
        except Exception as error:
            counts['FAULT'] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).strip().split('\n')[0][:160]
            print(f'seed {seed}: {type(error).__name__} {text} ({last.name})')
    print(', '.join(f'{what}: {number}' for what, number in sorted(counts.items())))
    return counts['FAULT']


if __name__ == '__main__':
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    sys.exit(bool(main(*map(int, sys.argv[1:] or ['20']))))
