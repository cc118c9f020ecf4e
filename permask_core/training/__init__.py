"""Training: one loop for every experiment, many networks as one, students of teachers, output layers of many labels."""

from permask_core.training.loop import Evaluation, Fit, Recipe, evaluate, fit, learning_rate, predict, throughput

__all__ = ["Evaluation", "Fit", "Recipe", "evaluate", "fit", "learning_rate", "predict", "throughput"]
