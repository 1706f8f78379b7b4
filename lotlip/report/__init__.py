"""The page that a person reads at the end: what the stages left on disk, as tables, figures and one HTML file."""

from lotlip.report.inputs import ReportInputs, load_inputs
from lotlip.report.page import build_report

__all__ = ["ReportInputs", "build_report", "load_inputs"]
