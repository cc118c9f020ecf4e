"""Merge experts: which ones form a cluster, with which weights, and whether their units are aligned first.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering" (HC-SMoE), ICML 2025. Li et al.,
"Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy" (M-SMoE), ICLR 2024. Lasby et al.,
"REAP the Experts", ICLR 2026, for the error of a fixed mixture.
"""

import copy

import torch
from scipy.cluster.hierarchy import cut_tree, linkage

from permask_core.experts.alignment import MATCHINGS, moved_onto
from permask_core.experts.layout import LAYOUTS, expert_tensors, moe_blocks, run_expert
from permask_core.experts.pruning import best_experts, select_experts
from permask_core.runs.checks import check_integer, check_one_of

ROUTERS = ("kept", "leader")


def merge_experts(model, clusters, weights, *, matching=None, statistics=None, router="kept", layouts=LAYOUTS):
    """Return a copy of a model in which the experts of each cluster are replaced by their weighted mean.

    Parameters
    ----------
    model : torch.nn.Module
    clusters : dict of str to list of list of int
        By the name of the block, a partition of its experts. The expert with the largest weight leads its cluster.
    weights : dict of str to torch.Tensor
        [experts], divided by their sum in each cluster; equal if that is 0. For example the scores of
        :func:`permask_core.experts.saliency`.
    matching : str, optional
        "weights" or "activations": align the units of each expert with those of the leader first, over the tokens that
        ``statistics`` has kept. By default nothing is aligned.
    statistics : dict of str to Statistics, optional
        From :func:`permask_core.experts.calibrate` with ``keep``; only for "activations".
    router : str
        "kept": each expert of a cluster becomes the merged one and the router does not change, so the weights of a
        token for the cluster add up. The model keeps its size, unless equal experts are stored once. "leader": only the
        leader's row of the router and one expert remain.
    layouts : dict of str to Layout

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If clusters are no partition, weights are missing, an option is unknown, activations are asked for without kept
        tokens; or with "leader", if the numbers of clusters differ or are below the number of experts for a token.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> model = build_model("moe", (11,), 15, layers=1, experts=4)
    >>> merged = merge_experts(model, {"blocks.0.mixture": [[0, 2], [1], [3]]}, {"blocks.0.mixture": torch.ones(4)})
    >>> packed = merged.blocks[0].mixture.experts.down_proj
    >>> torch.equal(packed[0], packed[2]), torch.equal(packed[0], packed[1])
    (True, False)
    """
    check_one_of("router", router, ROUTERS)
    if matching is not None:
        check_one_of("matching", matching, MATCHINGS)
    blocks = moe_blocks(model, layouts)
    for name, block in blocks.items():
        _check(name, block, clusters.get(name), weights.get(name))
        if matching == "activations" and (statistics is None or statistics[name].x is None):
            raise ValueError(f"there are no kept tokens of {name!r}: expected statistics of calibrate(..., keep=...)")
    leaders = {name: [leader_of(cluster, weights[name]) for cluster in clusters[name]] for name in blocks}
    if router == "leader":
        for name, block in blocks.items():
            if len(leaders[name]) < block.top_k:
                raise ValueError(f"{name!r} has {len(leaders[name])} clusters: expected at least {block.top_k}, the "
                                 "number of experts for a token")
    merged = copy.deepcopy(model)
    for name, block in moe_blocks(merged, layouts).items():
        x = statistics[name].x if matching == "activations" else None
        for cluster, leader in zip(clusters[name], leaders[name]):
            mean = mean_expert(blocks[name], cluster, leader, weights[name], matching, x)
            for j in cluster if len(cluster) > 1 else ():
                for key, tensor in expert_tensors(block, j).items():
                    tensor.copy_(mean[key])
    if router == "kept":
        return merged
    return select_experts(merged, {name: torch.tensor(sorted(found)) for name, found in leaders.items()},
                          layouts=layouts)


def leader_of(cluster, weights):
    """Return the expert of a cluster with the largest weight, of equal ones the one with the lowest index."""
    return max(sorted(cluster), key=lambda j: float(weights[j]))


def mean_expert(block, cluster, leader, weights, matching=None, x=None):
    """Return the tensors of the weighted mean of the experts of a cluster, each aligned with the leader."""
    share = torch.stack([weights[j] for j in cluster]).double()
    share = share / share.sum() if share.sum() else torch.full_like(share, 1 / len(cluster))
    mean = {}
    for j, part in zip(cluster, share):
        goal, moved = moved_onto(block, j, leader, matching, x)
        for key, tensor in (goal if j == leader else moved).items():
            mean[key] = mean.get(key, 0) + part * tensor.double()
    return mean


def _check(name, block, clusters, weights):
    if clusters is None or sorted(j for cluster in clusters for j in cluster) != list(range(block.count)):
        raise ValueError(f"the clusters of {name!r} are {clusters}: expected each of its {block.count} experts once")
    if weights is None or tuple(weights.shape) != (block.count,) or not weights.isfinite().all():
        raise ValueError(f"the weights of {name!r} are {weights}: expected {block.count} finite numbers")


def clusters_by_outputs(statistics, keep):
    """Return the clusters of HC-SMoE: average linkage of the mean outputs of experts over all tokens.

    Parameters
    ----------
    statistics : dict of str to Statistics
        From :func:`permask_core.experts.calibrate` with ``merging``.
    keep : int
        Number of clusters in each block.

    Returns
    -------
    dict of str to list of list of int

    References
    ----------
    Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025.
    """
    clusters = {}
    for name, found in _for_merging(statistics).items():
        check_integer("keep", keep, 1, len(found.counts))
        labels = cut_tree(linkage(found.outputs.cpu().numpy(), "average"), keep)[:, 0].tolist()
        clusters[name] = [[j for j, label in enumerate(labels) if label == one] for one in range(keep)]
    return clusters


def clusters_by_logits(statistics, keep):
    """Return the groups of M-SMoE: the most frequent experts of all blocks lead, and each other expert joins the leader
    of its block whose router logits are the most similar.

    Parameters
    ----------
    statistics : dict of str to Statistics
        From :func:`permask_core.experts.calibrate` with ``merging``.
    keep : int
        The mean number of groups of a block. Blocks get different numbers, at least one each.

    Returns
    -------
    dict of str to list of list of int

    References
    ----------
    Li et al., "Merge, Then Compress", ICLR 2024.
    """
    statistics = _for_merging(statistics)
    for found in statistics.values():
        check_integer("keep", keep, 1, len(found.counts))
    first = {name: int(found.counts.argmax()) for name, found in statistics.items()}  # of each block, one leads
    others = sorted(((-float(count), i, j) for i, (name, found) in enumerate(statistics.items())
                     for j, count in enumerate(found.counts) if j != first[name]))
    leaders = {name: [j] for name, j in first.items()}
    for _, i, j in others[:(keep - 1) * len(statistics)]:
        leaders[[*statistics][i]].append(j)
    return {name: join_leaders(leaders[name], cosines(found.logits)) for name, found in statistics.items()}


def clusters_by_score(model, statistics, scores, keep, *, layouts=LAYOUTS):
    """Return clusters as in REAM: the best scored experts lead, and each other expert joins the leader that is the most
    similar, by the mean of the cosines of mean outputs and of router logits.

    (REAM also limits the size of a cluster, and continues on the merged model layer by layer; this does not.)

    Parameters
    ----------
    model : torch.nn.Module
    statistics : dict of str to Statistics
        From :func:`permask_core.experts.calibrate` with ``merging``.
    scores : dict of str to torch.Tensor
    keep : int

    Returns
    -------
    dict of str to list of list of int
    """
    clusters = {}
    for name, block in moe_blocks(model, layouts).items():
        found = _for_merging(statistics)[name]
        similarity = (cosines(found.outputs @ found.outputs.T) + cosines(found.logits)) / 2
        clusters[name] = join_leaders(best_experts(name, block, scores[name], keep).tolist(), similarity)
    return clusters


def _for_merging(statistics):
    for name, found in statistics.items():
        if found.outputs is None:
            raise ValueError(f"the statistics of {name!r} have no outputs: expected those of calibrate(..., "
                             "merging=True)")
    return statistics


def cosines(products):
    """Return cosines from inner products [n, n]; those with a vector of zeros are 0."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return (products / torch.outer(norms, norms)).nan_to_num(0.0, 0.0, 0.0)


def join_leaders(leaders, similarity):
    """Return a cluster for each leader: every other expert joins the leader that is the most similar to it.

    Examples
    --------
    >>> join_leaders([0, 2], torch.tensor([[1.0, 0.2, 0.0], [0.2, 1.0, 0.9], [0.0, 0.9, 1.0]]))
    [[0], [2, 1]]
    """
    clusters = {j: [j] for j in leaders}
    for j in range(len(similarity)):
        if j not in clusters:
            clusters[leaders[int(similarity[j, leaders].argmax())]].append(j)
    return list(clusters.values())


def mixture_error(gates, outputs, mixture):
    """Return the mean squared error of replacing experts by one fixed mixture of their outputs.

    The sum of g_j f_j becomes G sum of a_j f_j, with G the sum of the g_j. For two experts with r = g_i / G, it is the
    mean of ``w (r - a_i)^2`` with ``w = G^2 |f_i - f_j|^2``.

    Parameters
    ----------
    gates : torch.Tensor
        [tokens, experts]: the weights g, 0 where a token is not routed to an expert.
    outputs : torch.Tensor
        [tokens, experts, hidden]: the outputs f.
    mixture : torch.Tensor
        [experts]: the numbers a, whose sum is 1. Pruning all but one is a 1 and zeros.

    Returns
    -------
    float

    References
    ----------
    Lasby et al., "REAP the Experts", ICLR 2026: section 3, there with the variance of r.
    """
    error = (gates - gates.sum(1, keepdim=True) * mixture)[:, :, None] * outputs
    return float(error.sum(1).square().sum(1).mean())


def best_mixture(gates, outputs):
    """Return the mixture [experts] with the least :func:`mixture_error`; its sum is 1, and numbers may be negative.

    For two experts this is a* = E[w r] / E[w]. If no token distinguishes the experts, all numbers are equal.

    Examples
    --------
    >>> gates = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
    >>> best_mixture(gates, torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]]))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    gates, outputs = gates.double(), outputs.double()
    n = gates.shape[1]
    scaled = gates.sum(1)[:, None, None] * outputs
    products = torch.einsum("tih,tjh->ij", scaled, scaled)
    wanted = torch.einsum("tih,th->i", scaled, (gates[:, :, None] * outputs).sum(1))
    ones = torch.ones(n, 1, dtype=torch.float64, device=gates.device)
    system = torch.cat([torch.cat([products, ones], 1), torch.cat([ones.T, torch.zeros_like(ones[:1])], 1)])
    goal = torch.cat([wanted, ones[0]])
    start = torch.cat([ones[:, 0] / n, torch.zeros_like(ones[0])])  # if several are best, the nearest to equal shares
    return (start + torch.linalg.pinv(system, hermitian=True) @ (goal - system @ start))[:n]


def mixture_weights(model, statistics, clusters, *, layouts=LAYOUTS):
    """Return the :func:`best_mixture` of each cluster over the kept tokens, as weights for :func:`merge_experts`.

    The weights are those of the best mixture of *outputs*; the outputs of mean weights are not the mean outputs.

    Parameters
    ----------
    model : torch.nn.Module
    statistics : dict of str to Statistics
        From :func:`permask_core.experts.calibrate` with ``keep``.
    clusters : dict of str to list of list of int

    Returns
    -------
    dict of str to torch.Tensor
        float64 [experts], by the name of the block.
    """
    weights = {}
    for name, block in moe_blocks(model, layouts).items():
        found = statistics[name]
        if found.x is None:
            raise ValueError(f"there are no kept tokens of {name!r}: expected statistics of calibrate(..., keep=...)")
        weights[name] = torch.ones(block.count, dtype=torch.float64, device=found.x.device)
        for cluster in clusters[name]:
            if len(cluster) > 1:
                weights[name][cluster] = best_mixture(*gates_and_outputs(block, found, cluster))
    return weights


def gates_and_outputs(block, found, experts):
    """Return the weights [tokens, experts] and outputs [tokens, experts, hidden] of some experts for the kept tokens to
    which at least one of them is routed."""
    gates = torch.stack([((found.chosen == j) * found.weights.double()).sum(1) for j in experts], 1)
    used = gates.sum(1) > 0
    with torch.no_grad():
        outputs = torch.stack([run_expert(block, j, found.x[used]) for j in experts], 1)
    return gates[used], outputs
