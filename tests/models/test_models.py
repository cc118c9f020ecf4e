"""Networks against published counts of parameters, torchvision's VGG11 and closed forms."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import permask_core
from permask_core.models import build_model, evaluation_mode
from permask_core.models.vision import torchvision
from tests.hypotheses import examples


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@examples(1 / 3)
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), classes=st.integers(2, 12), depth=st.integers(1, 4),
       width=st.sampled_from([0.25, 0.5, 1.0, 2]))
def test_an_mlp_by_its_formula(shape, classes, depth, width):
    model, h = build_model("mlp", shape, classes, depth=depth, width=width), int(128 * width)
    pixels = shape[0] * shape[1] * shape[2]
    assert parameters(model) == (pixels + 1) * h + (depth - 1) * (h + 1) * h + (h + 1) * classes
    assert model(torch.zeros(3, *shape)).shape == (3, classes)


def test_lenet5_has_its_published_61706_parameters():
    for shape in ((1, 28, 28), (1, 32, 32)):
        assert parameters(build_model("lenet5", shape, 10)) == 61_706


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 27, 28), (3, 28, 40), (1, 32, 32), (3, 64, 64)])
def test_lenet5_takes_images_of_any_size_from_4x4(shape):
    assert build_model("lenet5", shape, 7, width=0.5)(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg11_has_torchvisions_features(batch_norm):
    def layers(model):
        return [(type(layer).__name__, {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()})
                for layer in model if not isinstance(layer, (nn.Flatten, nn.Linear))]

    with torch.device("meta"):
        theirs = getattr(torchvision.models, "vgg11_bn" if batch_norm else "vgg11")(weights=None).features
    model = build_model("vgg11", (3, 32, 32), 10, batch_norm=batch_norm)
    assert layers(model) == layers(theirs)
    assert model.head.in_features == 512


@pytest.mark.parametrize("shape, features", [((3, 32, 32), 26), ((1, 64, 96), 26 * 6)])
def test_vgg11_takes_larger_images(shape, features):
    model = build_model("vgg11", shape, 5, width=0.05)
    assert model(torch.zeros(2, *shape)).shape == (2, 5) and model.head.in_features == features


@pytest.mark.parametrize("name, shape", [
    ("mlp", (1, 8, 8)), ("lenet5", (1, 8, 8)), ("vgg11", (3, 32, 32)), ("resnet20", (1, 8, 8)),
    ("resnet18", (3, 32, 32)), ("resnet18_cifar", (3, 8, 8)), ("densenet121", (3, 32, 32)),
    ("densenet169_cifar", (1, 8, 8)), ("vit_b_16", (1, 16, 16)), ("vit", (1, 8, 8)),
    ("tiny_vit_5m", (3, 32, 32))])
def test_the_seed_decides_and_the_global_random_state_stays(name, shape):
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    one, same, other = (build_model(name, shape, 10, width=0.1, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    drawn = [key for key in one if len(one[key].unique()) > 1]  # norms start constant
    assert drawn and not any(torch.equal(one[key], other[key]) for key in drawn)


@pytest.mark.parametrize("arguments, options, message", [
    (("resnet", (1, 8, 8), 10), {}, "unknown model 'resnet': expected one of mlp, lenet5, vgg11, resnet8"),
    (("mlp", (1, 8, 8), 10), {"heads": 2}, "mlp has no option 'heads': expected one of width, depth"),
    (("lenet5", (1, 8, 8), 10), {"depth": 2}, "lenet5 has no option 'depth'"),
    (("mlp", (64,), 10), {}, "input_shape is (64,): expected (channels, height, width) of images for mlp"),
    (("bert", (3, 32, 32), 2), {}, "input_shape is (3, 32, 32): expected (length,) of texts for bert"),
    (("distilbert", (0,), 2), {}, "input_shape is (0,): expected (length,)"),
    (("mlp", (1, 0, 8), 10), {}, "input_shape is (1, 0, 8)"), (("mlp", (1, 8, 8), 1), {}, "classes is 1"),
    (("mlp", (1, 8, 8), 2.5), {}, "classes is 2.5"), (("mlp", (1, 8, 8), 10), {"width": 0}, "width is 0"),
    (("mlp", (1, 8, 8), 10), {"width": "2"}, "width is '2'"),
    (("mlp", (1, 8, 8), 10), {"width": float("nan")}, "width is nan"),
    (("mlp", (1, 8, 8), 10), {"width": float("inf")}, "width is inf"),
    (("mlp", (1, 8, 8), 10), {"depth": 0}, "depth is 0"), (("mlp", (1, 8, 8), 10), {"depth": 1.5}, "depth is 1.5"),
    (("lenet5", (1, 3, 3), 10), {}, "lenet5 needs images of at least 4x4"),
    (("vgg11", (1, 28, 28), 10), {}, "needs at least 32x32"),
])
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(*arguments, **options)


def test_networks_of_other_libraries_reach_a_new_process(tmp_path):
    """Which need not know how torchvision is to be imported: fit sends networks to the processes that it starts."""
    shape = (3, 32, 32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 12, "num_hidden_layers": 1}))
    names = "resnet18", "densenet121", "vit_b_16", "tiny_vit_5m"
    models = [build_model(name, shape, 4, width=0.05) for name in names]
    models.append(build_model("bert", (8,), 4, source=tmp_path, pretrained=False))
    code = "import pickle, sys; [print(model.eval()(x).tolist()) for model, x in pickle.load(open(sys.argv[1], 'rb'))]"
    inputs = [torch.randn(1, *shape)] * 4 + [torch.arange(8)[None]]
    with evaluation_mode(*models):
        outputs = [str(model(x).tolist()) for model, x in zip(models, inputs)]
    (tmp_path / "models").write_bytes(pickle.dumps(list(zip(models, inputs))))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "models"], capture_output=True, text=True,
                          cwd=Path(permask_core.__file__).parent.parent)
    assert done.stdout.splitlines() == outputs, done.stderr


def test_evaluating_restores_every_modules_mode_after_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1][0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
