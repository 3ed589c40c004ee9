"""One HTML file that compares Trainer runs."""

from hf_stablespam.monitor.report.build import write_report

__all__ = ["write_report"]
