import base64
import json
from pathlib import Path
from typing import Dict, List, Optional, Union

import numpy as np
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..hooks import format_decisions

# Distinguishable without colour vision (Okabe and Ito)
BLUE, ORANGE, GREY = '#0072B2', '#D55E00', '#767676'


class Run:
    """What a work directory holds of a run.

    Args:
        work_dir (str | Path): Work directory of an mmengine runner.

    Attributes:
        prunings (list[dict]): Decisions of the pruning hook, from
            ``pruning.json``; empty without one.
        losses (dict[int, float]): Training loss by iteration.
        metrics (dict[int, dict[str, float]]): Validation metrics by epoch, or
            by iteration in an iteration-based run.
        config (str): The dumped config.

    Raises:
        FileNotFoundError: If there is no log of scalars in the directory.
    """

    def __init__(self, work_dir: Union[str, Path]) -> None:
        self.work_dir = Path(work_dir)
        # One folder per start; a resumed run has several. The later one wins.
        logs = sorted(self.work_dir.glob('*/vis_data/scalars.json'))
        if not logs:
            raise FileNotFoundError(
                f'{self.work_dir} is no work directory of a run: there is no '
                '*/vis_data/scalars.json in it')
        self.losses: Dict[int, float] = {}
        self.metrics: Dict[int, Dict[str, float]] = {}
        for log in logs:
            for line in log.read_text().splitlines():
                self._add(json.loads(line))
        path = self.work_dir / 'pruning.json'
        report = json.loads(path.read_text()) if path.exists() else {}
        self.prunings: List[dict] = report.get('prunings', [])
        configs = sorted(self.work_dir.glob('*.py'),
                         key=lambda p: p.stat().st_mtime)
        self.config_name = configs[-1].name if configs else ''
        self.config = configs[-1].read_text() if configs else ''

    def _add(self, scalars: dict) -> None:
        step = scalars.pop('step', None)
        if 'loss' in scalars:
            self.losses[step] = scalars['loss']
        elif not any(key.startswith('layer_attention/') for key in scalars):
            values = {k: v for k, v in scalars.items() if '/' in k}
            if values:
                self.metrics[step] = values

    @property
    def checkpoint(self) -> Optional[Path]:
        """Path | None: The last checkpoint that is still there."""
        pointer = self.work_dir / 'last_checkpoint'
        if not pointer.exists():
            return None
        path = Path(pointer.read_text().strip())
        # The directory may have been moved.
        found = [p for p in (path, self.work_dir / path.name) if p.exists()]
        return found[0] if found else None

    @property
    def best_checkpoint(self) -> Optional[Path]:
        """Path | None: The best checkpoint, where one was kept."""
        return next(iter(sorted(self.work_dir.glob('best_*.pth'))), None)


def _png(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, facecolor='white')
    return path


def _short(name: str) -> str:
    name = name[:-len('.layer_attn')] if name.endswith('.layer_attn') else name
    return name.replace('backbone.', '')


def plot_metrics(run: Run, path: Path) -> Path:
    """Draw the loss and the validation metrics of a run."""
    figure = Figure(figsize=(7, 5.5), layout='constrained')
    top, bottom = figure.subplots(2, 1)
    top.plot(list(run.losses), list(run.losses.values()), color=BLUE, lw=1)
    top.set(xlabel='iteration', ylabel='training loss', yscale='log')
    for pruning in run.prunings:
        top.axvline(pruning['iteration'], color=ORANGE, ls='--', lw=1)
    if run.prunings:
        top.plot([], [], color=ORANGE, ls='--', lw=1, label='pruning')
        top.legend()
    names = [
        name for name in next(reversed(run.metrics.values()), {})
        if name.rsplit('_', 1)[-1] not in ('s', 'm', 'l')
    ]
    for name, marker in zip(names, 'osD^vx+*'):
        points = [(s, m[name]) for s, m in run.metrics.items() if name in m]
        bottom.plot(*zip(*points), marker=marker, label=name)
    if names:
        bottom.legend(fontsize='small')
    bottom.set(xlabel='epoch', ylabel='validation metric')
    return _png(figure, path)


def plot_pruning(pruning: dict, path: Path) -> Path:
    """Draw the KL divergences of a decision and how they were mapped."""
    layers = [x for x in pruning['layers'] if x['kl'] is not None]
    figure = Figure(
        figsize=(7, 1.6 + 0.24 * len(layers) + 2.4), layout='constrained')
    top, bottom = figure.subplots(
        2, 1, height_ratios=[0.24 * len(layers) + 1, 2.4])
    skip = np.array([x['skip'] for x in layers], dtype=bool)
    position = np.arange(len(layers))
    kl = np.array([x['kl'] for x in layers])
    top.barh(position[~skip], kl[~skip], color=BLUE, label='kept')
    top.barh(
        position[skip], kl[skip], color=ORANGE, hatch='///', label='pruned')
    top.set_yticks(position, [_short(x['name']) for x in layers], fontsize=8)
    top.invert_yaxis()
    top.set_xlabel('KL divergence from the attention before (nats)')
    top.legend()
    for layer in layers:
        if layer['mapped'] is not None:
            bottom.plot(
                layer['normalized'],
                layer['mapped'],
                marker='X' if layer['skip'] else 'o',
                color=ORANGE if layer['skip'] else BLUE)
    if layers and layers[0]['threshold'] is not None:
        bottom.axhline(layers[0]['threshold'], color=GREY, ls='--')
        bottom.annotate(
            'threshold', (1, layers[0]['threshold']),
            xycoords=('axes fraction', 'data'),
            ha='right',
            va='bottom',
            color=GREY)
    bottom.set(
        xlabel='normalised KL divergence', ylabel='mapped', xlim=(-0.05, 1.05))
    return _png(figure, path)


TEMPLATE = Environment(autoescape=True).from_string('''<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.config_name }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem;
  margin: 0 auto; padding: 1rem; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8886;
  text-align: left; white-space: nowrap; }
td.number { text-align: right; }
tr.pruned td { font-weight: bold; }
img { max-width: 100%; height: auto; background: white; }
pre { overflow-x: auto; font-size: .8rem; }
</style>
<h1>{{ run.config_name or run.work_dir.name }}</h1>
<p>Checkpoint: {{ run.checkpoint.name if run.checkpoint else 'none' }}
{%- if run.best_checkpoint %}; best: {{ run.best_checkpoint.name }}{% endif %}.
</p>
<h2>Metrics</h2>
{% if run.metrics %}
<div class="box"><table>
<tr><th>epoch</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for step, values in run.metrics.items() %}<tr><td>{{ step }}</td>
{% for name in names %}<td class="number">
{{- '%.3f'|format(values[name]) if name in values else '' }}</td>
{% endfor %}</tr>{% endfor %}
</table></div>
{% else %}<p>There are no validation metrics.</p>{% endif %}
<img alt="Training loss and validation metrics" src="{{ metrics }}">
<h2>Pruning</h2>
{% if not run.prunings %}<p>Nothing was pruned in this run.</p>{% endif %}
{% for pruning, picture in prunings %}
<h3>After {{ pruning.unit }} {{ pruning.window[1] }}:
{{ pruning.layers|length }} → {{ pruning.active|length }} active
attentions</h3>
<img alt="KL divergences, kept and pruned" src="{{ picture }}">
<div class="box"><table>
<tr><th>layer attention</th><th>KL</th><th>normalised</th><th>mapped</th>
<th>decision</th></tr>
{% for layer in pruning.layers %}
<tr{% if layer.skip %} class="pruned"{% endif %}><td>{{ layer.name }}</td>
{% for key in ('kl', 'normalized', 'mapped') %}<td class="number">
{{- '' if layer[key] is none else '%.4g'|format(layer[key]) }}</td>
{% endfor %}<td>{{ layer.reason }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>Config</h2>
<details><summary>{{ run.config_name }}</summary>
<pre>{{ run.config }}</pre></details>
</html>
''')


def make_report(work_dir: Union[str, Path]) -> Path:
    """Write ``report.html``, which needs no other file, and its pictures.

    Args:
        work_dir (str | Path): Work directory of an mmengine runner, with or
            without the pruning hook.

    Returns:
        Path: ``report.html`` in the work directory. The pictures are in
        ``pictures/`` beside it too.

    Raises:
        FileNotFoundError: If there is no log of scalars in the directory.
    """
    run = Run(work_dir)
    pictures = run.work_dir / 'pictures'
    pictures.mkdir(exist_ok=True)

    def inline(path: Path) -> str:
        data = base64.b64encode(path.read_bytes()).decode()
        return f'data:image/png;base64,{data}'

    metrics = inline(plot_metrics(run, pictures / 'metrics.png'))
    prunings = []
    for pruning in run.prunings:
        name = f'pruning_{pruning["unit"]}_{pruning["window"][1]}.png'
        prunings.append(
            (pruning, inline(plot_pruning(pruning, pictures / name))))
    names = list(dict.fromkeys(k for m in run.metrics.values() for k in m))
    path = run.work_dir / 'report.html'
    path.write_text(
        TEMPLATE.render(
            run=run, names=names, metrics=metrics, prunings=prunings),
        encoding='utf-8')
    return path


def summarize(work_dir: Union[str, Path]) -> str:
    """Summarize a run for a terminal.

    Args:
        work_dir (str | Path): Work directory of an mmengine runner.

    Returns:
        str: The pruning decisions with their KL tables, the metrics, and where
        checkpoint, report and pictures are.

    Raises:
        FileNotFoundError: If there is no log of scalars in the directory.
    """
    run = Run(work_dir)
    lines = []
    for pruning in run.prunings:
        pruned = ', '.join(map(_short, pruning['pruned'])) or 'nothing'
        lines += [
            '', f'After {pruning["unit"]} {pruning["window"][1]}: '
            f'{len(pruning["layers"])} -> {len(pruning["active"])} active '
            f'attentions; pruned: {pruned}',
            format_decisions(pruning['layers'])
        ]
    lines.append('')
    for step, metrics in run.metrics.items():
        values = '  '.join(f'{k} {v:.3f}' for k, v in metrics.items()
                           if k.rsplit('_', 1)[-1] not in ('s', 'm', 'l'))
        lines.append(f'Epoch {step}: {values}')
    lines += [
        f'Checkpoint: {run.checkpoint}',
        f'Best checkpoint: {run.best_checkpoint}',
        f'Decisions: {run.work_dir / "pruning.json"}',
        f'Report: {run.work_dir / "report.html"}',
        f'Pictures: {run.work_dir / "pictures"}'
    ]
    return '\n'.join(lines)
