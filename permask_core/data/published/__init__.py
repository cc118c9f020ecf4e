"""Figures that others published, as data: never measured here, and labelled as published wherever they are shown."""

import csv
from importlib.resources import files


def published_permuted_masks():
    """Test accuracies of the permuted-mask paper, taken from its authors' published figures.

    Returns
    -------
    list of dict
        ``setting`` (network/dataset), ``width`` (a factor), ``sparsity`` (a fraction), ``method``, ``rewind`` (epoch;
        None for dense, which stands beside every sparsity) and ``accuracy`` in [0, 1]. The figures give no deviations.

    References
    ----------
    Adnan et al., "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks using Weight Symmetry",
    ICML 2025, arXiv 2505.05143.
    """
    with files(__package__).joinpath("permuted_masks.csv").open() as file:
        return [{"setting": row["setting"], "width": int(row["width"]), "sparsity": int(row["sparsity"]) / 100,
                 "method": row["method"], "rewind": int(row["rewind_k"]) if row["rewind_k"] else None,
                 "accuracy": float(row["test_acc"]) / 100} for row in csv.DictReader(file)]
