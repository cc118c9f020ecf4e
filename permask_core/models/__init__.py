"""Networks by name, small enough to read, with readable tensor names and a seed for their initialisation."""

import inspect
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from numbers import Integral

# Names, and the modules that have a function of that name, which are loaded when they are asked for.
MODELS = {
    "mlp": "feedforward", "lenet5": "feedforward", "vgg11": "feedforward",
    "resnet8": "residual", "resnet20": "residual", "resnet56": "residual", "resnet18": "residual",
    "resnet18_cifar": "residual", "resnet50": "residual",
    "densenet121": "densenet", "densenet121_cifar": "densenet", "densenet169": "densenet",
    "densenet169_cifar": "densenet",
    "vit_b_16": "transformer", "tiny_vit_5m": "transformer", "bert": "language", "distilbert": "language"}
OF_TEXTS = ("bert", "distilbert")

__all__ = ["MODELS", "build_model", "check_model_options", "device_of", "evaluation_mode", "module_of"]


def module_of(name):
    """The name of the module that has a network; ValueError if there is no such network."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return f"{__name__}.{MODELS[name]}"


def build_model(name, input_shape, classes, *, seed=0, **options):
    """A freshly initialised network.

    Parameters
    ----------
    name : str
        One of mlp, lenet5, vgg11, resnet8, resnet20, resnet56, resnet18, resnet18_cifar, resnet50, densenet121,
        densenet121_cifar, densenet169, densenet169_cifar, vit_b_16, tiny_vit_5m, bert, distilbert.
    input_shape : tuple of int
        Shape of one input: (channels, height, width) of an image; (length,) of a text for bert and distilbert.
    classes : int
        Number of outputs.
    seed : int
        Of the initialisation; the global random state is left alone.
    **options
        What the network itself takes: ``width`` (a factor on all hidden widths, in vit_b_16 and tiny_vit_5m on the
        number of heads; not for texts), ``depth`` (mlp), ``batch_norm`` (vgg11), ``shortcut`` (resnet8, resnet20,
        resnet56), ``source``, ``pretrained`` and ``download`` (bert, distilbert).

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If the name or an option is unknown, or the inputs do not fit the network.
    ImportError
        If the network comes from a library that is not installed.
    FileNotFoundError
        If the files of a text classifier are not there.

    Examples
    --------
    >>> model = build_model("mlp", (1, 8, 8), 10, width=0.5)
    >>> list(model.state_dict())
    ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias', 'head.weight', 'head.bias']
    """
    build = check_model_options(name, options)
    axes, expected = (1, "(length,) of texts") if name in OF_TEXTS else (3, "(channels, height, width) of images")
    if len(input_shape) != axes or min(input_shape) < 1:
        raise ValueError(f"input_shape is {tuple(input_shape)}: expected {expected}, as {name} takes them")
    if not isinstance(classes, Integral) or classes < 2:
        raise ValueError(f"classes is {classes!r}: expected an integer of at least 2")
    import torch  # here: who asks for names alone need not wait for it

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(tuple(input_shape), classes, **options)


def check_model_options(name, options):
    """The function that builds a network; ValueError unless there is one of that name and it takes these options."""
    build = getattr(import_module(module_of(name)), name)
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: expected one of {', '.join(known)}")
    return build


def device_of(model):
    """Where a model's first tensor is."""
    import torch

    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


@contextmanager
def evaluation_mode(*models):
    """The models in evaluation mode, without gradients; every module's own mode comes back afterwards."""
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
