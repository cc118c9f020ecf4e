"""SparseOpt: each neuron's gradient scaled to the sparsity of the neuron.

A normalisation after a sparse neuron divides by a spread that shrinks with its number of connections, and so amplifies
its gradient by (1 - s)^(-1/2), s being the neuron's sparsity. Where neurons differ in sparsity they learn at different
speeds; SparseOpt evens that out within a layer. SparseOpt, ICML 2026, arXiv 2605.27541.
"""

import torch

from permask_core.masks import check_fit


class SparseOpt:
    """An optimizer before whose steps the gradient of each row i of a masked weight is multiplied by
    sqrt(1 - s_i) / sqrt(1 - s), with s_i the row's sparsity and s its mean over the layer's rows.

    The factor is 1 where all rows have as many connections: a dense layer, or constant fan-in without ablation. It is
    meant for SGD. Adam divides a gradient by its own size, so that a factor that stays the same nearly cancels.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        One that takes gradients as they are, without a closure. Schedulers are given it, not the SparseOpt.
    model : torch.nn.Module
    masks : Masks
        Read at every step, so that masks changed in place count at once.

    Raises
    ------
    ValueError
        If masks are none, or one does not fit.
    """

    def __init__(self, optimizer, model, masks):
        if not isinstance(masks, dict):
            raise ValueError(f"masks are {type(masks).__name__}: expected a dict of bool tensors, which may be empty")
        self.optimizer, self.masks, self.weights = optimizer, masks, dict(model.named_parameters())
        if masks:
            check_fit(masks, self.weights)

    @torch.no_grad()
    def step(self):
        """Scale the gradients in place, and take a step."""
        for name, mask in self.masks.items():
            gradient = self.weights[name].grad
            if gradient is not None:
                factors = row_factors(mask).to(gradient.device, gradient.dtype)
                gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
        self.optimizer.step()

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


def row_factors(mask):
    """The factor of each row of a mask [out, ...], float64 [out].

    With c_i connections in row i and n in all of the ``out`` rows it is sqrt(c_i out / n), which is exactly 1 where
    rows are equal; 0 for rows without connections.
    """
    counts = mask.flatten(1).sum(1).double()
    return (counts * len(counts) / counts.sum().clamp(min=1)).sqrt()
