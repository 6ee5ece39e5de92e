"""How good a model is, with an adapter or without: loss, labels, and what it writes; adapters side by side."""

from lora_kit._callable import make_callable
from lora_kit.evaluate.measuring import Evaluation, measure
from lora_kit.evaluate.metrics import METRICS, Metric
from lora_kit.evaluate.report import Case, EvalReport, Result
from lora_kit.evaluate.run import evaluate

__all__ = ["METRICS", "Case", "EvalReport", "Evaluation", "Metric", "Result", "evaluate", "measure"]

make_callable(__name__)
