"""What the tests of matching share."""

import pytest
import torch
from torch import nn

from permask_core.models import build_model


@pytest.fixture
def lively():
    """A function: a network in float64 whose signals, biases and norms are of order one."""

    def make(model, *arguments, seed=0, **options):
        if isinstance(model, str):
            model = build_model(model, *arguments, seed=seed, **options)
        generator = torch.Generator().manual_seed(seed)
        model.double().eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.weight *= 6**0.5  # PyTorch's default shrinks signals by that in every ReLU layer
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                if getattr(module, "running_var", None) is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(std=0.2, generator=generator)
        return model

    return make


@pytest.fixture
def outputs():
    """A function: what a network answers with the weights of a state."""

    def answer(model, state, x):
        with torch.no_grad():
            return torch.func.functional_call(model, state, (x,))

    return answer


@pytest.fixture(scope="session")
def attention():
    """A function of a seed: a network with one layer of attention."""

    def make(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _Attention()

    return make


class _Attention(nn.Module):
    """Heads as units, and the dimensions of each, twice: query with key, and value with output."""

    def __init__(self, width=24, heads=4):
        super().__init__()
        self.heads = heads
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.out(y))
