"""Measuring models: perplexity of a text, divergence from another model, lm-eval's tasks, speed."""

from quamba.evaluation.divergence import Divergence, compare
from quamba.evaluation.harness import TaskResult, run_tasks
from quamba.evaluation.report import ModelResults, results_dict, results_table
from quamba.evaluation.run import Loaders, evaluate
from quamba.evaluation.speed import Speed, measure_speed
from quamba.evaluation.text import TextScore, encode_text, score_text
from quamba.evaluation.uncertainty import Difference, Metric, difference

__all__ = [
    "Difference",
    "Divergence",
    "Loaders",
    "Metric",
    "ModelResults",
    "Speed",
    "TaskResult",
    "TextScore",
    "compare",
    "difference",
    "encode_text",
    "evaluate",
    "measure_speed",
    "results_dict",
    "results_table",
    "run_tasks",
    "score_text",
]
