"""Plain versions of the networks published by the authors of MRLA, DLA and KCLA.

A network is a state dict with the published keys, and a forward pass in evaluation
mode on plain tensors. The forward pass follows the equations head by head. If the
authors' code differs from them, it follows the code and says so. Nothing here uses
mmela or torch modules.
"""

import math

import torch
import torch.nn.functional as F

EXPANSION = 4
RESTART = 11
"""Block of a stage at which KCLA continues with only its normalized mean."""


CELLS = dict(dla_light=3, dla_base=3, dia=4)
"""Gates of the recurrent cell that the blocks of a stage share."""


def eca_size(channels):
    """The odd number among t and t + 1, with t = floor((log2(C) + 1) / 2)."""
    t = int((math.log2(channels) + 1) / 2)
    return t + 1 - t % 2


class PublishedNetwork:
    """A bottleneck ResNet with layer attention, with random weights.

    Args:
        arch (str): 'mla', 'mla_eq4', 'mrla_base', 'mrla_base_no_relu',
            'mrla_light', 'linear', 'linear_no_relu', 'hydra', 'focused', 'kcla',
            'kcla_first', 'dla_light', 'dla_base' or 'dia'.
        blocks (tuple[int]): Number of blocks of each stage.
        stem (str): '7x7' or 'deep' for ImageNet, '3x3' for CIFAR.
        head_dim (int): Channels of a head.
        width (int): Inner channels of the first stage.
        stem_width (int): Output channels of the stem.
        num_classes (int): Number of classes.
        light_name (str): Name of MRLA-light's layer.
        groups (int): Groups of the 3x3 convolutions. With groups, these are twice as
            wide, as in 32x4d.
        reduction (int): Channel reduction in the cells of DLA and DIA.
        seed (int): Seed of the weights.
    """

    def __init__(
        self,
        arch,
        blocks,
        stem,
        head_dim,
        width=8,
        stem_width=12,
        num_classes=5,
        light_name='mrla',
        groups=1,
        reduction=4,
        seed=0,
    ):
        self.arch, self.blocks, self.stem = arch, blocks, stem
        self.head_dim = head_dim
        self.groups, self.reduction = groups, reduction
        self.light_name = light_name if arch == 'mrla_light' else 'mrla'
        self.generator = torch.Generator().manual_seed(seed)
        self.state_dict = {}
        self._make_stem(stem_width)
        channels = stem_width
        for stage, depth in enumerate(blocks):
            inner = width * 2**stage
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                self._make_block(stage, block, channels, inner, stride)
                channels = inner * EXPANSION
            if arch in CELLS:
                self._make_cell(stage, channels)
        if arch == 'dla_light' and stem == '3x3':  # KCLA's copy
            self._make_norm('bn2', channels)
        if arch == 'mrla_base' and stem == '3x3':
            self._make_norm('finalbn', channels)
        self.state_dict['fc.weight'] = self._randn(num_classes, channels) / math.sqrt(
            channels
        )
        self.state_dict['fc.bias'] = self._randn(num_classes)

    # Names

    def block_name(self, stage, block):
        if self.arch in ('kcla', 'kcla_first', 'dla_light') and self.stem != '3x3':
            return f'layer{stage + 1}.layers.{block}'
        if self.arch == 'dia':
            return f'layer{stage + 1}.ModuleList.{block}'
        if self.arch in CELLS:
            return f'stages.{stage}.layers.{block}'
        if self.arch in ('mrla_light', 'mla_eq4'):
            return f'layer{stage + 1}.{block}'
        return f'stages.{stage}.{block}'

    def attention_name(self, stage, block):
        if self.arch in CELLS:
            name = 'layer_attention' if self.stem == '3x3' else 'mrla'
            return f'{self.cell_name(stage)}.attention.{block}.layer_attention.{name}'
        if self.arch in ('kcla', 'kcla_first'):
            if self.stem != '3x3':
                return f'layer{stage + 1}.attention.{block}'
            return self.block_name(stage, block) + '.kcla'
        if self.arch == 'mla_eq4':
            return self.block_name(stage, block) + '.la'
        return f'{self.block_name(stage, block)}.mrla.{self.light_name}'

    def norm_name(self, stage, block):
        if self.arch in CELLS:
            return f'{self.cell_name(stage)}.attention.{block}.bn_layer_attention'
        name = 'bn_la' if self.arch == 'mla_eq4' else 'bn_mrla'
        return f'{self.block_name(stage, block)}.{name}'

    # Weights

    def _randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.double)

    def _make_conv(self, name, out, groups_in, size):
        self.state_dict[f'{name}.weight'] = self._randn(
            out, groups_in, size, size
        ) / math.sqrt(groups_in * size * size)

    def _make_norm(self, name, channels, scale=1.0):
        state = self.state_dict
        state[f'{name}.weight'] = scale * (self._randn(channels) / 4 + 1)
        state[f'{name}.bias'] = self._randn(channels) / 4
        state[f'{name}.running_mean'] = self._randn(channels) / 4
        state[f'{name}.running_var'] = self._randn(channels).abs() + 0.5
        state[f'{name}.num_batches_tracked'] = torch.tensor(7)

    def _make_stem(self, width):
        if self.stem == 'deep':
            self._make_conv('conv1.0', width // 2, 3, 3)
            self._make_norm('conv1.1', width // 2)
            self._make_conv('conv1.3', width // 2, width // 2, 3)
            self._make_norm('conv1.4', width // 2)
            self._make_conv('conv1.6', width, width // 2, 3)
        else:
            self._make_conv('conv1', width, 3, int(self.stem[0]))
        self._make_norm('bn1', width)

    def _make_cell(self, stage, channels):
        """Create two bottlenecks and DLA-L's convolution."""
        cell = self.cell_name(stage)
        width = channels // self.reduction
        sizes = ((0, width, channels), (2, CELLS[self.arch] * channels, width))
        for part in ('w_ih', 'w_hh'):
            for i, out, inner in sizes:
                name = f'{cell}.lstm.{part}.0.seq.{i}'
                self.state_dict[f'{name}.weight'] = self._randn(out, inner) / inner**0.5
                self.state_dict[f'{name}.bias'] = self._randn(out) / 4
        if self.arch == 'dla_light':
            self._make_conv(f'{cell}.{self.excite}', channels, 1, 3)

    def cell_name(self, stage):
        cifar = self.arch != 'dia' and self.stem == '3x3'
        return f'stages.{stage}' if cifar else f'layer{stage + 1}'

    @property
    def excite(self):
        return 'excite' if self.stem == '3x3' else 'extict'

    def _make_block(self, stage, block, channels, inner, stride):
        name = self.block_name(stage, block)
        outer = inner * EXPANSION
        inner *= 1 if self.groups == 1 else 2
        per_group = inner // self.groups
        for i, (c_in, c_out, size) in enumerate(
            [(channels, inner, 1), (per_group, inner, 3), (inner, outer, 1)], 1
        ):
            self._make_conv(f'{name}.conv{i}', c_out, c_in, size)
            # Small at the end of a branch, to keep the sum over 16 blocks small
            self._make_norm(f'{name}.bn{i}', c_out, 0.4 if i == 3 else 1.0)
        if stride > 1 or channels != outer:
            self._make_conv(f'{name}.downsample.0', outer, channels, 1)
            self._make_norm(f'{name}.downsample.1', outer)
        self._make_attention(stage, block, outer)

    def _make_attention(self, stage, block, channels):
        if self.arch == 'dia':
            return
        name = self.attention_name(stage, block)
        state = self.state_dict
        size = eca_size(channels)
        for letter in 'qk':
            state[f'{name}.W{letter}.weight'] = self._randn(1, 1, size) / 4
        self._make_conv(f'{name}.Wv', channels, 1, 3)
        if self.arch == 'focused':
            state[f'{name}.positional_encoding'] = self._randn(1, channels, 1, 1) / 4
            state[f'{name}.scale'] = self._randn(1, 1, channels)
        if self.arch not in ('kcla', 'kcla_first'):
            # An attention that replaces the output must not be small
            scale = 2.0 if self.arch == 'mla_eq4' else 0.4
            self._make_norm(self.norm_name(stage, block), channels, scale)
            if self.arch == 'mrla_light':
                name = self.block_name(stage, block)
                state[f'{name}.mrla.lambda_t'] = self._randn(channels, 1, 1)
            if self.arch == 'dla_light':
                name = self.attention_name(stage, block).rpartition('.')[0]
                state[f'{name}.lambda_t'] = self._randn(channels, 1, 1)
            return
        heads = channels // self.head_dim
        self._make_norm(f'{name}.bn_attention', channels, 0.4)
        state[f'{name}.{self.part("head")}.weight'] = self._randn(heads, heads)
        scales = torch.tensor(self.scales(heads), dtype=torch.double)
        if self.arch == 'kcla_first':
            scales = 1 / (scales * math.sqrt(self.head_dim))
        state[f'{name}.norm_d'] = (1 / scales).view(1, heads, 1, 1, 1)
        if block in (0, RESTART):  # also in the first stage
            self._make_conv(
                f'{name}.{self.part("reduce")}', channels, channels // 2 // heads, 1
            )
            self._make_norm(f'{name}.{self.part("norm")}', channels)
            state[f'{name}.{self.part("key")}.weight'] = self._randn(1, 1, size)

    def part(self, name):
        """Name of a part of the attention in this version of KCLA."""
        first = dict(
            head='select_temp', reduce='adjust_channel.0', norm='membn', key='memWk'
        )
        later = dict(head='head_att', reduce='adjust_channel', norm='u_bn', key='u_Wk')
        return (first if self.arch == 'kcla_first' else later)[name]

    @staticmethod
    def scales(heads):
        """A geometric sequence from 0.7 to 1 / 0.7."""
        if heads == 1:
            return [0.7]
        ratio = (1 / 0.7 / 0.7) ** (1 / (heads - 1))
        return [0.7 * ratio**g for g in range(heads)]

    # Forward pass

    def conv(self, name, x, stride=1, groups=1):
        weight = self.state_dict[f'{name}.weight']
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, None, stride, padding, groups=groups)

    def norm(self, name, x):
        weight, bias, mean, var = (
            self.state_dict[f'{name}.{key}'].view(1, -1, 1, 1)
            for key in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def over_channels(self, name, pooled):
        """1-D convolution over the channels, (B, C) to a (B, d) per head."""
        weight = self.state_dict[f'{name}.weight'].flatten()
        half = len(weight) // 2
        padded = F.pad(pooled, (half, half))
        out = sum(w * padded[:, i : i + pooled.shape[1]] for i, w in enumerate(weight))
        return out.split(self.head_dim, dim=1)

    def heads(self, x):
        """(B, C, H, W) to a (B, d, H, W) per head."""
        return x.split(self.head_dim, dim=1)

    def forward(self, x):
        """Compute the outputs of the stages and the class scores."""
        if self.stem == '3x3':
            x = self.norm('bn1', self.conv('conv1', x)).relu()
        else:
            if self.stem == 'deep':
                x = self.norm('conv1.1', self.conv('conv1.0', x, 2)).relu()
                x = self.norm('conv1.4', self.conv('conv1.3', x)).relu()
                x = self.norm('bn1', self.conv('conv1.6', x)).relu()
            else:
                x = self.norm('bn1', self.conv('conv1', x, 2)).relu()
            x = F.max_pool2d(x, 3, 2, 1)
        outs, carried = [], None
        for stage, depth in enumerate(self.blocks):
            memory = dict(carried=carried)
            for block in range(depth):
                x, identity = self.residual_block(stage, block, x, memory)
                out = getattr(self, self.arch)(stage, block, x, identity, memory)
                x = out if self.arch == 'mla_eq4' else x + out
            carried = memory.get('mean')
            outs.append(x)
        fc = self.state_dict['fc.weight'], self.state_dict['fc.bias']
        return outs, F.linear(x.mean((2, 3)), *fc)

    def residual_block(self, stage, block, x, memory):
        name = self.block_name(stage, block)
        stride = 2 if stage > 0 and block == 0 else 1
        out = self.norm(f'{name}.bn1', self.conv(f'{name}.conv1', x)).relu()
        out = self.conv(f'{name}.conv2', out, stride, self.groups)
        out = self.norm(f'{name}.bn2', out).relu()
        out = self.norm(f'{name}.bn3', self.conv(f'{name}.conv3', out))
        if self.arch == 'dia':
            out = out * self.step(stage, out.mean((2, 3)), memory)[..., None, None]
        if f'{name}.downsample.0.weight' in self.state_dict:
            x = self.conv(f'{name}.downsample.0', x, stride)
            x = self.norm(f'{name}.downsample.1', x)
        return (out + x).relu(), x

    def value(self, stage, block, x):
        name = self.attention_name(stage, block)
        return self.conv(f'{name}.Wv', x, groups=x.shape[1])

    def softmax_attention(self, query, keys, values):
        """MRLA, eq. 3: per head, values weighted by softmax of the scores."""
        out = []
        for g, q in enumerate(query):
            scores = [(q * key[g]).sum(1) / self.head_dim**0.5 for key in keys]
            weights = torch.stack(scores).softmax(0)
            out.append(
                sum(
                    w.view(-1, 1, 1, 1) * self.heads(value)[g]
                    for w, value in zip(weights, values)
                )
            )
        return torch.cat(out, 1)

    def own_transforms(self, stage, block, x, memory):
        """Query of a block, and its keys and values of all blocks so far."""
        name = self.attention_name(stage, block)
        inputs = memory.setdefault('inputs', [])
        inputs.append(x)
        query = self.over_channels(f'{name}.Wq', x.mean((2, 3)))
        keys = [self.over_channels(f'{name}.Wk', y.mean((2, 3))) for y in inputs]
        return query, keys, [self.value(stage, block, y) for y in inputs]

    def mla(self, stage, block, x, identity, memory):
        """MRLA, eq. 3."""
        out = self.softmax_attention(*self.own_transforms(stage, block, x, memory))
        return self.norm(self.norm_name(stage, block), out).relu()

    def mla_eq4(self, stage, block, x, identity, memory):
        """MRLA, eq. 4, for ImageNet: replaces the block's output.

        The authors' code differs from the equation: it reads the concatenated keys of t
        blocks as those of t tokens of the first head, then of the second head, and so
        on. It does the same with the values.
        """
        query, keys, values = self.own_transforms(stage, block, x, memory)
        keys = torch.cat([torch.cat(key, 1) for key in keys], 1).split(self.head_dim, 1)
        values = torch.cat(values, 1).split(self.head_dim, 1)
        count, out = len(memory['inputs']), []
        for g, q in enumerate(query):
            tokens = range(g * count, (g + 1) * count)
            scores = [(q * keys[i]).sum(1) / self.head_dim**0.5 for i in tokens]
            weights = torch.stack(scores).softmax(0)
            out.append(
                sum(w.view(-1, 1, 1, 1) * values[i] for w, i in zip(weights, tokens))
            )
        return self.norm(self.norm_name(stage, block), torch.cat(out, 1))

    def linear(self, stage, block, x, identity, memory):
        """KCLA's linear attention: elu + 1 of query and key, no softmax."""
        query, keys, values = self.own_transforms(stage, block, x, memory)
        out = []
        for g, q in enumerate(query):
            weights = [((F.elu(q) + 1) * (F.elu(k[g]) + 1)).sum(1) for k in keys]
            out.append(
                sum(
                    w.view(-1, 1, 1, 1) * self.heads(value)[g]
                    for w, value in zip(weights, values)
                )
            )
        out = self.norm(self.norm_name(stage, block), torch.cat(out, 1))
        return out.relu() if self.arch == 'linear' else out

    linear_no_relu = linear  # an older version of the same file

    def hydra(self, stage, block, x, identity, memory):
        """KCLA's Hydra attention: each channel is a head, and vectors have norm 1."""
        query, keys, values = self.own_transforms(stage, block, x, memory)
        query = torch.cat(query, 1)
        query = query / query.norm(dim=1, keepdim=True)
        out = 0
        for key, value in zip(keys, values):
            key = torch.cat(key, 1)
            key = key / key.norm(dim=1, keepdim=True)
            out = out + (query * key)[..., None, None] * value
        return self.norm(self.norm_name(stage, block), out)

    def focused(self, stage, block, x, identity, memory):
        """KCLA's focused attention: squares, rescaled to the previous norm."""
        name = self.attention_name(stage, block)
        x = x + self.state_dict[f'{name}.positional_encoding']
        query, keys, values = self.own_transforms(stage, block, x, memory)
        scale = (1 + self.state_dict[f'{name}.scale'].view(-1).exp()).log()

        def focus(vector):
            vector = (torch.cat(vector, 1).relu() + 1e-6) / scale
            square = vector * vector
            square = square / square.norm(dim=1, keepdim=True)
            return self.heads(square * vector.norm(dim=1, keepdim=True))

        query, keys = focus(query), [focus(key) for key in keys]
        out = []
        for g, q in enumerate(query):
            out.append(
                sum(
                    (q * key[g]).sum(1).view(-1, 1, 1, 1) * self.heads(value)[g]
                    for key, value in zip(keys, values)
                )
            )
        return self.norm(self.norm_name(stage, block), torch.cat(out, 1))

    def mrla_base(self, stage, block, x, identity, memory):
        """MRLA, eq. 6: keys and values of earlier blocks are reused."""
        name = self.attention_name(stage, block)
        pooled = x.mean((2, 3))
        keys = memory.setdefault('keys', [])
        values = memory.setdefault('values', [])
        keys.append(self.over_channels(f'{name}.Wk', pooled))
        values.append(self.value(stage, block, x))
        query = self.over_channels(f'{name}.Wq', pooled)
        out = self.softmax_attention(query, keys, values)
        out = self.norm(self.norm_name(stage, block), out)
        return out if self.arch == 'mrla_base_no_relu' else out.relu()

    mrla_base_no_relu = mrla_base

    def mrla_light(self, stage, block, x, identity, memory):
        """MRLA, eq. 8, which adds the identity input."""
        name = self.attention_name(stage, block)
        pooled = x.mean((2, 3))
        query = self.over_channels(f'{name}.Wq', pooled)
        key = self.over_channels(f'{name}.Wk', pooled)
        out = []
        for q, k, v in zip(query, key, self.heads(self.value(stage, block, x))):
            score = (q * k).sum(1) / self.head_dim**0.5
            out.append(score.sigmoid().view(-1, 1, 1, 1) * v)
        name = self.block_name(stage, block)
        lambda_o = self.state_dict[f'{name}.mrla.lambda_t']
        return self.norm(f'{name}.bn_mrla', lambda_o * identity + torch.cat(out, 1))

    def cell(self, stage, x, state):
        """DIA, section 3.2, or DLA, eq. 8 to 10: next h and c."""
        gates = 0
        for part, vector in (('w_ih', x), ('w_hh', state[0])):
            name = f'{self.cell_name(stage)}.lstm.{part}.0.seq'
            for i in (0, 2):
                weight = self.state_dict[f'{name}.{i}.weight']
                vector = vector @ weight.T + self.state_dict[f'{name}.{i}.bias']
                vector = vector.clamp(min=0) if i == 0 else vector
            gates = gates + vector
        gates = gates.split(x.shape[1], 1)
        c = gates[1].sigmoid() * state[1] + gates[0].sigmoid() * gates[2].tanh()
        return c.sigmoid() * (gates[3].sigmoid() if len(gates) == 4 else 1), c

    def step(self, stage, x, memory):
        """One step of the cell of a stage, and its h."""
        zeros = torch.zeros_like(x)
        memory['state'] = self.cell(stage, x, memory.get('state', (zeros, zeros)))
        return memory['state'][0]

    def dia(self, stage, block, x, identity, memory):
        """DIA, which runs within the block."""
        return torch.zeros_like(x)

    def dla_light(self, stage, block, x, identity, memory):
        """DLA, section 3.4: MRLA-light with an updated earlier output."""
        self.step(stage, x.mean((2, 3)), memory)
        gate = self.cell(stage, identity.mean((2, 3)), memory['state'])[0]
        name = f'{self.cell_name(stage)}.{self.excite}'
        again = self.conv(name, identity, groups=x.shape[1])
        before = identity * gate[..., None, None] + again
        name = self.attention_name(stage, block)
        query = self.over_channels(f'{name}.Wq', x.mean((2, 3)))
        key = self.over_channels(f'{name}.Wk', x.mean((2, 3)))
        out = [
            ((q * k).sum(1) / self.head_dim**0.5).sigmoid().view(-1, 1, 1, 1) * v
            for q, k, v in zip(query, key, self.heads(self.value(stage, block, x)))
        ]
        name = name.rpartition('.')[0]
        before = self.state_dict[f'{name}.lambda_t'] * before
        return self.norm(self.norm_name(stage, block), before + torch.cat(out, 1))

    def dla_base(self, stage, block, x, identity, memory):
        """DLA, section 3.3: MRLA-base with updated keys and values."""
        self.step(stage, x.mean((2, 3)), memory)
        for i, key in enumerate(memory.get('keys', [])):
            key = torch.cat(key, 1)
            key = key * self.cell(stage, key, memory['state'])[0]
            memory['keys'][i] = key.split(self.head_dim, 1)
            value = memory['values'][i]
            gate = self.cell(stage, value.mean((2, 3)), memory['state'])[0]
            memory['values'][i] = value * gate[..., None, None]
        return self.mrla_base(stage, block, x, identity, memory)

    def kcla_first(self, stage, block, x, identity, memory):
        """The authors' first detectors, see :meth:`kcla`."""
        return self.kcla(stage, block, x, identity, memory)

    def kcla(self, stage, block, x, identity, memory):
        """KCLA, eq. 10 and 11, and algorithm 1 between stages.

        In the first detectors, the temperatures are inverse and include the root of d,
        and the query is scored along the sum of the stage's keys.
        """
        name = self.attention_name(stage, block)
        heads = x.shape[1] // self.head_dim
        scales = self.scales(heads)
        first = self.arch == 'kcla_first'
        if first:
            scales = [1 / s / math.sqrt(self.head_dim) for s in scales]

        def weigh(keys):
            return [
                (key.norm(dim=1) * s).clamp(max=10).exp().view(-1, 1, 1, 1)
                for key, s in zip(keys, scales)
            ]

        u = z = [0.0] * heads
        if block == RESTART:
            mean = self.norm(f'{name}.{self.part("norm")}', memory['mean'])
            carried_key = f'{name}.{self.part("key")}'
            z = weigh(self.over_channels(carried_key, mean.mean((2, 3))))
            memory.pop('direction', None)
            u = [w * y for w, y in zip(z, self.heads(mean))]
        elif block > 0:
            u, z = memory['u'], memory['z']
        elif memory['carried'] is not None:
            mean = self.conv(
                f'{name}.{self.part("reduce")}',
                memory['carried'],
                stride=2,
                groups=heads,
            )
            mean = self.norm(f'{name}.{self.part("norm")}', mean)
            carried_key = f'{name}.{self.part("key")}'
            z = weigh(self.over_channels(carried_key, mean.mean((2, 3))))
            u = [w * y for w, y in zip(z, self.heads(mean))]

        pooled = x.mean((2, 3))
        query = self.over_channels(f'{name}.Wq', pooled)
        key = self.over_channels(f'{name}.Wk', pooled)
        weights = weigh(key)
        u = [a + w * y for a, w, y in zip(u, weights, self.heads(x))]
        z = [a + w for a, w in zip(z, weights)]
        memory['u'], memory['z'] = u, z
        memory['mean'] = torch.cat([a / b for a, b in zip(u, z)], 1)

        value = self.value(
            stage, block, torch.cat([a / (b + 1e-3) for a, b in zip(u, z)], 1)
        )
        if first:
            before = memory.get('direction', [0.0] * heads)
            key = memory['direction'] = [a + k for a, k in zip(before, key)]
        scores = torch.stack(
            [(q * k).sum(1) / k.norm(dim=1) for q, k in zip(query, key)], 1
        )
        weight = self.state_dict[f'{name}.{self.part("head")}.weight']
        gates = torch.sigmoid(scores @ weight.T)
        out = [
            gates[:, g].view(-1, 1, 1, 1) * v for g, v in enumerate(self.heads(value))
        ]
        return self.norm(f'{name}.bn_attention', torch.cat(out, 1)).relu()


class PublishedDeiT:
    """A DeiT with MRLA, with random weights.

    Args:
        light (bool): MRLA-light instead of MRLA-base.
        dims (int): Channels of the tokens, with 64 per head.
        depth (int): Number of blocks, with four per stage.
        patch (int): Patch size.
        side (int): Number of patches along a side of the image.
        num_classes (int): Number of classes.
    """

    head_dim = 16

    def __init__(self, light, dims=128, depth=6, patch=8, side=4, num_classes=5):
        self.light, self.depth, self.dims = light, depth, dims
        self.patch, self.side = patch, side
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        state = self.state_dict = {}

        def linear(name, out, inner):
            state[f'{name}.weight'] = randn(out, inner) / math.sqrt(inner)
            state[f'{name}.bias'] = randn(out) / 4

        def norm(name):
            state[f'{name}.weight'] = randn(dims) / 4 + 1
            state[f'{name}.bias'] = randn(dims) / 4

        state['cls_token'] = randn(1, 1, dims)
        state['pos_embed'] = randn(1, side**2 + 1, dims)
        pixels = 3 * patch**2
        state['patch_embed.proj.weight'] = randn(dims, 3, patch, patch) / pixels**0.5
        state['patch_embed.proj.bias'] = randn(dims)
        for i in range(depth):
            name = f'blocks.{i}'
            norm(f'{name}.norm1')
            linear(f'{name}.attn.qkv', 3 * dims, dims)
            linear(f'{name}.attn.proj', dims, dims)
            norm(f'{name}.norm2')
            linear(f'{name}.mlp.fc1', 2 * dims, dims)
            linear(f'{name}.mlp.fc2', dims, 2 * dims)
            norm(f'{name}.mrla.normx')
            size = eca_size(dims)
            for letter in 'qk':
                state[f'{name}.mrla.mrla.W{letter}.weight'] = randn(1, 1, size)
            state[f'{name}.mrla.mrla.Wv.weight'] = randn(dims, 1, 3, 3) / 3
            if light:
                norm(f'{name}.mrla.normo')
                state[f'{name}.mrla.lambda_t'] = randn(dims)
        norm('norm')
        linear('head', num_classes, dims)

    def linear(self, name, x):
        return x @ self.state_dict[f'{name}.weight'].T + self.state_dict[f'{name}.bias']

    def norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        weight, bias = (self.state_dict[f'{name}.{key}'] for key in ('weight', 'bias'))
        return x * weight + bias

    @staticmethod
    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def self_attention(self, name, x):
        heads = self.dims // 64
        qkv = self.linear(f'{name}.qkv', x).chunk(3, -1)
        out = []
        for q, k, v in zip(*(y.chunk(heads, -1) for y in qkv)):
            out.append((q @ k.transpose(1, 2) / 8).softmax(-1) @ v)
        return self.linear(f'{name}.proj', torch.cat(out, -1))

    def layer_attention(self, name, x, before, memory):
        """MRLA, algorithms 2 and 4."""
        x = self.norm(f'{name}.normx', x)
        token, patches = x[:, :1], x[:, 1:]
        image = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        value = F.conv2d(
            image,
            self.state_dict[f'{name}.mrla.Wv.weight'],
            padding=1,
            groups=self.dims,
        )
        pooled = patches.mean(1)
        vectors = []
        for letter in 'qk':
            weight = self.state_dict[f'{name}.mrla.W{letter}.weight'].flatten()
            padded = F.pad(pooled, (len(weight) // 2,) * 2)
            vector = sum(w * padded[:, i : i + self.dims] for i, w in enumerate(weight))
            vectors.append(vector.split(self.head_dim, 1))
        query, key = vectors
        if self.light:
            value = self.gelu(value).split(self.head_dim, 1)
            out = [
                ((q * k).sum(1) / 4).sigmoid().view(-1, 1, 1, 1) * v
                for q, k, v in zip(query, key, value)
            ]
        else:
            memory.append((key, value.split(self.head_dim, 1)))
            out = []
            for g, q in enumerate(query):
                scores = torch.stack([(q * k[g]).sum(1) / 4 for k, _ in memory])
                weights = scores.softmax(0)
                out.append(
                    sum(
                        w.view(-1, 1, 1, 1) * v[g] for w, (_, v) in zip(weights, memory)
                    )
                )
        out = torch.cat(out, 1).flatten(2).transpose(1, 2)
        if self.light:
            before = self.norm(f'{name}.normo', before)[:, 1:]
            out = out + self.state_dict[f'{name}.lambda_t'] * before
        return torch.cat([token, out], 1)

    def forward(self, images):
        """Compute the class token after the last normalization and the class scores."""
        weight = self.state_dict['patch_embed.proj.weight']
        x = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = x @ weight.flatten(1).T + self.state_dict['patch_embed.proj.bias']
        x = torch.cat([self.state_dict['cls_token'].expand(len(x), -1, -1), x], 1)
        x = x + self.state_dict['pos_embed']
        memory = []
        for i in range(self.depth):
            if i % 4 == 0:
                memory = []
            name, before = f'blocks.{i}', x
            x = x + self.self_attention(f'{name}.attn', self.norm(f'{name}.norm1', x))
            y = self.gelu(self.linear(f'{name}.mlp.fc1', self.norm(f'{name}.norm2', x)))
            x = x + self.linear(f'{name}.mlp.fc2', y)
            x = x + self.layer_attention(f'{name}.mrla', x, before, memory)
        token = self.norm('norm', x)[:, 0]
        return token, self.linear('head', token)


class PublishedUNet:
    """KCLA's U-Net, with random weights.

    Args:
        widths (tuple[int]): Channels of the stem and of the four stages.
        newest (bool): The newest version instead of the first. It groups the features
            for the next stage by heads, and only the first block of a stage sees the
            previous stage.
    """

    strides = (2, 2, 2, 1)
    head_dim = 16

    def __init__(self, widths=(16, 32, 64, 128, 128), newest=False):
        self.newest = newest
        # Provides weights and plain operations
        self.net = net = PublishedNetwork('kcla', (), '7x7', 16, stem_width=widths[0])
        state = self.state_dict = net.state_dict
        for key in [key for key in state if key.startswith('fc.')]:
            del state[key]
        for key in list(state):
            state[f'encoder.{key}'] = state.pop(key)
        net._make_norm('encoder.bn2', 512)
        channels = widths[0]
        for stage, (out, stride) in enumerate(zip(widths[1:], self.strides), 1):
            for block in range(2):
                name = f'encoder.layer{stage}.layers.{block}'
                for i, inner in ((1, channels if block == 0 else out), (2, out)):
                    net._make_conv(f'{name}.conv{i}', out, inner, 3)
                    net._make_norm(f'{name}.bn{i}', out)
                if block == 0 and (stride > 1 or channels != out):
                    net._make_conv(f'{name}.downsample.0', out, channels, 1)
                    net._make_norm(f'{name}.downsample.1', out)
                name = f'encoder.layer{stage}.attention.{block}'
                for letter in 'qk':
                    state[f'{name}.W{letter}.weight'] = net._randn(1, 1, eca_size(out))
                net._make_conv(f'{name}.Wv', out, 1, 3)
                net._make_norm(f'{name}.bn_attention', out)
                heads = out // self.head_dim
                scales = torch.tensor(net.scales(heads), dtype=torch.double)
                state[f'{name}.norm_d'] = (1 / scales).view(1, heads, 1, 1, 1)
                if block == 0:
                    inner = channels // heads if newest else channels
                    net._make_conv(f'{name}.adjust_channel.0', out, inner, 1)
                    state[f'{name}.adjust_channel.0.bias'] = net._randn(out)
                    net._make_norm(f'{name}.adjust_channel.1', out)
            channels = out
        decoder = [(widths[4] + widths[3], 64)]
        decoder += [(64 + widths[2], 32), (32 + widths[1], 16), (16 + widths[0], 16)]
        for step, (inner, out) in enumerate(decoder, 1):
            for i, c_in in ((0, inner), (3, out)):
                name = f'up{step}.conv.double_conv'
                net._make_conv(f'{name}.{i}', out, c_in, 3)
                state[f'{name}.{i}.bias'] = net._randn(out)
                net._make_norm(f'{name}.{i + 1}', out)
        net._make_conv('outc.conv', 1, 16, 1)
        state['outc.conv.bias'] = net._randn(1)

    def conv(self, name, x, stride=1, groups=1):
        bias = self.state_dict.get(f'{name}.bias')
        return self.net.conv(name, x, stride, groups) + (
            0 if bias is None else bias.view(-1, 1, 1)
        )

    def attention(self, stage, block, x, memory):
        """KCLA, eq. 10 and 11 without the linear layer among the heads."""
        net, name = self.net, f'encoder.layer{stage}.attention.{block}'
        # The authors' temperature is a divisor
        scales = 1 / self.state_dict[f'{name}.norm_d'].flatten()

        def weigh(y):
            keys = net.over_channels(f'{name}.Wk', y.mean((2, 3)))
            return [
                (key.norm(dim=1) / s).clamp(max=10).exp().view(-1, 1, 1, 1)
                for key, s in zip(keys, scales)
            ]

        if block == 0 and memory:
            mean = torch.cat([u / z for u, z in memory], 1)
            groups = len(scales) if self.newest else 1
            mean = self.conv(
                f'{name}.adjust_channel.0', mean, self.strides[stage - 1], groups
            )
            mean = net.norm(f'{name}.adjust_channel.1', mean)
            memory = [(z * y, z) for z, y in zip(weigh(mean), net.heads(mean))]
        elif self.newest:
            memory = []
        new = [(z * y, z) for z, y in zip(weigh(x), net.heads(x))]
        if memory:
            new = [(u + v, z + w) for (u, z), (v, w) in zip(memory, new)]
        value = net.conv(
            f'{name}.Wv', torch.cat([u / z for u, z in new], 1), groups=x.shape[1]
        )
        query = net.over_channels(f'{name}.Wq', x.mean((2, 3)))
        key = net.over_channels(f'{name}.Wk', x.mean((2, 3)))
        out = [
            ((q * k).sum(1) / k.norm(dim=1)).sigmoid().view(-1, 1, 1, 1) * v
            for q, k, v in zip(query, key, net.heads(value))
        ]
        return net.norm(f'{name}.bn_attention', torch.cat(out, 1)), new

    def forward(self, x):
        """Compute the score of a lesion, (B, 1, H, W)."""
        net, memory = self.net, []
        x = net.norm('encoder.bn1', self.conv('encoder.conv1', x)).relu()
        maps = [x]
        for stage, stride in enumerate(self.strides, 1):
            for block in range(2):
                name = f'encoder.layer{stage}.layers.{block}'
                step = stride if block == 0 else 1
                y = self.conv(f'{name}.conv1', x, step)
                y = self.conv(f'{name}.conv2', net.norm(f'{name}.bn1', y).relu())
                y = net.norm(f'{name}.bn2', y)
                if f'{name}.downsample.0.weight' in self.state_dict:
                    x = self.conv(f'{name}.downsample.0', x, step)
                    x = net.norm(f'{name}.downsample.1', x)
                x = (x + y).relu()
                out, memory = self.attention(stage, block, x, memory)
                x = x + out
            maps.append(x)
        for step, skip in enumerate(maps[-2::-1], 1):
            x = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True)
            height, width = skip.shape[2:]
            top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
            x = x[:, :, top : top + height, left : left + width]
            x = torch.cat([skip, x], 1)
            for i in (0, 3):
                name = f'up{step}.conv.double_conv'
                x = net.norm(f'{name}.{i + 1}', self.conv(f'{name}.{i}', x)).relu()
        return self.conv('outc.conv', x)
