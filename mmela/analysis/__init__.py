"""Report on a run, and measure what its layer attentions do."""

from .attention import measure_attention
from .before_after import measure_before_after
from .report import make_report, summarize

__all__ = ['make_report', 'measure_attention', 'measure_before_after', 'summarize']
