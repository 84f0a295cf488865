"""Measuring models: perplexity of a text, divergence from another model, lm-eval's tasks."""

from quamba.evaluation.divergence import Divergence, compare
from quamba.evaluation.harness import TaskResult, run_tasks
from quamba.evaluation.report import results_dict, results_table
from quamba.evaluation.text import TextScore, encode_text, score_text

__all__ = [
    "Divergence",
    "TaskResult",
    "TextScore",
    "compare",
    "encode_text",
    "results_dict",
    "results_table",
    "run_tasks",
    "score_text",
]
