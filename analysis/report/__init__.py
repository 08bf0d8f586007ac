"""One self-contained HTML page about a run, or about several that are compared.

The page loads nothing: its style is in it, its figures are SVG in it, and it needs no script.
"""

from analysis.report.comparison import write_comparison_report
from analysis.report.headline import run_headline
from analysis.report.run import shown_samples, write_run_report

__all__ = ["run_headline", "shown_samples", "write_comparison_report", "write_run_report"]
