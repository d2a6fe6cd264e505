"""The report: what was measured, as files and as one page. Imports no torch."""

from casemate.reporting.inputs import ReportInputs
from casemate.reporting.leaderboard import Entry, Leaderboard, build, champion
from casemate.reporting.page import write_overview, write_report

__all__ = ["Entry", "Leaderboard", "ReportInputs", "build", "champion", "write_overview", "write_report"]
