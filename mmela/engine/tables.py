"""Tables for a terminal."""

import io
from typing import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..command_line import printable
from ..pruning import LayerDecision


def decision_table(layers: Sequence[LayerDecision]) -> str:
    """Format a decision.

    Args:
        layers (Sequence[LayerDecision]): Decision on each attention; its
            divergence, the two parts of that, and what it is in uniform
            attention.

    Returns:
        str: A table of 120 columns at most.
    """
    rows = []
    for layer in layers:
        name = layer.name
        if name.endswith('.layer_attn'):
            name = name[: -len('.layer_attn')]
        parts = (layer.shape, layer.own, layer.baseline)
        judged = (layer.normalized, layer.mapped)
        numbers = [
            '' if value is None else f'{value:.{digits}g}'
            for digits, values in ((4, [layer.divergence]), (3, parts), (4, judged))
            for value in values
        ]
        rows.append([name, *numbers, layer.reason])
    columns = ['layer attention', '>KL', '>shape', '>own', '>uniform']
    columns += ['>normalised', '>mapped', 'decision']
    return text_table(columns, rows)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format cells.

    Args:
        columns (Sequence[str]): Headings; a column marked by ``>`` is justified to the
            right.
        rows (Sequence[Sequence[str]]): The cells.

    Returns:
        str: A table of 120 columns at most.
    """
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        justify = 'right' if column.startswith('>') else 'left'
        table.add_column(column.lstrip('>'), justify=justify, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    buffer = io.StringIO()
    # Jupyter and others ask rich for colours in the environment.
    Console(file=buffer, width=120, force_terminal=False, color_system=None).print(
        table
    )
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return '\n'.join(line for line in lines if line)
