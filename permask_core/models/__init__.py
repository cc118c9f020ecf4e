"""Networks by name, with short code, readable tensor names and a seed for their initialisation."""

import inspect
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from numbers import Integral

# Name -> the module that has a function of that name; a module is imported when its network is first built.
MODELS = {
    "mlp": "feedforward", "lenet5": "feedforward", "vgg11": "feedforward",
    "resnet8": "residual", "resnet20": "residual", "resnet56": "residual", "resnet18": "residual",
    "resnet18_cifar": "residual", "resnet50": "residual",
    "densenet121": "densenet", "densenet121_cifar": "densenet", "densenet169": "densenet",
    "densenet169_cifar": "densenet",
    "vit_b_16": "transformer", "vit": "transformer", "tiny_vit_5m": "transformer",
    "bert": "language", "distilbert": "language", "gpt": "gpt", "moe": "moe"}
OF_TEXTS = ("bert", "distilbert", "gpt", "moe")

__all__ = ["MODELS", "build_model", "check_model_options", "device_of", "evaluation_mode", "module_of"]


def module_of(name):
    """Return the name of the module that defines a network; raise ValueError if there is no such network."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return f"{__name__}.{MODELS[name]}"


def build_model(name, input_shape, classes, *, seed=0, **options):
    """Build a newly initialised network.

    Parameters
    ----------
    name : str
        One of mlp, lenet5, vgg11, resnet8, resnet20, resnet56, resnet18, resnet18_cifar, resnet50, densenet121,
        densenet121_cifar, densenet169, densenet169_cifar, vit_b_16, vit, tiny_vit_5m, bert, distilbert, gpt, moe.
    input_shape : tuple of int
        Shape of one input: (channels, height, width) of an image; (length,) of a text for bert, distilbert, gpt
        and moe.
    classes : int
        Number of outputs.
    seed : int
        Seed of the initialisation. The global random state does not change.
    **options
        Options of the network: ``width`` (a factor on all hidden widths, or on the number of heads in vit_b_16, vit,
        tiny_vit_5m, gpt and moe; not in bert and distilbert), ``depth`` (mlp), ``batch_norm`` (vgg11), ``shortcut``
        (resnet8, resnet20, resnet56), ``source``, ``pretrained`` and ``download`` (bert, distilbert), ``layers``,
        ``experts``, ``top_k``, ``units`` and ``gated`` (moe).

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If the name or an option is unknown, or the network does not support the input shape.
    ImportError
        If the network comes from a library that is not installed.
    FileNotFoundError
        If the files of a text classifier are missing.

    Examples
    --------
    >>> model = build_model("mlp", (1, 8, 8), 10, width=0.5)
    >>> list(model.state_dict())
    ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias', 'head.weight', 'head.bias']
    """
    build = check_model_options(name, options)
    axes, expected = (1, "(length,) of texts") if name in OF_TEXTS else (3, "(channels, height, width) of images")
    if len(input_shape) != axes or min(input_shape) < 1:
        raise ValueError(f"input_shape is {tuple(input_shape)}: expected {expected} for {name}")
    if not isinstance(classes, Integral) or classes < 2:
        raise ValueError(f"classes is {classes!r}: expected an integer of at least 2")
    import torch  # here: the names of networks are available without it

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(tuple(input_shape), classes, **options)


def check_model_options(name, options):
    """Return the function that builds a network; raise ValueError if the name or one of the options is unknown."""
    build = getattr(import_module(module_of(name)), name)
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: expected one of {', '.join(known)}")
    return build


def device_of(model):
    """Return the device of a model's first tensor."""
    import torch

    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


@contextmanager
def evaluation_mode(*models):
    """Put models into evaluation mode, without gradients; the mode of every module is restored afterwards."""
    import torch

    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
