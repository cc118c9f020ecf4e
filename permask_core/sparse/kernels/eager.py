"""Fan-in arithmetic in plain torch operations, for every device and type; the reference for tests of the fast kernels.

Rows are computed in chunks, because gathering a whole layer would need batch x outputs x fan-in numbers at once.
"""

from functools import wraps

import torch

CHUNK = 2 ** 22  # numbers gathered at a time


def _summed_in(dtype):
    return torch.float32 if dtype.itemsize < 4 else dtype


def _chunks(n, batch, k):
    rows = max(1, CHUNK // max(1, batch * k))
    return (slice(start, start + rows) for start in range(0, n, rows))


def _as_given(kernel):
    """Disable autocast, which would multiply in half precision what is summed in float32."""
    @wraps(kernel)
    def exact(first, *given, **named):
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *given, **named)
    return exact


@_as_given
def forward(x, values, indices, bias=None):
    """:func:`permask_core.sparse.kernels.forward` in plain torch, for any device and type."""
    dtype = _summed_in(x.dtype)
    columns, y = x.to(dtype).t().contiguous(), x.new_empty(len(x), len(values))
    for rows in _chunks(len(values), len(x), values.shape[1]):
        # [rows, 1, k] @ [rows, k, batch]
        part = torch.bmm(values[rows, None].to(dtype), columns[indices[rows].long()])[:, 0].t()
        y[:, rows] = part if bias is None else part + bias[rows].to(dtype)
    return y


@_as_given
def backward(grad, x, values, indices, transposed, need_x, need_values):
    """:func:`permask_core.sparse.kernels.backward` in plain torch, for any device and type."""
    dtype, (batch, inputs), k = _summed_in(x.dtype), x.shape, values.shape[1]
    columns, by_output = (tensor.to(dtype).t().contiguous() for tensor in (x, grad))
    dx = torch.zeros(inputs, batch, dtype=dtype, device=x.device) if need_x else None
    dvalues = torch.empty_like(values) if need_values else None
    for rows in _chunks(len(values), batch, k):
        chosen = indices[rows].long()
        if need_values:
            dvalues[rows] = torch.bmm(columns[chosen], by_output[rows, :, None])[..., 0].to(values.dtype)
        if need_x:
            parts, chosen = (values[rows, :, None].to(dtype) * by_output[rows, None]).flatten(0, 1), chosen.flatten()
            if x.is_cpu:  # each variant has a fixed order of sums on its own device only
                dx.index_add_(0, chosen, parts)
            else:
                dx.index_put_((chosen,), parts, accumulate=True)
    return dx.t().to(x.dtype) if need_x else None, dvalues
