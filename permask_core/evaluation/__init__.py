"""Evaluation of trained networks: connectivity, diversity of predictions, fairness, and statistics over seeds."""
