"""The page of a report. It may load nothing: see its security policy."""

from jinja2 import Environment, StrictUndefined

from .before_after_plots import stands_for
from .work_dir import short_name


def as_call(cfg: dict) -> str:
    """Write a config as a call, ``EBQM(gamma=0.5, mu=0.2)``."""
    arguments = ', '.join(
        f'{k}={v!r}' for k, v in cfg.items() if k != 'type' and v is not None
    )
    return f'{cfg.get("type")}({arguments})'


_SOURCE = """\
{% macro picture(pair, alt) -%}
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ pair[1] }}">
<img alt="{{ alt }}" src="{{ pair[0] }}"></picture>
{%- endmacro -%}
{% macro cell(value, digits) -%}
<td class="number">{{ '' if value is none else ('%.' ~ digits)|format(value) }}
</td>
{%- endmacro -%}
{% macro bars(side, entry) -%}
<div class="bars"><div class="soft">{{ side }}</div>
{% for label, score in entry[side] %}
<div class="bar"><i style="width: {{ '%.0f'|format(100 * score) }}%"></i>
<span>{{ '✓ ' if label in entry.truth }}{{ classes[label] }}</span>
<span>{{ '%.0f'|format(100 * score) }}</span></div>
{% endfor %}</div>
{%- endmacro -%}
{% macro change(before, after) -%}
{% if before and after %} ({{ '%+.1f'|format(100 * (after / before - 1)) }} %)
{%- endif %}
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --paper: #ffffff; --ink: #24292f; --soft: #57606a; --line: #d8dee4;
  --mark: #fdf1e7; --bar: #cfe3f1; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d;
  --ink: #d6dde4; --soft: #9aa5b1; --line: #39424c; --mark: #33281a;
  --bar: #1f4460; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 62rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { margin-top: 2.5rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr;
  gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; }
.box { overflow-x: auto; border: 1px solid var(--line);
  border-radius: 6px; margin: 1rem 0; max-width: max-content; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: left; white-space: nowrap;
  border-top: 1px solid var(--line); }
tr:first-child > th { border-top: 0; }
.number { text-align: right; }
tr.pruned { background: var(--mark); } tr.pruned td { font-weight: 600; }
.pictures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; max-width: 34rem; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
img { width: 100%; height: auto; display: block; }
.row { display: grid; gap: .5rem; margin: 1rem 0;
  grid-template-columns: repeat({{ 1 + sides|length }}, 1fr); }
.cards { display: grid; gap: 1.5rem 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.card { display: grid; gap: .5rem; font-size: .82rem;
  grid-template-columns: 6rem repeat(2, minmax(0, 1fr)); }
.card img { image-rendering: pixelated; }
.bar { position: relative; display: flex; justify-content: space-between;
  gap: .3rem; padding: .1rem .3rem; margin: .15rem 0; }
.bar span { position: relative; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; }
.bar span:last-child { flex: none; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bar);
  border-radius: 3px; }
.truth, .right, .wrong { border: 3px solid; padding: 0 .3rem;
  white-space: nowrap; }
.truth { border-color: {{ colors.truth }}; }
.right { border-color: {{ colors.right }}; }
.wrong { border-color: {{ colors.wrong }}; }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr 1fr; }
  .row > :first-child { grid-column: 1 / -1; } }
pre { overflow-x: auto; font-size: .8rem; overflow-wrap: normal;
  border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
summary { cursor: pointer; }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; }
  table { font-size: .82rem; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl>
<dt>Started</dt><dd>{{ run.started }}
{%- if run.starts|length > 1 %}, resumed {{ run.starts|length - 1 }} time
{{- 's' if run.starts|length > 2 }}{% endif %}</dd>
<dt>Trained</dt><dd>
{%- if run.done is none %}not at all: there is no training log
{%- else %}{{ run.done }}{{ ' of %d'|format(run.planned) if run.planned }}
{{ run.unit }}s{% endif %}</dd>
<dt>Config</dt><dd>{{ run.config_name or 'none' }}</dd>
<dt>Checkpoint</dt><dd>
{{- run.checkpoint.name if run.checkpoint else 'none' }}</dd>
{% if run.best_checkpoint %}<dt>Best checkpoint</dt><dd>
{{- run.best_checkpoint.name }}</dd>{% endif %}
{% if run.decisions %}<dt>Attentions</dt><dd>
{{- run.decisions[-1].active|length }} of {{ run.total_attentions }}
active</dd>{% endif %}
{% if parameters %}<dt>Parameters</dt><dd>
{{- '{:,}'.format(parameters.total - parameters.pruned) }} in use</dd>
{% endif %}
</dl>
{% for note in run.notes %}<p><strong>Note:</strong> {{ note }}</p>
{% endfor %}

<h2>Metrics</h2>
{% if run.metrics %}
<div class="box" tabindex="0" role="region" aria-label="Metrics"><table>
<tr><th>metric</th><th class="number">last</th><th class="number">best</th>
<th>best at</th></tr>
{% for name in run.metric_names %}{% set best = run.best(name) %}<tr>
<td>{{ name }}</td>{{ cell(last.get(name), '4g') }}
{{ cell(best[1] if best else none, '4g') }}
<td>{% if best %}{{ run.unit }} {{ best[0] }}{% endif %}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Last: {{ run.unit }} {{ last_step }}.
{% if -1 in last.values() %} -1: there is nothing to measure, as with objects
of a size that the data do not have.{% endif %}</p>
{% else %}<p>There are no validation metrics.</p>{% endif %}
<div class="pictures">
{% if metrics_picture %}<figure>
{{ picture(metrics_picture, 'Validation metrics over ' ~ run.unit ~ 's') }}
<figcaption>Validation metrics.</figcaption></figure>{% endif %}
{% if loss_picture %}<figure>
{{ picture(loss_picture, 'Training loss over iterations') }}
<figcaption>Training loss, as smoothed in the log.</figcaption></figure>
{% endif %}
</div>
{% if run.metrics|length > 1 %}
<details><summary>Metrics of every {{ run.unit }}</summary>
<div class="box" tabindex="0" role="region" aria-label="All metrics"><table>
<tr><th class="number">{{ run.unit }}</th>
{% for name in run.metric_names %}<th class="number">{{ name }}</th>
{% endfor %}</tr>
{% for step, values in run.metrics.items() %}<tr>
<td class="number">{{ step }}</td>
{% for name in run.metric_names %}{{ cell(values.get(name), '4g') }}
{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endif %}

{% if comparison %}
{% set classes = comparison.classes %}
{% set both = sides|length > 1 %}
{% set detects = comparison.kind == 'detections' %}
<h2>{{ 'Detections' if detects else 'Classes' }}
{{- ', before and after' if both }}</h2>
<p>{{ 'Two networks' if both else 'The last network' }} on
{{ comparison.images }} of the {{ comparison.total }} validation images
{{- ', evenly spaced' if comparison.images < comparison.total }}.
{% for side, about in sides.items() %}
{{ side|capitalize }}: {{ about.checkpoint }} ({{ about|stands_for }} active).
{% endfor %}
{% if both %}What differs comes of the pruning and of the training in
between.{% endif %}</p>
{% if comparison.note %}<p><strong>Note:</strong> {{ comparison.note }}</p>
{% endif %}
{% if detects %}
<p class="soft"><span class="truth">annotated</span>
<span class="right">detected, and there (IoU 0.5 or more)</span>
<span class="wrong">detected, but not there</span> Boxes with a score of
{{ threshold }} or more, and at least as many as there are objects; scores are in
per cent. The images are those with objects of most
of COCO's sizes, and of these the ones with nearest to five.</p>
{% for entry in comparison.shown %}
<div class="row">
{% for side, source in entry.sources.items() %}<figure>
<img alt="{{ entry.image }}, {{ side }}" src="{{ source }}">
<figcaption>
{%- if side == 'truth' %}{{ entry.image }}: {{ entry.objects }} object
{{- 's' if entry.objects != 1 }}
{%- else %}{{ side }}: {{ entry.counts[side][0] }} right,
{{ entry.counts[side][1] }} wrong{% endif %}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
{% if curves %}<figure>
{{ picture(curves, 'Precision over recall, before and after') }}
<figcaption>Precision over recall at an IoU of 0.5
{%- if per_class|length > most + 1 %}; of the classes with most objects{% endif %}.
</figcaption></figure>{% endif %}
{% else %}
<p class="soft">The {{ comparison.shown[0][sides|list|last]|length }} classes of
the highest score, in per cent; ✓ the right one.</p>
<div class="cards">
{% for entry in comparison.shown %}<div class="card"><figure>
<img alt="{{ entry.image }}" src="{{ entry.source }}">
<figcaption>{{ entry.truth|map('of', classes)|join(', ') }}</figcaption></figure>
{% for side in sides %}{{ bars(side, entry) }}{% endfor %}</div>
{% endfor %}
</div>
{% endif %}
{% if per_class %}
{% set digits = '3f' if detects else '1f' %}
<details{{ ' open' if per_class|length <= 12 }}>
<summary>{{ 'AP' if detects else 'Accuracy (%)' }} of every class</summary>
<div class="box" tabindex="0" role="region" aria-label="Classes"><table>
<tr><th>class</th>
<th class="number">{{ 'objects' if detects else 'images' }}</th>
{% for side in sides %}<th class="number">{{ side }}</th>{% endfor %}
{% if both %}<th class="number">change</th>{% endif %}</tr>
{% for name, count, values in per_class %}<tr><td>{{ name }}</td>
<td class="number">{{ count }}</td>
{% for value in values %}{{ cell(value, digits) }}{% endfor %}
{% if both %}<td class="number">
{%- if none not in values %}{{ ('%+.' ~ digits)|format(values[1] - values[0]) }}
{%- endif %}</td>{% endif %}</tr>
{% endfor %}
</table></div></details>
{% if detects %}<p class="soft">AP over IoU 0.5 to 0.95, by pycocotools.</p>
{% endif %}
{% endif %}
{% elif run.checkpoint %}
<h2>Detections or classes</h2>
<p>They are not measured: tools/analysis/report.py does that, where the data
are.</p>
{% endif %}

<h2>Pruning</h2>
{% if run.hook is none %}
<p>Nothing was pruned in this run: there is no pruning.json.</p>
{% else %}
<p>Windows:
{% for first, last in run.hook.windows %}{{ first }} to {{ last }}
{{- ', ' if not loop.last }}{% else %}none{% endfor %}
 ({{ 'epochs' if run.hook.by_epoch else 'iterations' }}). Policy at the end:
<code>{{ run.hook.policy|call }}</code>.</p>
{% if not run.decisions %}<p>No window has ended: nothing is decided
yet.</p>{% endif %}
{% endif %}
{% if timeline_picture %}<figure>
{{ picture(timeline_picture, 'Active attentions over time') }}
<figcaption>Active attentions; windows of measurement are shaded.</figcaption>
</figure>{% endif %}
{% for decision, bars, curve, before, after in decisions %}
<h3>After {{ decision.unit }} {{ decision.window[1] }}:
{{ decision.layers|length }} → {{ decision.active|length }} active
attentions</h3>
<p>Decided after iteration {{ decision.iteration }} by
<code>{{ decision.policy|call }}</code>. Reduction: {{ decision.reduction }};
eps {{ decision.eps }}; a pruned attention is
{{ 'skipped, but its key and value stay' if decision.keep_value
   else 'removed whole' }}.
{% if decision.warning %}<strong>{{ decision.warning }}.</strong> {% endif %}
{% set compared = decision.layers|rejectattr('divergence', 'none')|list %}
{% if compared and not compared|rejectattr('shape', 'equalto', 0)|list %}
<strong>Each attention that was compared is the second of its stage: its
divergence tells how much it looks at its own block, and not whether it repeats
another.</strong> {% endif %}
{% if before.seconds and after.seconds %}Median step time:
{{ '%.4g'|format(before.seconds) }} s before ({{ before.count }} logged
values), {{ '%.4g'|format(after.seconds) }} s after ({{ after.count }} logged
values){{ change(before.seconds, after.seconds) if few <= before.count and
few <= after.count else ', too few to compare' }}.
{% else %}There is no step time logged both before and after.{% endif %}</p>
<div class="pictures"><figure>
{{ picture(bars, 'KL divergence of each attention, kept or pruned') }}
<figcaption>KL divergence between the weights of adjacent attentions, the sum
of two parts: the shape, which is small where a layer retrieves what the one
before did, and how much it looks at its own token. Uniform attention has the
divergence of the tick, by its position alone.</figcaption></figure>
{% if curve %}<figure>
{{ picture(curve, 'Mapped against normalised KL divergence') }}
<figcaption>What the policy makes of it: below the threshold is redundant.
Layers that it does not map, such as those above the quantile, are not
shown.</figcaption></figure>{% endif %}</div>
<div class="box" tabindex="0" role="region" aria-label="Decisions"><table>
<tr><th>layer attention</th><th class="number">KL</th>
<th class="number">shape</th><th class="number">own</th>
<th class="number">uniform</th>
<th class="number">normalised</th><th class="number">mapped</th>
<th>decision</th></tr>
{% for layer in decision.layers %}
<tr{% if layer.pruned %} class="pruned"{% endif %}>
<td>{{ '✕ ' if layer.pruned }}{{ layer.name|short }}</td>
{{ cell(layer.divergence, '4g') }}{{ cell(layer.shape, '3g') }}
{{ cell(layer.own, '3g') }}{{ cell(layer.baseline, '3g') }}
{{ cell(layer.normalized, '4g') }}
{{ cell(layer.mapped, '4g') }}<td>{{ layer.reason }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
{% if run.decisions %}<p class="soft">pruning.json holds all numbers in full
precision.</p>{% endif %}
{% if maps %}
<h2>Attention maps, before and after</h2>
<p>{{ maps[0][0][1].caption }}</p>
{% for stage in maps %}
<h3>{{ stage[0][1].title }}</h3>
<div class="pictures">
{% for name, shown, pair, active, count in stage %}<figure>
{{ picture(pair, shown.title ~ ', ' ~ name) }}
<figcaption>{{ name }}: {{ active }} of {{ count }} active</figcaption>
</figure>
{% endfor %}
</div>
{% endfor %}
{% endif %}
{% for name, result, pictures in analyses %}
<h2>Layer attention of {{ name }}</h2>
<p>Measured by mmela layer-attention on {{ result.images }} images
({{ result.data }}) with the checkpoint {{ result.checkpoint }}.</p>
<div class="pictures">
{% for title, caption, pair in pictures %}<figure>
{{ picture(pair, title) }}
<figcaption><strong>{{ title }}.</strong> {{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% if result.left_out %}<details><summary>What is left out and why</summary>
<ul>{% for note in result.left_out %}<li>{{ note }}</li>{% endfor %}</ul>
</details>{% endif %}
{% endfor %}

<h2>Cost</h2>
{% if steps %}
<div class="box" tabindex="0" role="region" aria-label="Step time"><table>
<tr><th>iterations</th>{% if run.decisions %}
<th class="number">active attentions</th>{% endif %}
<th class="number">step time (s)</th><th class="number">of it data (s)</th>
<th class="number">logged values</th></tr>
{% for step in steps %}<tr><td>{{ step.first }} to {{ step.last }}</td>
{% if run.decisions %}<td class="number">{{ step.active }}</td>{% endif %}
{{ cell(step.seconds, '4g') }}{{ cell(step.data_seconds, '4g') }}
<td class="number">{{ step.count }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Medians of the values in the log, each of which is a mean over
the last iterations (mmengine: 10 unless set otherwise). Measuring in a window
is included, and so is whatever else the machine was doing.</p>
{% else %}<p>There is no step time in the log.</p>{% endif %}
{% if parameters %}
<div class="box" tabindex="0" role="region" aria-label="Parameters"><table>
<tr><th>parameters</th><th class="number">before pruning</th>
<th class="number">after</th></tr>
<tr><td>layer attentions</td>
<td class="number">{{ '{:,}'.format(parameters.attention) }}</td>
<td class="number">{{
  '{:,}'.format(parameters.attention - parameters.pruned) }}</td></tr>
<tr><td>whole network</td>
<td class="number">{{ '{:,}'.format(parameters.total) }}</td>
<td class="number">{{
  '{:,}'.format(parameters.total - parameters.pruned) }}</td></tr>
</table></div>
<p class="soft">Counted in the checkpoint, without the statistics of
normalisation layers. {{ parameters.active }} of {{ parameters.attentions }}
attentions are active in it.
{%- if parameters.value_only %} {{ parameters.value_only }} retrieve nothing
but keep their key and value; their parameters count as in use.{% endif %}</p>
{% endif %}
{% if complexity %}
<div class="box" tabindex="0" role="region" aria-label="Backbone"><table>
<tr><th>backbone</th><th class="number">active attentions</th>
<th class="number">GFLOPs</th><th class="number">parameters</th></tr>
{% for item in complexity %}<tr><td>{{ item.label }}</td>
<td class="number">{{ item.active }}</td>
<td class="number">{{ '%.4g'|format(item.flops / 1e9) }}
{{- change(complexity[0].flops, item.flops) if not loop.first }}</td>
<td class="number">{{ '{:,}'.format(item.parameters) }}
{{- change(complexity[0].parameters, item.parameters) if not loop.first }}</td>
</tr>
{% endfor %}
</table></div>
<p class="soft">Of one image of {{ size[0] }}×{{ size[1] }} pixels, the size of
the test pipeline. A multiplication with its addition counts once; elementwise
operations, the weighted sum of the values among them, are not counted.</p>
{% else %}<p>FLOPs of the backbone are not counted: {{ no_complexity }}.</p>
{% endif %}

<h2>Config</h2>
{% if run.config %}
<details><summary>{{ run.config_name }}</summary>
<pre tabindex="0">{{ run.config }}</pre></details>
{% else %}<p>There is no dumped config in the directory.</p>{% endif %}
</body>
</html>
"""

_ENVIRONMENT = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters['short'] = short_name
_ENVIRONMENT.filters['call'] = as_call
_ENVIRONMENT.filters['stands_for'] = stands_for
_ENVIRONMENT.filters['of'] = lambda label, names: names[label]
TEMPLATE = _ENVIRONMENT.from_string(_SOURCE)
