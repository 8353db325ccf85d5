"""One self-contained HTML page about one or several runs: curves, phases, credit of tokens."""

from megatron_rlsd.observability.report.page import Report, report, report_page
from megatron_rlsd.observability.report.run_data import ReportLimits, run_data, short_names

__all__ = ["Report", "ReportLimits", "report", "report_page", "run_data", "short_names"]
