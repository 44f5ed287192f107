"""Pages to look at: one self-contained HTML file for a run, and one for several runs beside each other."""

from vardrop.report.pages import write, write_comparison

__all__ = ["write", "write_comparison"]
