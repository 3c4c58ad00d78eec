"""The HTML report of a run directory, and the terminal's screens.

    from orchestrator.report.page import write_report            # draws with matplotlib, so it is imported where it is used
    from orchestrator.report import SweepView, final_screen, plan_view

Renders what `run.reader` gives and reads no file of a run itself; imports neither Ray nor torch.
"""

from orchestrator.report.plan_screens import plan_view
from orchestrator.report.screens import final_screen
from orchestrator.report.terminal import LogView, SweepView, open_view

__all__ = ["LogView", "SweepView", "final_screen", "open_view", "plan_view"]
