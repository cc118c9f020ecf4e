import numpy as np

from permask_core.evaluation.fairness import chance_level, difference_interval, equalized_odds_difference

table = np.genfromtxt("predictions.csv", delimiter=",", names=True, dtype=None, encoding="utf8")
given = {"y_true": table["label"], "y_pred": table["prediction"],
         "sensitive_features": {"age": table["age"], "sex": table["sex"]}}  # their intersections
print(difference_interval(equalized_odds_difference, **given))
print(chance_level(equalized_odds_difference, **given))
