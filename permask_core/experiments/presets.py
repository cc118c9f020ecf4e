"""Settings by name: the published experiments, and stand-ins for them that run in minutes without a download.

This module has only plain data and no slow imports, so that a notebook rejects an unknown name immediately. Each module
of an experiment has its part as ``PRESETS``, and a function ``preset`` that makes an ``Experiment`` from it; settings
that are not listed here have the defaults of that class. Comments mark settings that the sources do not give and we
chose.
"""

from typing import NamedTuple

from permask_core.runs.checks import check_one_of


class Preset(NamedTuple):
    """The ``settings`` of an experiment, its ``grid`` of values, and the name of the published results that it
    ``reproduces``, if any."""

    settings: dict
    grid: dict = {}
    reproduces: str | None = None

    def change_grid(self, **changes):
        """Return the grid with changes; values of None are ignored."""
        for name in changes:
            check_one_of("value of the grid", name, self.grid)
        return self.grid | {name: value for name, value in changes.items() if value is not None}


# ---- Permuted masks --------------------------------------------------------------------------------------------------
# Adnan et al., ICML 2025 (arXiv 2505.05143), and their public code; Lasby et al., ICLR 2024 (arXiv 2305.02299), for
# ResNet18 and ViT-B/16.

_SPARSITIES = (0.8, 0.9, 0.95, 0.97)
_REWINDS = (0, 5, 10, 15, 20, 25, 50, 75, 100)


def _grid(widths, rewinds, seeds, sparsities, matchings=("activations",)):
    return {"widths": widths, "rewinds": rewinds, "seeds": seeds, "sparsities": sparsities, "matchings": matchings}


_CIFAR = {
    "dataset": "cifar10", "model": "resnet20", "epochs": 200, "lr": 0.08, "sparse_lr": 0.02, "momentum": 0.9,
    "weight_decay": 5e-4, "batch_size": 128, "checkpoints": _REWINDS, "rewind": 0, "matched_at": 200,
    # The authors' code prunes and fine-tunes; the separate cosine schedule of each round is our choice.
    "imp": "finetune", "imp_rewind": 0, "imp_epochs": 50, "imp_lr": 0.01, "imp_rate": 0.2}

# Six epochs, because an epoch of 60,000 images takes seconds to minutes of one core. Learning rates and rewind points
# were chosen by benchmarks/fashion_mnist_settings.py, those of ResNet8 without a search.
_FASHION = {
    "dataset": "fashion_mnist", "epochs": 6, "lr": 0.1, "sparse_lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
    "batch_size": 128, "checkpoints": (0, 1, 2, 3), "rewind": 1, "matched_at": 6, "imp": "rewind", "imp_rewind": 1,
    "imp_epochs": 5, "imp_lr": 0.1, "imp_rate": 0.5}
_FASHION_SPARSITIES = (0.8, 0.9, 0.95, 0.97)

_IMAGENET = {  # bf16 and the learning rate of the sparse runs are our choice
    "dataset": "imagenet", "model": "resnet50", "epochs": 90, "lr": 0.04, "sparse_lr": 0.04, "momentum": 0.9,
    "weight_decay": 1e-4, "batch_size": 256, "schedule": "step", "step_epochs": 31, "precision": "bf16",
    "checkpoints": (0, 10, 25, 50), "rewind": 0, "matched_at": 90,
    "imp": "finetune", "imp_rewind": 0, "imp_epochs": 20, "imp_lr": 0.002, "imp_rate": 0.2}

PERMUTED_MASKS = {
    # Digits are too easy: without noise all methods are equal on a convolutional network. Three channels as in CIFAR.
    "digits": Preset(
        {"dataset": "digits", "options": {"noise": 1.0, "copies": 5, "channels": 3}, "model": "resnet8", "width": 0.5,
         "epochs": 12, "lr": 0.1, "sparse_lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128,
         "checkpoints": (0, 2), "rewind": 2, "matched_at": 12, "imp": "rewind", "imp_rewind": 2, "imp_epochs": 10,
         "imp_lr": 0.1, "imp_rate": 0.35}, _grid((0.5,), (2,), 3, (0.9, 0.985))),
    "digits-mlp": Preset(
        {"dataset": "digits", "model": "mlp", "epochs": 20, "lr": 0.1, "sparse_lr": 0.05,
         "checkpoints": (0, 1, 2, 5, 10), "rewind": 2, "matched_at": 20, "imp": "rewind", "imp_rewind": 2,
         "imp_epochs": 18, "imp_lr": 0.1, "imp_rate": 0.2}, _grid((1,), (2,), 3, (0.9, 0.97))),
    # Five noisy copies of each test image reduce the variance enough to show differences between methods.
    "noisy-digits-mlp": Preset(
        {"dataset": "digits", "options": {"noise": 1.0, "copies": 5}, "model": "mlp", "epochs": 12, "lr": 0.1,
         "sparse_lr": 0.05, "checkpoints": (0, 1, 2, 4, 8), "rewind": 2, "matched_at": 12, "imp": "rewind",
         "imp_rewind": 2, "imp_epochs": 6, "imp_lr": 0.1, "imp_rate": 0.5}, _grid((1,), (2,), 3, (0.9, 0.97))),
    "noisy-digits-mlp-long": Preset(
        {"dataset": "digits", "options": {"noise": 1.0, "copies": 5}, "model": "mlp", "epochs": 20, "lr": 0.1,
         "sparse_lr": 0.05, "checkpoints": (0, 2), "rewind": 2, "matched_at": 20, "imp": "rewind", "imp_rewind": 2,
         "imp_epochs": 10, "imp_lr": 0.1, "imp_rate": 0.35}, _grid((1,), (2,), 3, (0.9, 0.97))),
    # All stages of ImageNet's experiment in seconds; there are too few data for conclusions about the methods.
    "trifeature": Preset(
        {"dataset": "trifeature", "options": {"n_train": 500, "n_test": 500, "label": "colour"}, "model": "resnet18",
         "width": 0.125, "epochs": 6, "lr": 0.04, "sparse_lr": 0.04, "momentum": 0.9, "weight_decay": 1e-4,
         "batch_size": 32, "schedule": "step", "step_epochs": 3, "checkpoints": (0, 2), "rewind": 2, "matched_at": 6,
         "imp": "finetune", "imp_rewind": 0, "imp_epochs": 1, "imp_lr": 0.004, "imp_rate": 0.35},
        _grid((0.125,), (2,), 1, (0.9,), ("weights", "activations"))),
    # In half of the training images the colour goes with the shape that is to be named.
    "trifeature-lenet5": Preset(
        {"dataset": "trifeature", "options": {"n_train": 3000, "n_test": 5000, "image_size": 24, "label": "shape",
                                              "correlated": "colour", "match": 0.5, "augment": False},
         "model": "lenet5", "epochs": 10, "lr": 0.003, "sparse_lr": 0.003, "optimizer": "adamw", "weight_decay": 0.01,
         "batch_size": 64, "checkpoints": (0, 2), "rewind": 2, "matched_at": 10, "imp": "rewind", "imp_rewind": 2,
         "imp_epochs": 4, "imp_lr": 0.003, "imp_rate": 0.5}, _grid((1,), (2,), 3, (0.9,))),
    # Real images. LeNet5 was designed for images of 32x32 pixels.
    "fashion_mnist-mlp": Preset(
        _FASHION | {"model": "mlp", "width": 2.0, "rewind": 0, "imp_rewind": 0, "imp_epochs": 6},
        _grid((2, 1, 0.5, 0.25), (0,), 10, (*_FASHION_SPARSITIES, 0.98, 0.99, 0.995), ("weights", "activations"))),
    "fashion_mnist-lenet5": Preset(
        _FASHION | {"model": "lenet5", "options": {"size": 32}, "lr": 0.05, "imp_lr": 0.05, "sparse_lr": 0.025,
                    "imp_rate": 0.35}, _grid((1,), (1,), 10, (*_FASHION_SPARSITIES, 0.99), ("weights", "activations"))),
    "fashion_mnist-resnet8": Preset(_FASHION | {"model": "resnet8", "width": 0.5}, _grid(
        (0.5,), (1,), 5, _FASHION_SPARSITIES, ("weights", "activations"))),
    # A part of the images and a small transformer, so that a pair takes minutes of one core. The learning rate was
    # chosen by the dense accuracy of seed 0, which is not reported; the rewind point is that of the other networks.
    "fashion_mnist-vit": Preset(
        {"dataset": "fashion_mnist", "options": {"n_train": 12_000}, "model": "vit", "epochs": 5, "lr": 0.004,
         "sparse_lr": 0.004, "optimizer": "adamw", "weight_decay": 0.01, "batch_size": 64, "warmup": 0.5,
         "checkpoints": (0, 1), "rewind": 1, "matched_at": 5, "imp": "rewind", "imp_rewind": 1, "imp_epochs": 4,
         "imp_lr": 0.004, "imp_rate": 0.65}, _grid((1,), (1,), 5, (0.9, 0.95), ("weights", "activations"))),
    # A small language model. The learning rate was chosen in the same way: 57.0 % with 0.003, 58.6 % with 0.01.
    "python_source-gpt": Preset(
        {"dataset": "python_source", "options": {"length": 32}, "model": "gpt", "epochs": 5, "lr": 0.01,
         "sparse_lr": 0.01, "optimizer": "adamw", "weight_decay": 0.01, "batch_size": 64, "warmup": 0.5,
         "checkpoints": (0, 1), "rewind": 1, "matched_at": 5, "imp": "rewind", "imp_rewind": 1, "imp_epochs": 4,
         "imp_lr": 0.01, "imp_rate": 0.65}, _grid((1,), (1,), 5, (0.9, 0.95), ("weights", "activations"))),
    # The size and shape of CIFAR without its files: ten epochs instead of 200, so that the experiment takes minutes on
    # a GPU. The noise was chosen with three dense networks (float32, seed 0): test accuracy 94.9 % after ten epochs
    # with noise 1.5; after three, 61.1 % with 2.5 and 35.8 % with 3.5.
    "trifeature-resnet20": Preset(
        {"dataset": "trifeature", "options": {"n_train": 50_000, "n_test": 10_000, "noise": 2.5}, "model": "resnet20",
         "epochs": 10, "lr": 0.1, "sparse_lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128,
         "precision": "bf16", "checkpoints": (0, 1), "rewind": 0, "matched_at": 10, "imp": "rewind", "imp_rewind": 1,
         "imp_epochs": 9, "imp_lr": 0.1, "imp_rate": 0.35}, _grid((1,), (0, 1), 3, (0.9, 0.97))),
    "cifar10-resnet20": Preset(_CIFAR, _grid((1, 4, 8, 16), _REWINDS, 3, _SPARSITIES), "ResNet20/CIFAR-10"),
    "cifar100-resnet20": Preset(_CIFAR | {"dataset": "cifar100"}, _grid((1, 4, 8, 16), _REWINDS, 3, _SPARSITIES),
                                "ResNet20/CIFAR-100"),
    # The sources have no settings for VGG11, so those of ResNet20 are used.
    "cifar10-vgg11": Preset(_CIFAR | {"model": "vgg11"}, _grid((1,), _REWINDS, 3, (0.8, 0.9)), "VGG11/CIFAR-10"),
    "imagenet-resnet50": Preset(_IMAGENET, _grid((1,), (0, 10, 25, 50), 1, _SPARSITIES)),
    # Lasby et al. do not train under a given mask; the dense settings are theirs, all others those of ResNet20.
    "cifar10-resnet18": Preset(
        _CIFAR | {"model": "resnet18_cifar", "epochs": 250, "lr": 0.1, "sparse_lr": 0.025, "checkpoints": (0, 25),
                  "rewind": 25, "matched_at": 250}, _grid((1,), (25,), 3, (0.8, 0.9, 0.95, 0.99))),
    # torchvision's reference recipe without its image augmentations, which is close to theirs.
    "imagenet-vit_b_16": Preset(
        _IMAGENET | {"model": "vit_b_16", "epochs": 300, "optimizer": "adamw", "lr": 0.003, "sparse_lr": 0.003,
                     "weight_decay": 0.3, "batch_size": 4096, "accumulate": 16, "schedule": "cosine", "warmup": 30,
                     "label_smoothing": 0.11, "checkpoints": (0, 30), "rewind": 30, "matched_at": 300,
                     "imp_epochs": 60}, _grid((1,), (30,), 1, (0.8, 0.9), ("weights",))),
}


# ---- Distilled students ----------------------------------------------------------------------------------------------
# Mohammadshahi and Ioannou, TMLR 2025 (arXiv 2410.08407), give networks, data sets, temperatures and alpha; epochs
# and learning rates are our choice.

def _pair(dataset, teacher, student, recipe, **more):
    return Preset({"dataset": dataset, "teacher": teacher, "teacher_recipe": recipe, "student": student,
                   "student_recipe": recipe, **more})


_SMALL_IMAGES = {"epochs": 200}

DISTILLED_STUDENTS = {
    "digits": _pair("digits", "mlp", "mlp", {"epochs": 12, "lr": 0.05}, options={"noise": 1.0, "copies": 5},
                    student_options={"width": 0.125}),
    # In half of the training images the colour goes with the shape that is to be named.
    "trifeature": _pair(
        "trifeature", "lenet5", "lenet5",
        {"epochs": 8, "lr": 0.003, "batch_size": 64, "weight_decay": 0.01, "optimizer": "adamw"},
        options={"n_train": 2000, "n_test": 5000, "image_size": 16, "label": "shape", "correlated": "colour",
                 "match": 0.5, "augment": False}, teacher_options={"width": 2.0}, student_options={"width": 0.5}),
    # Chosen on seed 0, which is not reported: with SGD, students at high temperatures learn slowly or diverge.
    "fashion_mnist": _pair(
        "fashion_mnist", "resnet8", "lenet5", {"epochs": 6, "lr": 0.05}, options={"size": 32},
        teacher_options={"width": 0.5},
        student_recipe={"epochs": 6, "lr": 0.003, "optimizer": "adamw", "weight_decay": 0.01}),
    "svhn": _pair("svhn", "resnet56", "resnet20", _SMALL_IMAGES),
    "cifar10": _pair("cifar10", "resnet56", "resnet20", _SMALL_IMAGES),
    "cifar100": _pair("cifar100", "resnet56", "resnet20", _SMALL_IMAGES),
    "cifar100-densenet": _pair("cifar100", "densenet169_cifar", "densenet121_cifar", _SMALL_IMAGES),
    "tiny_imagenet": _pair("tiny_imagenet", "resnet50", "resnet18", _SMALL_IMAGES),
    "imagenet": _pair("imagenet", "resnet50", "resnet18", {
        "epochs": 90, "weight_decay": 1e-4, "batch_size": 256, "schedule": "step", "precision": "bf16"}),
    "imagenet-vit": _pair("imagenet", "vit_b_16", "tiny_vit_5m", {
        "epochs": 300, "lr": 0.003, "weight_decay": 0.3, "batch_size": 4096, "accumulate": 16, "warmup": 30,
        "optimizer": "adamw", "precision": "bf16"}),
    "celeba": _pair("celeba", "resnet50", "resnet18", {"epochs": 10, "lr": 0.05, "precision": "bf16"}),
    "hatexplain": _pair("hatexplain", "bert", "distilbert", {
        "epochs": 5, "lr": 3e-5, "weight_decay": 0.01, "batch_size": 32, "warmup": 0.5, "optimizer": "adamw",
        "precision": "bf16"}),
}


# ---- Dynamic sparsity ------------------------------------------------------------------------------------------------
# Lasby et al., ICLR 2024, and their public code.

# Their code divides the learning rate by five every 77 epochs; here it follows a cosine.
_DST_CIFAR = {"dataset": "cifar10", "model": "resnet18_cifar", "recipe": {"epochs": 250, "lr": 0.1}}

DYNAMIC_SPARSITY = {
    # A stand-in that runs in seconds. With noise, because clean digits tolerate any mask.
    "digits": Preset({"dataset": "digits", "options": {"noise": 1.0, "copies": 5}, "every": 20,
                      "recipe": {"epochs": 14, "batch_size": 64}}, {"seeds": 3, "sparsities": (0.95, 0.98)}),
    "cifar10-resnet18": Preset(_DST_CIFAR, {"seeds": 5, "sparsities": (0.8, 0.9, 0.95, 0.99)}, "ResNet18/CIFAR-10"),
    # Neither settings nor results are published for CIFAR-100: these are the settings of CIFAR-10.
    "cifar100-resnet18": Preset(_DST_CIFAR | {"dataset": "cifar100"},
                                {"seeds": 5, "sparsities": (0.8, 0.9, 0.95, 0.99)}),
    # The networks of the permuted masks on real images, with as many epochs for each method.
    "fashion_mnist-mlp": Preset(
        {"dataset": "fashion_mnist", "model": "mlp", "width": 2.0, "recipe": {"epochs": 6, "lr": 0.1}},
        {"seeds": 5, "sparsities": (0.9, 0.95, 0.98, 0.99)}),
    "fashion_mnist-lenet5": Preset(
        {"dataset": "fashion_mnist", "options": {"size": 32}, "model": "lenet5", "recipe": {"epochs": 6, "lr": 0.05}},
        {"seeds": 5, "sparsities": (0.9, 0.95, 0.98, 0.99)}),
    # Four parts of a batch, because theirs is on four GPUs with separate BatchNorms. Their learning rate is divided by
    # ten at epochs 30, 70 and 90; their growth uses the gradients of eight batches, ours those of one.
    "imagenet-resnet50": Preset(
        {"dataset": "imagenet", "model": "resnet50", "every": 800, "unmasked": ("conv1.weight",), "recipe": {
            "epochs": 103, "lr": 0.2, "weight_decay": 1e-4, "batch_size": 512, "accumulate": 4, "schedule": "step",
            "step_epochs": 30, "warmup": 5, "label_smoothing": 0.1, "precision": "bf16"}},
        {"seeds": 1, "sparsities": (0.8, 0.9, 0.95, 0.99)}, "ResNet50/ImageNet"),
    # Epochs, decay, warm-up and smoothing are those of their code, without its gradient clipping and without
    # torchvision's augmentations. The input projections of attention are dense: see
    # permask_core.models.transformer.vit_b_16.
    "imagenet-vit_b_16": Preset(
        {"dataset": "imagenet", "model": "vit_b_16", "distribution": "uniform", "min_salient": 0.95, "recipe": {
            "epochs": 150, "lr": 0.003, "weight_decay": 0.3, "batch_size": 4096, "accumulate": 16, "warmup": 16,
            "label_smoothing": 0.11, "optimizer": "adamw", "precision": "bf16"}},
        {"seeds": 1, "sparsities": (0.8, 0.9)}, "ViT-B/16/ImageNet"),
}


# ---- Extreme labels --------------------------------------------------------------------------------------------------
# Ullah et al., NeurIPS 2024. Their encoder is a BERT with 768 outputs, which is trained too. Here it is replaced by an
# embedding of bags of words of the same width, so this is not the published experiment, and precisions are not
# comparable. The labels, inputs and fan-in of the output layer, the intermediate layer and the end of rewiring are
# published, and a range of how often (every 300 to 1500 steps) and how many (15 to 25 % of a row) connections move.
# Epochs, batches and the learning rate are our choice.

_PLANTED = {"features": 128, "hidden": 128, "fan_in": 16,
            "recipe": {"epochs": 8, "rewire_every": 100, "auxiliary": 0.4, "auxiliary_epochs": 4}}
_TEXTS = {"hidden": 768, "fan_in": 128, "recipe": {"epochs": 30, "rewire_every": 300, "drop": 0.2, "auxiliary": 0.0,
                                                   "auxiliary_epochs": 5}}

EXTREME_LABELS = {
    "planted": Preset({}),
    "planted-10k": Preset({"labels": 10_000, "points": 30_000, "clusters": 100, **_PLANTED}),
    "planted-100k": Preset({"labels": 100_000, "points": 200_000, "clusters": 300, **_PLANTED}),
    "planted-1m": Preset({"labels": 1_000_000, "points": 400_000, "clusters": 1000, **_PLANTED}),
    "wiki31k": Preset({"dataset": "wiki31k", "labels": 30_938, "intermediate": 4096, **_TEXTS, "fan_in": 64}),
    "amazon-670k": Preset({"dataset": "amazon-670k", "labels": 670_091, **_TEXTS}),
    "amazon-3m": Preset({"dataset": "amazon-3m", "labels": 2_812_281, **_TEXTS}),
}
