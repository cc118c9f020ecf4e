"""Training: one loop for every experiment, batched training, distillation, output layers with many labels."""

from permask_core.training.loop import Evaluation, FitResult, cross_entropy, evaluate, fit, predict, throughput
from permask_core.training.recipe import Recipe, learning_rate

__all__ = ["Evaluation", "FitResult", "Recipe", "cross_entropy", "evaluate", "fit", "learning_rate", "predict",
           "throughput"]
