import numpy as np

from permask_core.evaluation import fairness

table = np.genfromtxt("predictions.csv", delimiter=",", names=True,
                      dtype=None, encoding="utf8")
given = {"y_true": table["label"], "y_pred": table["prediction"],
         "sensitive_features": {name: table[name] for name in ("age", "sex")}}
metric = fairness.equalized_odds_difference
print(fairness.difference_interval(metric, **given))
