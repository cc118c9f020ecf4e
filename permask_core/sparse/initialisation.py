"""Initial weights that fit the number of connections, and the gradient flow under a mask.

The variance of the weights that preserves the size of signals depends on the number of inputs of a neuron. A mask
removes inputs, so that a variance chosen for a dense layer is too small, and gradients become small. Evci et al.,
"Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022.
"""

import copy

import torch
from torch.nn import functional as F

from permask_core.masks import apply_masks, check_fit
from permask_core.runs.checks import check_integer


@torch.no_grad()
def sparse_init(model, masks, *, seed):
    """Draw the masked weights again, with variance 2 / fan-in of each neuron's own connections.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; tensors without a mask do not change.
    masks : Masks
        For linear and convolution weights [out, ...]. Under a full mask this is He's initialisation (``fan_in``, for
        ReLU); a row without connections becomes 0.
    seed : int

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If a mask does not fit, or the seed is not an integer of at least 0.

    References
    ----------
    Evci et al., AAAI 2022.

    Examples
    --------
    >>> linear = torch.nn.Linear(1000, 1000)
    >>> mask = torch.rand(1000, 1000) < 0.02
    >>> weight = sparse_init(linear, {"weight": mask}, seed=0).weight
    >>> bool((weight[mask].std() * (20 / 2) ** 0.5 - 1).abs() < 0.05)  # about 20 connections a neuron
    True
    """
    check_integer("seed", seed, 0)
    weights, generator = dict(model.named_parameters()), torch.Generator().manual_seed(int(seed))
    check_fit(masks, weights)
    for name, mask in masks.items():
        mask = mask.cpu()
        fan_in = mask.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (mask.ndim - 1))
        drawn = torch.randn(mask.shape, generator=generator) * (2 / fan_in).sqrt()
        weights[name].copy_(drawn * mask)
    return model


@torch.no_grad()
def scale_to_fan_in(model, masks):
    """Scale the weights of each neuron by sqrt(inputs / connections), which compensates for removed connections.

    Weights that were drawn with a variance of c / inputs then have c / connections, as :func:`sparse_init` draws them
    with c = 2. Trained weights are scaled by the same factor.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; weights that are masked out are scaled too, and tensors without a mask do not change.
    masks : Masks
        For linear and convolution weights [out, ...]; a row without connections does not change.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If a mask does not fit.

    References
    ----------
    Evci et al., AAAI 2022, for untrained weights.

    Examples
    --------
    >>> linear = torch.nn.Linear(4, 2, bias=False)
    >>> _ = torch.nn.init.ones_(linear.weight)
    >>> masks = {"weight": torch.tensor([[True] * 4, [True, False, False, False]])}
    >>> scale_to_fan_in(linear, masks).weight[:, 0].tolist()
    [1.0, 2.0]
    """
    weights = dict(model.named_parameters())
    check_fit(masks, weights)
    for name, mask in masks.items():
        left = mask.flatten(1).float().mean(1)
        factor = left.where(left > 0, 1).rsqrt().view(-1, *[1] * (mask.ndim - 1))
        weights[name].mul_(factor.to(weights[name].device))
    return model


def gradient_flow(model, masks, x, y):
    """Return the squared Euclidean norm of the gradient of the loss, without the weights that are masked out.

    To first order, a step of gradient descent lowers the loss by the gradient flow times the learning rate.

    Parameters
    ----------
    model : torch.nn.Module
        Does not change. It is evaluated under the masks and in its current mode; in training mode BatchNorm uses the
        statistics of the batch.
    masks : Masks
    x, y : torch.Tensor
        Inputs and labels [n] of the mean cross-entropy.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If a mask does not fit.

    References
    ----------
    Evci et al., AAAI 2022.

    Examples
    --------
    >>> linear, x, y = torch.nn.Linear(3, 2, bias=False), torch.ones(1, 3), torch.tensor([0])
    >>> _ = torch.nn.init.zeros_(linear.weight)
    >>> gradient_flow(linear, {"weight": torch.tensor([[True, True, False]] * 2)}, x, y)  # four times 0.5 squared
    1.0
    """
    model = apply_masks(copy.deepcopy(model), masks)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(weights.values()), materialize_grads=True)
    gradients = apply_masks(dict(zip(weights, gradients)), masks)
    return sum(float(gradient.square().sum()) for gradient in gradients.values())
