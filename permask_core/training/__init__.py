"""Training: one loop for every experiment, many networks as one, students of teachers, output layers of many labels."""

from permask_core.training.loop import Evaluation, FitResult, Recipe, evaluate, fit, learning_rate, predict, throughput

__all__ = ["Evaluation", "FitResult", "Recipe", "evaluate", "fit", "learning_rate", "predict", "throughput"]
