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
        layers (Sequence[LayerDecision]): The decision on each attention. The table
            shows its divergence, the two parts, and the value of uniform attention.

    Returns:
        str: A table of at most 120 columns.
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
    """Format a table.

    Args:
        columns (Sequence[str]): Headings; a leading ``>`` aligns a column to the right.
        rows (Sequence[Sequence[str]]): The cells.

    Returns:
        str: A table of at most 120 columns.
    """
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        justify = 'right' if column.startswith('>') else 'left'
        table.add_column(column.lstrip('>'), justify=justify, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    buffer = io.StringIO()
    # Jupyter and others request colours by environment variables
    Console(file=buffer, width=120, force_terminal=False, color_system=None).print(
        table
    )
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return '\n'.join(line for line in lines if line)
