"""The distillation loss against its closed form and its limit, and training with a teacher that must not change."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import nn

from permask_core.data.splits import Split
from permask_core.models import build_model
from permask_core.training import Recipe, evaluate, fit, predict
from permask_core.training.distillation import Distillation, TeacherSplit, distil, distillation_loss

RECIPE = Recipe(epochs=2, lr=0.1, batch_size=100)


def drawn(n=7, classes=5, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (n,), generator=generator)


def by_numpy(student, teacher, labels, temperature, alpha, scale_by_t2):
    q, p = (log_softmax(logits.numpy() / temperature, axis=1) for logits in (student, teacher))
    divergence = (np.exp(p) * (p - q)).sum(1).mean()
    entropy = -log_softmax(student.numpy(), axis=1)[np.arange(len(labels)), labels.numpy()].mean()
    return alpha * (temperature ** 2 if scale_by_t2 else 1) * divergence + (1 - alpha) * entropy


@given(st.integers(1, 20), st.integers(2, 12), st.floats(0.1, 50), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_the_loss_is_its_formula(n, classes, temperature, alpha, scale_by_t2, seed):
    student, teacher, labels = drawn(n, classes, seed)
    settings = {"temperature": temperature, "alpha": alpha, "scale_by_t2": scale_by_t2}
    found = distillation_loss(student, teacher, labels, **settings).item()
    assert found == pytest.approx(by_numpy(student, teacher, labels, **settings), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_its_formula(temperature):
    """Of the teacher's part, T (softmax of the student's - softmax of the teacher's) / n, both at T."""
    student, teacher, labels = drawn()
    student.requires_grad_(), teacher.requires_grad_()
    distillation_loss(student, teacher, labels, temperature=temperature, alpha=1).backward()
    softmaxes = [(logits.detach() / temperature).softmax(1) for logits in (student, teacher)]
    assert torch.allclose(student.grad, temperature * (softmaxes[0] - softmaxes[1]) / len(labels), atol=1e-12)
    assert teacher.grad is None
    assert torch.autograd.gradcheck(
        lambda logits: distillation_loss(logits, teacher, labels, temperature=temperature), student)


def test_at_high_temperatures_centred_logits_are_matched():
    """With an error that falls like 1 / T."""
    student, teacher, labels = drawn(9, 6)
    limit = (student - teacher - (student - teacher).mean(1, keepdim=True)) / student.numel()
    errors = []
    for temperature in (1e2, 1e3, 1e4):
        logits = student.clone().requires_grad_()
        distillation_loss(logits, teacher, labels, temperature=temperature, alpha=1).backward()
        errors.append((logits.grad - limit).abs().max().item() / limit.abs().max().item())
    assert errors[0] < 0.1
    assert [errors[i] / errors[i + 1] for i in range(2)] == pytest.approx([10, 10], rel=0.05)


def test_a_logit_more_for_all_classes_and_the_teacher_itself():
    student, teacher, labels = drawn()
    loss = distillation_loss(student, teacher, labels, temperature=3)
    assert distillation_loss(student + 5, teacher - 7, labels, temperature=3).item() == pytest.approx(loss.item())
    assert distillation_loss(teacher, teacher, labels, temperature=3, alpha=1).item() == pytest.approx(0, abs=1e-15)
    assert distillation_loss(student, teacher, labels, temperature=3, alpha=0).item() == pytest.approx(
        nn.functional.cross_entropy(student, labels).item())


@pytest.mark.parametrize("change, message", [
    ({"temperature": 0}, "temperature is 0: expected a number above 0"), ({"temperature": -1}, "temperature is -1"),
    ({"temperature": math.nan}, "temperature is nan"), ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": "4"}, "temperature is '4'"), ({"temperature": None}, "temperature is None"),
    ({"alpha": 1.1}, "alpha is 1.1: expected a number from 0 to 1"), ({"alpha": -0.1}, "alpha is -0.1"),
    ({"alpha": math.nan}, "alpha is nan"), ({"scale_by_t2": 1}, "scale_by_t2 is 1: expected True or False"),
    ({"labels": torch.zeros(6, dtype=torch.int64)}, "labels are torch.int64 [6]: expected int64 [7]"),
    ({"labels": torch.zeros(7)}, "labels are torch.float32 [7]"),
    ({"labels": torch.arange(7)}, "labels has 5: expected 0 to 4"),
    ({"teacher_logits": torch.zeros(7, 6)}, "student_logits are [7, 5] and teacher_logits [7, 6]"),
    ({"student_logits": torch.zeros(7)}, "student_logits are [7]: expected [n, classes]"),
    ({"teacher_logits": torch.full((7, 5), math.nan)}, "teacher_logits[0, 0] is nan: expected finite logits"),
    ({"student_logits": torch.tensor([0.0] * 34 + [-math.inf]).view(7, 5)}, "student_logits[6, 4] is -inf"),
])
def test_what_has_no_loss_is_refused(change, message):
    student, teacher, labels = drawn()
    given = {"student_logits": student, "teacher_logits": teacher, "labels": labels, "temperature": 2.0, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        distillation_loss(given.pop("student_logits"), given.pop("teacher_logits"), given.pop("labels"), **given)


def bytes_of(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def with_batchnorm(seed, width):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3),
                             nn.Linear(width, 10))


@pytest.fixture(scope="module")
def teacher(digits):
    model = with_batchnorm(0, 64)
    fit(model, digits.train, Recipe(epochs=5, batch_size=100), seed=0, description=None)
    return model


@pytest.fixture
def pictures(digits):
    x = digits.train.x - digits.train.x.min()
    return Split((255 * x / x.max()).byte(), digits.train.y, (0.3,), (0.4,), pad=1, flip=True)


def by_hand(student, teacher, train, temperature, seed):
    """The loop written out, with both networks on the batches of the epoch; the teacher in evaluation mode."""
    teacher.eval()
    order, velocity = torch.Generator().manual_seed(seed), {}
    steps = RECIPE.epochs * math.ceil(len(train) / RECIPE.batch_size)
    step = 0
    for epoch in range(RECIPE.epochs):
        chosen = torch.randperm(len(train), generator=order).split(RECIPE.batch_size)
        for x, y in train.batches(chosen, augmented=(seed, epoch)):
            lr = RECIPE.lr * (1 + math.cos(math.pi * step / steps)) / 2
            p, q = (teacher(x).detach() / temperature).softmax(1), (student(x) / temperature).log_softmax(1)
            divergence = (p * (p.log() - q)).sum(1).mean()
            loss = 0.8 * temperature ** 2 * divergence + 0.2 * nn.functional.cross_entropy(student(x), y)
            student.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, weight in student.named_parameters():
                    velocity[name] = 0.9 * velocity.get(name, 0) + weight.grad + RECIPE.weight_decay * weight
                    weight -= lr * velocity[name]
            step += 1


@pytest.mark.parametrize("augmented", [False, True])
def test_a_student_is_trained_by_the_loop_written_out(digits, pictures, teacher, augmented):
    train = pictures if augmented else digits.train
    one, other = (build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3) for _ in range(2))
    distil(one, teacher, train, RECIPE, seed=4, temperature=3, description=None)
    by_hand(other, teacher, train, 3, 4)
    teacher.train()
    for name, weight in one.named_parameters():
        assert torch.allclose(weight, other.state_dict()[name], atol=2e-5), name


@pytest.mark.parametrize("augmented", [False, True])
def test_the_teacher_stays_what_it_is_to_the_bit(digits, pictures, teacher, augmented):
    teacher.train()
    teacher.zero_grad()
    before = bytes_of(teacher)
    distil(build_model("mlp", (1, 8, 8), 10, width=0.1), teacher, pictures if augmented else digits.train, RECIPE,
           seed=0, temperature=4, description=None)
    assert bytes_of(teacher) == before
    assert teacher.training and all(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_stored_logits_are_the_teacher(digits, teacher):
    logits = predict(teacher, digits.train)
    states = [distil(build_model("mlp", (1, 8, 8), 10, width=0.1, seed=1), one, digits.train, RECIPE, seed=0,
                     temperature=t, description=None).state
              for one, t in ((teacher, 2), (logits, np.int64(2)), (logits.numpy(), np.float32(2)))]
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def test_a_student_comes_nearer_to_its_teacher_than_one_without(digits, teacher):
    """Even where the labels say nothing at all."""
    def distance(model):
        both = [predict(one, digits.test).double().log_softmax(1) for one in (teacher, model)]
        return nn.functional.kl_div(both[1], both[0], reduction="batchmean", log_target=True).item()

    recipe, students = Recipe(epochs=10, batch_size=100), []
    for alpha in (0, 0.8, 1):
        students.append(build_model("mlp", (1, 8, 8), 10, width=0.1, seed=1))
        labels = digits.train.y if alpha < 1 else torch.zeros_like(digits.train.y)
        distil(students[-1], teacher, replace(digits.train, y=labels), recipe, seed=0, temperature=1, alpha=alpha,
               description=None)
    assert max(map(distance, students[1:])) < 0.7 * distance(students[0])
    assert evaluate(students[2], digits.test).accuracy > 0.9


def test_an_interrupted_student_ends_in_the_same_bits_and_knows_its_teacher(digits, pictures, teacher, tmp_path):
    def student(resume=None, recipe=RECIPE, temperature=3.0, taught_by=teacher):
        return distil(build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3), taught_by, pictures, recipe, seed=4,
                      temperature=temperature, resume=resume, description=None).state

    whole = student()
    assert all(torch.equal(whole[name], tensor) for name, tensor in student(tmp_path / "a").items())
    assert all(torch.equal(whole[name], tensor) for name, tensor in student(tmp_path / "a").items())
    with pytest.raises(ValueError, match=r"loss 'Distillation\(temperature=3.0.*temperature=5.0"):
        student(tmp_path / "a", temperature=5.0)
    other = with_batchnorm(1, 64)
    with pytest.raises(ValueError, match="data.teacher"):
        student(tmp_path / "a", taught_by=other)


def test_a_split_has_a_teacher_or_its_logits(digits, teacher):
    for parts in ({}, {"teacher": teacher, "logits": torch.zeros(len(digits.train), 10)}):
        with pytest.raises(ValueError, match="expected either a teacher or its logits"):
            TeacherSplit(digits.train, **parts)


def test_a_teacher_that_does_not_fit_is_refused_before_training(digits, pictures, teacher):
    def refused(teaching, message, train=digits.train, **options):
        student = build_model("mlp", (1, 8, 8), 10, width=0.1)
        before = bytes_of(student)
        with pytest.raises(ValueError, match=re.escape(message)):
            distil(student, teaching, train, options.pop("recipe", RECIPE), seed=0, description=None,
                   **{"temperature": 2, **options})
        assert bytes_of(student) == before

    logits = predict(teacher, digits.train)
    refused(logits[1:], "the teacher's logits are [1436, 10]: expected [1437, classes]")
    refused(logits[:, :9], "student_logits are [100, 10] and teacher_logits [100, 9]")
    refused(logits.clone().fill_(math.nan), "teacher[0, 0] is nan")
    refused(logits, "the split augments its inputs: expected the network", train=pictures)
    refused(teacher, "temperature is 0", temperature=0)
    refused(teacher, "got 1437 inputs and 1436 labels", train=(digits.train.x, digits.train.y[1:]))
    refused(teacher, "label_smoothing is 0.1", recipe=replace(RECIPE, label_smoothing=0.1))


def test_parts_of_a_batch_and_bf16(digits, teacher):
    def accuracy(**changes):
        student = build_model("mlp", (1, 8, 8), 10, width=0.25, seed=1)
        distil(student, teacher, digits.train, Recipe(epochs=5, batch_size=100, **changes), seed=0, temperature=4,
               description=None)
        return student, evaluate(student, digits.test).accuracy

    (one, _), (parts, _) = accuracy(), accuracy(accumulate=3)
    assert all(torch.allclose(weight, parts.state_dict()[name], atol=1e-4) for name, weight in one.named_parameters())
    assert accuracy(precision="bf16")[1] > 0.9


def test_another_loss_than_the_recipes(digits):
    """A sum over the parts of a batch, in units of the loss: the mean over the images of an epoch is reported."""
    model = build_model("mlp", (1, 8, 8), 10, width=0.1)
    run = fit(model, digits.train, replace(RECIPE, epochs=1), seed=0, loss=lambda logits, y: 0 * logits.sum() + 2.5,
              description=None)
    assert run.losses == pytest.approx([2.5])
    assert Distillation(2.0)(torch.zeros(2, 3), (torch.tensor([0, 1]), torch.zeros(2, 3))).item() == pytest.approx(
        0.2 * math.log(3))
