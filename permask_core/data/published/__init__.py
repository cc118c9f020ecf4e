"""Published results of other authors as data; they are not measured here, and are always labelled as published."""

import csv
from importlib.resources import files


def published_permuted_masks():
    """Test accuracies of the permuted-mask paper, taken from its authors' published figures.

    Returns
    -------
    list of dict
        ``setting`` (network/dataset), ``width`` (a factor), ``sparsity`` (a fraction), ``method``, ``rewind`` (epoch;
        None for dense, which is listed with every sparsity) and ``accuracy`` in [0, 1]. The figures have no deviations.

    References
    ----------
    Adnan et al., "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks using Weight Symmetry",
    ICML 2025, arXiv 2505.05143.
    """
    return [{"setting": row["setting"], "width": int(row["width"]), "sparsity": int(row["sparsity"]) / 100,
             "method": row["method"], "rewind": int(row["rewind_k"]) if row["rewind_k"] else None,
             "accuracy": float(row["test_acc"]) / 100} for row in _rows("permuted_masks")]


def published_affected_classes():
    """Numbers of classes that distillation affects, counted by Mohammadshahi and Ioannou over five initialisations.

    Returns
    -------
    list of dict
        ``setting`` (teacher → student/dataset), ``temperature``, ``student_classes`` (#SC: distilled student against
        the student without a teacher), ``teacher_classes`` (#TC: distilled student against the teacher), and the test
        accuracies ``teacher_accuracy`` and ``student_accuracy`` (without a teacher) in [0, 1].

    References
    ----------
    Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts Fairness and Bias", TMLR
    2025, arXiv 2410.08407.
    """
    return [{"setting": row["setting"], "temperature": int(row["temperature"]),
             **{name: int(row[name]) for name in ("student_classes", "teacher_classes")},
             **{name: float(row[name]) / 100 for name in ("teacher_accuracy", "student_accuracy")}}
            for row in _rows("affected_classes")]


def published_fairness():
    """Group and individual fairness of teachers and students, from the same source.

    Returns
    -------
    list of dict
        ``dataset``, ``attribute`` ("" if there is none), ``measure`` ("DPD", "EOD", "individual" or "accuracy"),
        ``role`` ("teacher", "student" or "distilled"), ``temperature`` (None if not distilled),
        ``value`` (a fraction; for "individual" the published number, whose unit the source does not state), ``sd`` (its
        standard deviation over five initialisations, which the source's Table 2 gives for CelebA with the attribute
        Young; elsewhere None), and ``read_from``: "table" or "figure", which is less exact.

    References
    ----------
    As for :func:`published_affected_classes`.
    """
    return [row | {"temperature": int(row["temperature"]) if row["temperature"] else None,
                   "value": float(row["value"]) / (1 if row["measure"] == "individual" else 100),
                   "sd": float(row["sd"]) / 100 if row["sd"] else None}
            for row in _rows("fairness")]


def published_dynamic_sparse_training():
    """Test accuracies of RigL, and of SRigL without and with ablation; only some of the published ones are available.

    Returns
    -------
    list of dict
        ``setting`` (network/dataset), ``sparsity`` (a fraction; 0 for dense), ``method`` ("dense", "rigl", "srigl" or
        "srigl+ablation") and ``accuracy`` in [0, 1], without deviations.

    References
    ----------
    Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, arXiv 2305.02299.
    """
    return [{"setting": row["setting"], "sparsity": int(row["sparsity"]) / 100, "method": row["method"],
             "accuracy": float(row["test_acc"]) / 100} for row in _rows("dynamic_sparse_training")]


def published_functional_diversity():
    """Diversity of the predictions of five networks of each method, in the permuted-mask paper.

    Returns
    -------
    list of dict
        ``setting`` (network/dataset), ``width`` (a factor), ``sparsity`` (a fraction; for dense networks that of
        the table), ``method`` ("pruned" is its IMP), test ``accuracy`` and ``accuracy_spread`` (the number after ± in
        the source), and the measures of :class:`permask_core.evaluation.diversity.Diversity`: ``ensemble``,
        ``disagreement``, ``kl`` and ``js``, None for dense. Accuracies are in [0, 1], divergences in nats.

    References
    ----------
    As for :func:`published_permuted_masks`.
    """
    shares, others = ("accuracy", "accuracy_spread", "ensemble"), ("disagreement", "kl", "js")
    return [{"setting": row["setting"], "width": int(row["width"]), "sparsity": int(row["sparsity"]) / 100,
             "method": row["method"],
             **{name: float(row[name]) / 100 if row[name] else None for name in shares},
             **{name: float(row[name]) if row[name] else None for name in others}}
            for row in _rows("functional_diversity")]


def published_losses_halfway():
    """Test losses halfway between two dense networks whose units were matched, in the permuted-mask paper.

    Returns
    -------
    list of dict
        ``setting`` (network/dataset), ``width`` (a factor) and ``loss`` in nats, read off a figure.

    References
    ----------
    As for :func:`published_permuted_masks`.
    """
    return [{"setting": row["setting"], "width": int(row["width"]), "loss": float(row["loss"])}
            for row in _rows("losses_halfway")]


def published_tickets():
    """Tickets and networks trained from scratch under the same mask, against the pruned network.

    Returns
    -------
    list of dict
        ``setting`` (network/dataset), ``method`` ("lth" or "scratch"), the ``accuracy`` of one network and of an
        ``ensemble``, in [0, 1], and the ``disagreement`` with the pruned network, a fraction of the test inputs.

    References
    ----------
    Evci, Ioannou, Keskin and Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022.
    """
    return [{"setting": row["setting"], "method": row["method"], "disagreement": float(row["disagreement"]),
             **{name: float(row[name]) / 100 for name in ("accuracy", "ensemble")}} for row in _rows("tickets")]


def _rows(name):
    with files(__package__).joinpath(f"{name}.csv").open() as file:
        return list(csv.DictReader(file))
