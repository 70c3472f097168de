"""What happened in a run: summary, pictures and report."""
from .report import make_report, summarize

__all__ = ['make_report', 'summarize']
