"""SparseOpt: scale the gradient of each neuron by its sparsity.

A normalisation after a sparse neuron divides by a deviation that shrinks with its number of connections, and thus
amplifies its gradient by (1 - s)^(-1/2), where s is the sparsity of the neuron. Neurons with different sparsities
therefore learn at different speeds; SparseOpt corrects this within a layer. SparseOpt, ICML 2026, arXiv 2605.27541.
"""

import torch

from permask_core.masks import check_fit
from permask_core.sparse.fan_in import FanInLinear


def scale_gradients(optimizer, model, masks=None):
    """Apply SparseOpt before each step of an optimizer.

    The gradient of row i of a masked weight is multiplied by sqrt(1 - s_i) / sqrt(1 - s), where s_i is the sparsity of
    the row and s its mean over the rows of the layer. The factor is 1 if all rows have equally many connections: in a
    dense layer, or with constant fan-in without ablation. Rows of a :class:`~permask_core.sparse.FanInLinear` are
    scaled as under its mask. The method is meant for SGD. Adam divides a gradient by its own size, so a constant factor
    nearly cancels.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        An optimizer whose step is called without a closure.
    model : torch.nn.Module
    masks : Masks, optional
        Read at every step, so masks may change in place, such as those of a
        :class:`~permask_core.sparse.dynamic.Topology`.

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
    >>> linear.weight.grad[:, 0].square()  # 4 and 1 connections, 2.5 on average
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
    """Return the factor of each row of a mask [out, ...], float64 [out].

    With c_i connections in row i and n in all ``out`` rows, the factor is sqrt(c_i out / n). It is exactly 1 for equal
    rows, and 0 for rows without connections.
    """
    return _factors(mask.flatten(1).sum(1))


def _factors(counts):
    counts = counts.double()
    return (counts * len(counts) / counts.sum().clamp(min=1)).sqrt()
