"""Small networks of all kinds that layer attention can be attached to."""

import torch
from torch import nn


class Conv(nn.Module):
    """A residual block of maps, with a downsample if the channels change."""

    def __init__(self, ins, outs, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, 3, stride, 1)
        change = ins != outs or stride > 1
        self.down = nn.Conv2d(ins, outs, 1, stride) if change else None

    def forward(self, x):
        out = self.conv(x)
        out += x if self.down is None else self.down(x)
        return out.relu()


class Mixing(nn.Module):
    """Adds to its input in a submodule, like mmdet's PVT."""

    def __init__(self, dims):
        super().__init__()
        self.fc = nn.Linear(dims, dims)

    def forward(self, x, identity):
        return identity + self.fc(x)


class Layer(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.mix = Mixing(dims)
        self.ffn = Mixing(dims)

    def forward(self, x, hw=None):
        x = self.mix(self.norm(x), identity=x)
        return self.ffn(self.norm(x), identity=x)


class Patches(nn.Module):
    def __init__(self, dims, extra=0, last=False):
        super().__init__()
        self.proj = nn.Conv2d(3, dims, 4, 4)
        self.extra = nn.Parameter(torch.zeros(1, extra, dims))
        self.layers = nn.ModuleList(Layer(dims) for _ in range(3))
        self.last = last  # (B, H, W, C)

    def forward(self, x):
        x = self.proj(x)
        if self.last:
            x = x.permute(0, 2, 3, 1)
        else:
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([self.extra.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x


class Branches(nn.Module):
    """Two branches that exchange features, like HRNet's."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(Conv(w, w), Conv(w, w)) for w in (4, 8)
        )
        self.up = nn.Conv2d(8, 4, 1)
        self.down = nn.Conv2d(4, 8, 1, 2)

    def forward(self, xs):
        a, b = (branch(x) for branch, x in zip(self.branches, xs))
        grown = nn.functional.interpolate(self.up(b), scale_factor=2)
        return a + grown, b + self.down(a)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1, 2)])
        self.stages = nn.ModuleList([Branches(), Branches()])

    def forward(self, x):
        xs = [stem(x) for stem in self.stem]
        for stage in self.stages:
            xs = stage(xs)
        return xs


class Nested(nn.Module):
    """Nested groups, and a split like in CSP."""

    def __init__(self):
        super().__init__()
        self.groups = nn.Sequential(
            nn.Sequential(Conv(3, 8, 2), nn.Sequential(Conv(8, 8), Conv(8, 8))),
            nn.Sequential(nn.Sequential(Conv(8, 8)), Conv(8, 16, 2)),
        )
        self.short, self.main = nn.Conv2d(16, 6, 1), nn.Conv2d(16, 6, 1)
        self.blocks = nn.Sequential(Conv(6, 6), Conv(6, 6))
        self.join = nn.Conv2d(12, 12, 1)

    def forward(self, x):
        x = self.groups(x)
        return self.join(torch.cat([self.short(x), self.blocks(self.main(x))], 1))


class Trunk(nn.Module):
    """Modules that run in sequence."""

    def __init__(self, *modules):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x):
        return self.body(x)
