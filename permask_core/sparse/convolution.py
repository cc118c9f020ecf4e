"""A 2-d convolution with constant fan-in: each output channel has ``k`` weights, and only these are stored."""

from numbers import Integral

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from permask_core.runs.checks import check_integer
from permask_core.sparse import kernels
from permask_core.sparse.fan_in import FanInLayer, is_traced
from permask_core.sparse.kernels import convolution


class FanInConv2d(FanInLayer):
    """A convolution where each active output channel has the same number of weights, ``fan_in``.

    It is called like torch.nn.Conv2d, and has the same attributes except the weight. :class:`FanInLayer` has the other
    attributes, the methods and the limits. A neuron is an output channel here. Its inputs are the entries of
    ``weight[channel].flatten()``, each a channel of its group and a position of the kernel, so ``in_features`` is
    in_channels / groups times the size of the kernel.

    On a CPU the layer is computed by compiled loops over the connections. For a depthwise convolution, whose groups
    have one channel each, they are slower than a dense layer, and :func:`~permask_core.sparse.condense` leaves it.
    Otherwise (on a GPU, without numba, and under ``torch.compile``) each call makes the dense weight, and only the
    memory of the parameters, their gradients and the optimizer's state is saved. A 1x1 convolution without groups is
    computed as a :class:`FanInLinear` over the channels there, except when compiled.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int or (int, int)
    fan_in : int
        Number of weights of each output channel, from 1 to ``in_features``.
    stride, padding, dilation, groups, bias, padding_mode
        As in torch.nn.Conv2d.
    indices : torch.Tensor, optional
        Connections, integers [out_channels, fan_in]. By default they are drawn at random.
    generator, device, dtype
        As in :class:`FanInLinear`.

    Raises
    ------
    ValueError
        If ``fan_in``, a size or an index is out of range, or an index is repeated in its row; when called, if the shape
        of the input does not fit, or its device or type is not that of the values.

    Examples
    --------
    >>> import torch
    >>> layer = FanInConv2d(16, 32, 3, fan_in=14, padding=1)
    >>> layer(torch.randn(8, 16, 10, 10)).shape, layer.mask().shape, int(layer.mask().sum())
    (torch.Size([8, 32, 10, 10]), torch.Size([32, 16, 3, 3]), 448)
    """

    DENSE = nn.Conv2d
    SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(self, in_channels, out_channels, kernel_size, fan_in, stride=1, padding=0, dilation=1, groups=1,
                 bias=True, padding_mode="zeros", **given):
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            check_integer(name, size, 1)
        for name, size, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("dilation", dilation, 1),
                                  ("padding", padding, 0)):
            pair = size if isinstance(size, tuple | list) else (size, size)
            if not (name == "padding" and isinstance(size, str)) and (len(pair) != 2 or not all(
                    isinstance(one, Integral) and not isinstance(one, bool) and one >= least for one in pair)):
                raise ValueError(f"{name} is {size!r}: expected an integer of at least {least}, or two of them")
        sizes = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                          padding_mode=padding_mode, device="meta")  # checks them, and makes them pairs
        super().__init__(sizes, sizes.weight.shape, fan_in, bias, **given)

    def _describe(self, sizes, shape):
        super()._describe(sizes, shape)
        self.window = convolution.Window(self.kernel_size, self.stride, self.dilation)
        self._around = sizes._reversed_padding_repeated_twice
        self._pointwise = self.window.kernel_size == (1, 1) and self.groups == 1

    def forward(self, x):
        """Map [batch, in_channels, height, width] to [batch, out_channels, ...], or both without the batch."""
        values, bias = self.values, self.bias
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"the input has shape {list(x.shape)}: expected [batch, channels, height, width] with "
                             f"{self.in_channels} channels")
        x = self._admitted(x, values)
        images = self.padded(x if x.ndim == 4 else x[None])
        if min(self.window.output_size(images.shape[2:])) < 1:
            raise ValueError(f"the input has shape {list(x.shape)}: expected images of at least the size of the kernel")
        if not is_traced(x) and (self._pointwise or convolution.is_usable(images, values, self.indices, bias)):
            y = self._outputs(self._sums, images, values, bias)
        else:
            y = F.conv2d(images, self._spread(values), bias, self.stride, 0, self.dilation, self.groups)
        return y if x.ndim == 4 else y[0]

    def padded(self, x):
        """Return a batch of images with its padding."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._around, mode) if any(self._around) else x

    def _forward(self, x, values, bias):
        if convolution.is_usable(x, values, self.indices, bias):
            return convolution.forward(x, values, self.columns(), bias, self.window)
        pixels = self._strided(x).movedim(1, -1)
        return kernels.forward(pixels.flatten(0, -2), values, self.indices, bias).unflatten(
            0, pixels.shape[:-1]).movedim(-1, 1).contiguous()

    def _backward(self, grad, x, values, need_x, need_values):
        if convolution.is_usable(x, values, self.indices, None):
            return convolution.backward(grad, x, values, self.transpose(), self.window, need_x, need_values)
        g, pixels = (one.movedim(1, -1).flatten(0, -2).contiguous() for one in (grad, self._strided(x)))
        rows, dvalues = kernels.backward(g, pixels, values, self.indices, self.transpose(), need_x=need_x,
                                         need_values=need_values)
        dx = None
        if need_x:
            dx = torch.zeros_like(x)
            part = self._strided(dx)
            part.copy_(rows.view(len(x), *part.shape[2:], -1).movedim(-1, 1))
        return dx, dvalues

    def _strided(self, x):
        return x[..., ::self.stride[0], ::self.stride[1]]

    def dense_gradient(self, grad, x, start, stop):
        """Return the gradient of rows ``start`` to ``stop`` of the dense weight, [stop - start, in_features], for an
        input and the gradient of its output."""
        grad, x = (images if images.ndim == 4 else images[None] for images in (grad, x))
        shape, ours = self.weight_shape, slice(start, stop)
        if self.groups == 1:
            grad, shape, ours = grad[:, ours], (stop - start, *shape[1:]), slice(None)
        weight = conv2d_weight(self.padded(x), shape, grad, self.stride, 0, self.dilation, self.groups)
        return weight[ours].flatten(1)
