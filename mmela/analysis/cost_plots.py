"""Pictures of the cost of networks, and of cost against accuracy."""

from typing import Dict, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure

from ..visualization.drawing import (
    MARKERS,
    WIDTH,
    Plot,
    Theme,
    legend_above,
    plain_text,
)

# Columns of a table: label of the axis, and units from large to small
QUANTITIES = dict(
    parameters=('parameters', ((1e6, 'M'), (1e3, 'k'))),
    flops=('multiply-adds', ((1e9, 'G'), (1e6, 'M'))),
    memory=('memory for the backward pass', ((2**20, 'MiB'), (2**10, 'KiB'))),
)


def scale(quantity: str, values: Sequence[float]) -> Tuple[float, str, str]:
    """Choose the best unit for values.

    Args:
        quantity (str): A key of :data:`QUANTITIES`.
        values (Sequence[float]): The values.

    Returns:
        tuple[float, str, str]: Size of the unit, its name, and the label of the axis.
    """
    name, units = QUANTITIES[quantity]
    largest = max(map(abs, values))
    size, unit = next((u for u in units if largest >= u[0]), units[-1])
    return size, unit, f'{name} ({unit})'


def growth_plot(
    rows: Sequence[dict], quantity: str, label: str, less: str = ''
) -> Plot:
    """Cost of networks over a varying quantity (MRLA, figure 5; KCLA, figure 6).

    Args:
        rows (Sequence[dict]): For each network and value: ``network``, ``value``
            (position on the axis), ``tick`` (label there) and the quantity.
        quantity (str): A key of :data:`QUANTITIES`.
        label (str): Label of the axis of the values.
        less (str): Name of the network whose cost has been subtracted. Defaults
            to '', which means none.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    unit, _, name = scale(quantity, [row[quantity] for row in rows])
    networks = list(dict.fromkeys(row['network'] for row in rows))

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 3.2 + 0.2 * len(networks))
        axes = figure.subplots()
        for index, network in enumerate(networks):
            points = sorted(
                (row['value'], row[quantity] / unit)
                for row in rows
                if row['network'] == network
            )
            axes.plot(
                *zip(*points),
                label=plain_text(network),
                **_line(index, theme),
            )
        ticks = {row['value']: row['tick'] for row in rows}
        axes.set_xticks(list(ticks), list(ticks.values()))
        if len(ticks) > 6:
            axes.tick_params(axis='x', rotation=90)
        axes.set(xlabel=plain_text(label), ylabel=('added ' if less else '') + name)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(color=theme.faint, linewidth=0.6)
        legend_above(axes, 1)
        if less:
            title = f'added to {plain_text(less)}'
            axes.get_legend().set_title(title, dict(size=8))
            axes.get_legend().set_alignment('left')
            axes.get_legend().get_title().set_color(theme.ink)

    return plot


def trade_off_plot(networks: Dict[str, dict], metric: str) -> Plot:
    """Accuracy of networks against their cost (KCLA, figure 3).

    Args:
        networks (dict[str, dict]): ``flops``, ``memory`` and the ``scores`` of the
            runs of each network, by its name.
        metric (str): Name of the scores.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    largest = max(network['memory'] for network in networks.values())
    unit, _, label = scale('flops', [network['flops'] for network in networks.values()])
    byte, bytes_name, _ = scale('memory', [largest])

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 3.2 + 0.2 * len(networks))
        axes = figure.subplots()
        for index, (name, network) in enumerate(networks.items()):
            scores = np.array(network['scores'])
            flops = network['flops'] / unit
            memory = network['memory']
            line = _line(index, theme)
            # Spread of the runs
            axes.vlines(
                flops, scores.min(), scores.max(), color=line['color'], linewidth=1.2
            )
            axes.scatter(
                flops,
                scores.mean(),
                s=500 * memory / largest,
                color=line['color'],
                alpha=0.35,
                linewidth=0,
            )
            axes.plot(
                flops,
                scores.mean(),
                label=plain_text(f'{name}, {memory / byte:.3g} {bytes_name}'),
                ls='none',
                **{**line, 'linewidth': 0},
            )
        axes.margins(0.15)
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.set(xlabel=label, ylabel=plain_text(metric))
        legend_above(axes, 1)

    return plot


def _line(index: int, theme: Theme) -> dict:
    """Colour and marker of a network; both vary."""
    return dict(
        color=theme.lines[index % len(theme.lines)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=5,
        linewidth=1.3,
    )
