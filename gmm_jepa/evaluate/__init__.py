"""Evaluation of a run on held-out speech, and its report."""

from gmm_jepa.evaluate.evaluation import Evaluation, evaluate
from gmm_jepa.evaluate.report import summary_rows, write_report

__all__ = ["Evaluation", "evaluate", "summary_rows", "write_report"]
