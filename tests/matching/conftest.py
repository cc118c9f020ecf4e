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
