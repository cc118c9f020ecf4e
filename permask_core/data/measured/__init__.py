"""Results that take too long for a notebook: measured by our own scripts, with the command, versions and commit."""

import json
from importlib.resources import files
from pathlib import Path

from permask_core.runs.tables import read_table


def measured_noisy_digits():
    """The permuted-mask experiment on noisy digits, with more seeds, widths and sparsities than in a notebook.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings``, and ``rows`` as
        :func:`permask_core.experiments.permuted_masks.run` returns them.
    """
    return _read("noisy_digits")


def measured_cifar_sized():
    """The permuted-mask experiment with ResNet20 on 50,000 Trifeature images, in batched training on one GPU.

    Returns
    -------
    dict or None
        ``command``, ``commit``, ``versions``, ``device``, ``machine``, ``settings``; ``batched`` (largest number of
        networks at once), ``pieces`` (``seconds``, ``commit`` and ``device`` of each part of the work), the total
        ``seconds``, the ``epochs`` of training, the ``images`` of an epoch, and ``rows`` as returned by
        :func:`permask_core.experiments.permuted_masks.run`. None if the experiment has not been run.
    """
    return _read("cifar_sized") if files(__package__).joinpath("cifar_sized.json").is_file() else None


def measured_dynamic_sparse_training():
    """Static masks and dynamic sparse training on digits, and SparseOpt compared with plain SGD.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device`` and ``settings``; ``rows``, a list of dict: ``network``,
        ``method``, ``sparsity`` (requested), ``achieved`` (of the masks at the start; not in dense rows), ``seed``,
        ``accuracy``, and for moving connections ``connections`` (at the end) and ``active`` (neurons of each layer
        with any connection at the end); and ``sparse_opt``, a list of dict: ``masks``, ``sparsity``, ``achieved``,
        ``seed``, ``sparse_opt`` (whether it was used), ``accuracy``.
    """
    return _read("dynamic_sparse_training")


def measured_fairness_of_sparse_networks():
    """Fairness by class, group and individual of dense, pruned, ticket, permuted, naive and random networks.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, and ``tasks``: ``digits`` and ``trifeature``, each with its
        ``settings`` (of :class:`permask_core.experiments.permuted_masks.Experiment`), ``class_sizes`` of the test set
        and ``rows``, a list of dict: ``method``, ``matching``, ``sparsity`` (0 for dense), ``seed``, ``network`` ("a"
        or "b": the dense network itself, or the network from which the run started), ``accuracy``, ``loss``,
        ``class_accuracies``, ``individual`` (mean total variation over distance), ``confidence`` (mean of the largest
        probability), and for ``trifeature`` ``colour DPD``, ``colour EOD``, ``texture DPD`` and ``texture EOD``, each
        with the value, its chance level and the 95 % point of chance, and ``shortcut``, the fraction of the wrong
        predictions that are the shape correlated with the colour, among images where that is not the true shape
        (chance: 1 / 9).
    """
    return _read("fairness_of_sparse_networks")


def measured_price_of_alignment():
    """Permuted masks matched early, with few images or in one layer only, and recovery of planted permutations.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings`` (of
        :class:`permask_core.experiments.permuted_masks.Experiment`) and ``training_images``; ``rows``, a list of dict:
        ``method``, ``matching``, ``sparsity`` (0 for dense), ``seed``, ``accuracy``, ``loss``, ``seconds`` (of the
        training), and for ``permuted`` the recipe (``matched_at``, ``matched_images``, ``matched_layers``),
        ``matching_seconds`` and ``overlap`` (with the mask matched at the end); and ``control``, a list of dict:
        ``matching`` ("" if nothing is moved), ``noise`` (in standard deviations of the weights), ``seed``,
        ``sparsity``, ``shared_positions``, ``overlap`` (with the planted mask) and ``idle`` (fraction of units without
        connections), all in [0, 1].
    """
    return _read("price_of_alignment")


def measured_weights_or_activations():
    """Return weight matching and activation matching of perceptrons of several widths on noisy digits.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings``, ``points`` (of a line); ``rows`` as
        :func:`permask_core.experiments.permuted_masks.run` returns them, and ``lines`` as
        :func:`permask_core.experiments.basins.run` does, without the losses and errors along the line.
    """
    return _read("weights_or_activations")


def measured_tournament():
    """The tournament of alignments.

    Returns
    -------
    dict of str to dict
        By part ("choice", "perceptron", ...; those that were run): ``command``, ``commit``, ``versions``, ``device``;
        ``finalists`` of the choice, the best first; and ``rows`` as returned by
        :func:`permask_core.experiments.tournament.run`, with ``network`` (the preset) and ``epochs_of_training`` (of
        the dense networks).
    """
    return _by_file("tournament")


def measured_extreme():
    """Output layers for 10,000 labels: static rows of fixed fan-in, SET and its variants, and dense layers.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``machine``, ``labels``, ``data``, ``recipe``; ``rows``, a list of dict:
        ``method``, ``seed``, ``parameters``, ``fan_in``, ``intermediate``, ``output_layer_bytes``, ``seconds``,
        ``losses``, ``precision`` (by group of labels, then by k as text), ``unseen`` (fraction of test labels that
        no training point has); and ``compared``, paired differences of precision at 1.
    """
    return _read("extreme")


def measured_extreme_memory():
    """Peak memory of training with a million labels.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``machine``, ``inputs``, ``labels``, ``fan_in``, ``batch``;
        ``training`` and ``training_with_set``, with ``bytes`` above the data and ``seconds_per_step``; and
        ``computed``, bytes of the output layer in training, ``fan_in`` and ``dense``.
    """
    return _read("extreme_memory")


def measured_distillation():
    """Teachers, students and distilled students on Trifeature: accuracy and fairness by class, group and individual.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``; and ``tasks``, by name a dict with ``settings`` and ``rows``,
        a list of dict: ``role``, ``temperature``, ``seed``, ``accuracy``, ``loss``, ``seconds``, ``class_accuracies``
        [classes], and if there are groups ``individual`` (mean ratio, pixels in [0, 1]) and for each attribute and
        measure, such as "colour EOD", the value, the mean of chance and the 95 % point of chance.
    """
    return _read("distillation")


def measured_structured_tickets():
    """Tickets of constant fan-in and unstructured tickets on noisy digits: accuracy, and time of a prediction.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings`` (of
        :class:`permask_core.experiments.permuted_masks.Experiment`); ``rows``, a list of dict: ``scope`` ("global" or
        "fan_in"; dense rows are listed once, under "global"), ``method``, ``sparsity`` and ``achieved`` (0 for dense),
        ``seed``, ``accuracy`` and ``loss``; permuted rows also have ``connections`` (by layer, the smallest and
        largest number of a neuron, and how many neurons have any), and rows of constant fan-in ``condensed_accuracy``
        and ``condensed_loss``, of the ticket trained as condensed layers; and ``times``, a list of dict: ``seed``,
        ``sparsity``, ``batch``, ``turns``, ``trimmed_to`` (units of the hidden layers of the trimmed network) and
        ``median_seconds`` of processor time for a prediction by "dense", "zeros", "trimmed" and "CSR" (the unstructured
        ticket) and "fan-in".
    """
    return _read("structured_tickets")


def measured_compressed_experts():
    """Pruned and merged experts of a small mixture, on a language in which every answer can be checked.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings``, ``experts`` (of each block before); ``rows`` as
        :func:`permask_core.experiments.compressed_experts.run` returns them; and ``correlations``, a list of dict:
        ``seed``, ``block``, ``criterion``, ``spearman`` (with the true error of removing an expert), and ``unreached``
        (experts of the block without calibration tokens).
    """
    return _read("compressed_experts")


def measured_traced_networks():
    """The permutation groups of networks of torchvision, timm and transformers, and of U-Nets as in diffusers.

    Returns
    -------
    dict
        ``command``, ``versions``, ``device``, ``precision``, and ``rows``, a list of dict: ``library``, ``model``,
        ``parameters``, ``side`` (of the images, pixels; None for other inputs), ``seconds`` (tracing, of processor
        time), ``commit``, and either ``refused``, the reason why it cannot be traced, or ``groups``, ``top`` (groups
        that are not nested), ``units`` (the sum of their sizes) and ``fixed`` (number of indices in no group, by
        reason). If there are groups, either ``unchecked``, the reason why the function cannot be tested, or ``change``
        (the largest change of an output when all groups are permuted at random, in standard deviations of the outputs)
        and ``left_out`` (the smallest such change with one entry omitted, in the group ``left_out_at``, of
        ``left_out_groups`` that were tried). Rows with a ``command`` were measured by that; the ``seconds`` of
        torchvision_groups.py, an earlier script, are wall time.
    """
    return _read("traced_networks")


def measured_matching_peers():
    """Weight matching next to other programs.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, and ``rows``, a list of dict: ``network``, ``pair`` ("two new
        networks" or "a permuted copy"), ``program``, ``seconds`` (of processor time, for each repeat), ``gain`` (of the
        inner product of all parameters), ``change`` (of the output, in standard deviations), and ``in_place`` (the
        share of the parameters that equal those of the first network, averaged over tensors).
    """
    return _read("matching_peers")


def measured_ensembles_from_one_mask():
    """Ensembles of dense, pruned, ticket, permuted and naive networks on noisy digits: accuracy, training and weights.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings``; ``early``, the epoch at which the masks of
        ``permuted early`` are matched; and ``rows``, a list of dict: ``method``, ``sparsity`` (0 for dense), ``seed``
        (the family), ``members``, ``accuracy`` (mean over all subsets of that size, of eight networks), ``weights``
        (kept weights of all members, in units of the weights of one dense network), ``epochs`` (of training; shared
        epochs are counted once).
    """
    return _read("ensembles_from_one_mask")


def measured_how_little_rewinding():
    """Sparse training from several rewind points, with dense weights and with weights scaled to the remaining
    connections.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``settings``, and ``rows``, a list of dict: ``method``,
        ``start`` ("dense", "sparse"; "" for the dense network), ``rewind`` (epochs), ``seed``, ``sparsity``,
        ``achieved``, ``accuracy`` and ``loss``.
    """
    return _read("how_little_rewinding")


def measured_fashion_mnist_settings():
    """The search for the learning rate and the rewind point of the presets of Fashion-MNIST.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``; ``searches``, by preset the number of ``seeds``, the learning
        ``rates``, the ``rewinds`` and ``sparsities``; ``chosen``, by preset the ``lr`` and ``rewind``; and ``rows``, a
        list of dict: ``preset``, ``lr``, ``rewind``, ``sparsity``, ``seed`` and test ``accuracy`` of LTH in [0, 1].
    """
    return _read("fashion_mnist_settings")


def measured_fan_in_speed():
    """Times of fan-in layers and other linear layers on the processors on which they were measured.

    Returns
    -------
    dict of str to dict
        By the compiler's name of the processor: ``command``, ``commit``, ``versions``, ``device``, ``threads``,
        ``precision``; and ``rows``, a list of dict: ``inputs``, ``outputs``, ``sparsity``, ``fan_in``, ``batch``,
        ``way`` ("forward", or "both" with backward), and by name of the layer ``median_seconds``,
        ``quartiles_seconds`` and ``ratios`` (of medians, to the fan-in layer); in "shared by 8", a fan-in
        layer, eight neighbouring neurons have the same connections; some records also have 4 and 16.
    """
    return _by_file("fan_in_cpu")


def measured_shared_inputs():
    """Perceptrons of constant fan-in on Fashion-MNIST, trained with neurons that share their inputs.

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions``, ``device``, ``preset``, and ``rows``, a list of dict: ``shared`` (number
        of neighbouring neurons with the same inputs), ``method`` ("fan_in", which does not move connections, or
        "srigl"), ``sparsity``, ``achieved``, ``seed``, ``accuracy``, and by layer ``active`` and ``neurons`` (numbers
        of neurons) and ``connections``.
    """
    return _read("shared_inputs")


def measured_whole_networks():
    """Times of whole networks with dense and with fan-in layers, on the processors on which they were measured.

    Returns
    -------
    dict of str to dict
        By the compiler's name of the processor: ``command`` (without options), ``commit`` (of all rows), ``versions``,
        ``device``, ``precision``, ``sparsity``; and ``rows``, a list of dict: ``network``, ``replaced`` (the kind of
        layers), ``layers`` (their number), ``batch``, ``step`` ("forward" or "training"), ``threads``, ``command``,
        ``commit``, ``share_of_dense`` (the share of the dense network's time that is spent in these layers), ``bound``
        (of the gain: 1 / (1 - share)), and by way ("dense", "fan-in", "shared by 8", "torch CSR", "dense, compiled",
        "dense, channels last"; not all in each row) ``median_seconds``, ``quartiles_seconds`` and ``ratios`` (of
        medians: how many times as fast as dense). Some rows have ``seconds_by_kind``, the time that the dense and the
        fan-in network spend in each kind of layers, and ``counted``, multiplications and least bytes of the replaced
        layers.
    """
    return _by_file("whole_networks")


def measured_grids():
    """Grids of runs that were run in advance.

    Returns
    -------
    dict of str to pathlib.Path
        The folder of each grid by name. It has ``tables``, a CSV for each notebook (read by
        :func:`permask_core.runs.tables.read_table`, with a row for each run: settings, commit and device), ``jobs.csv``
        and ``status.json``.
    """
    return {path.parent.name: path.parent for path in sorted(Path(str(files(__package__))).glob("grids/*/status.json"))}


def measured_grid(grid, notebook):
    """Return the results of one notebook in a grid that was run in advance.

    Parameters
    ----------
    grid, notebook : str
        Such as "digits" and "cifar".

    Returns
    -------
    dict
        ``command``, ``commit``, ``versions`` and ``device``, of several jobs separated by commas; and ``rows``, a list
        of dict with the settings and results of each run, as the notebook writes them to ``output``.

    Raises
    ------
    KeyError
        If no such grid came with the book.
    FileNotFoundError
        If the grid has no results of the notebook.
    """
    folder = measured_grids()[grid]
    rows = read_table(folder / "tables" / f"{notebook}.csv")
    torch = {job["job"]: job["versions.torch"] for job in read_table(folder / "jobs.csv")}

    def every(values):
        return ", ".join(dict.fromkeys(map(str, values)))

    return {"command": f"make batch GRID={grid}", "commit": every(row["commit"] for row in rows),
            "versions": {"torch": every(torch[row["job"]] for row in rows)},
            "device": every(row["device"] for row in rows), "rows": rows}


def measured_claims():
    """How often the claims of the notebooks held when the notebooks were repeated.

    Returns
    -------
    dict
        ``command``; ``repetitions``, a dict by name: ``seeds`` (number added to every seed), ``environment`` (variables
        that select other arithmetic) and ``machines`` (processors, commits and versions); and ``pages``, a dict by name
        of the notebook: ``version`` (of its code) and ``claims``, a dict by sentence and repetition: ``holds`` and
        ``evidence``. Both are empty if nothing was repeated.
    """
    there = files(__package__).joinpath("claims.json").is_file()
    return _read("claims") if there else {"repetitions": {}, "pages": {}}


def _by_file(folder):
    paths = sorted((Path(str(files(__package__))) / folder).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def _read(name):
    return json.loads(files(__package__).joinpath(f"{name}.json").read_text())
