"""SparseOpt: each neuron's gradient scaled to the sparsity of the neuron.

A normalisation after a sparse neuron divides by a spread that shrinks with its number of connections, and so amplifies
its gradient by (1 - s)^(-1/2), s being the neuron's sparsity. Where neurons differ in sparsity they learn at different
speeds; SparseOpt evens that out within a layer. SparseOpt, ICML 2026, arXiv 2605.27541.
"""

import torch

from permask_core.masks import check_fit
from permask_core.sparse.fan_in import FanInLinear


def scale_gradients(optimizer, model, masks=None):
    """SparseOpt: from now on, before each step of an optimizer, multiply the gradient of each row i of a masked weight
    by sqrt(1 - s_i) / sqrt(1 - s), with s_i the row's sparsity and s its mean over the layer's rows.

    The factor is 1 where all rows have as many connections: a dense layer, or constant fan-in without ablation. Rows of
    a :class:`~permask_core.sparse.FanInLinear` are scaled as they would be under its mask. The method is meant for SGD.
    Adam divides a gradient by its own size, so that a constant factor nearly cancels.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        One that takes gradients as they are, without a closure.
    model : torch.nn.Module
    masks : Masks, optional
        Read at every step, so that masks changed in place, such as those of a
        :class:`~permask_core.sparse.dynamic.Topology`, count at once.

    Returns
    -------
    torch.utils.hooks.RemovableHandle
        Its ``remove()`` ends the scaling.

    Raises
    ------
    ValueError
        If a mask does not fit.

    References
    ----------
    SparseOpt, ICML 2026, arXiv 2605.27541.

    Examples
    --------
    >>> linear = torch.nn.Linear(4, 2, bias=False)
    >>> mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    >>> optimizer = torch.optim.SGD(linear.parameters(), 1.0)
    >>> handle = scale_gradients(optimizer, linear, {"weight": mask})
    >>> linear.weight.grad = torch.ones(2, 4)
    >>> optimizer.step()
    >>> linear.weight.grad[:, 0].square()  # 4 and 1 connections, where equal rows would have 2.5
    tensor([1.6000, 0.4000])
    """
    masks, weights = masks or {}, dict(model.named_parameters())
    if masks:
        check_fit(masks, weights)
    layers = [module for module in model.modules() if isinstance(module, FanInLinear)]

    @torch.no_grad()
    def scale(*_):
        for name, mask in masks.items():
            _scale_rows(weights[name].grad, row_factors(mask))
        for layer in layers:
            counts = layer.rows.new_zeros(layer.out_features).index_fill(0, layer.rows, layer.fan_in)
            _scale_rows(layer.values.grad, _factors(counts)[layer.rows])

    return optimizer.register_step_pre_hook(scale)


def _scale_rows(gradient, factors):
    if gradient is not None:
        gradient.mul_(factors.to(gradient.device, gradient.dtype).view(-1, *[1] * (gradient.ndim - 1)))


def row_factors(mask):
    """The factor of each row of a mask [out, ...], float64 [out].

    With c_i connections in row i and n in all of the ``out`` rows it is sqrt(c_i out / n), which is exactly 1 where
    rows are equal; 0 for rows without connections.
    """
    return _factors(mask.flatten(1).sum(1))


def _factors(counts):
    counts = counts.double()
    return (counts * len(counts) / counts.sum().clamp(min=1)).sqrt()
