"""Knowledge distillation: a student is trained on the labels and on a teacher's predictions for the same inputs.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531. The weights of
both terms of the loss are those of Mohammadshahi and Ioannou, TMLR 2025, arXiv 2410.08407.
"""

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch.nn import functional as F

from permask_core.models import evaluation_mode
from permask_core.runs.processes import default_device
from permask_core.training.loop import fit, predict
from permask_core.training.recipe import autocast
from permask_core.training.streams import as_split


def distillation_loss(student_logits, teacher_logits, labels, *, temperature, alpha=0.8, scale_by_t2=True):
    """Return the loss of a student: alpha T^2 KL(teacher || student) at temperature T + (1 - alpha) cross-entropy.

    The temperature of the cross-entropy with the labels is 1. Both terms are means over the inputs, in nats.

    Parameters
    ----------
    student_logits, teacher_logits : torch.Tensor
        [n, classes]; those of the teacher get no gradient.
    labels : torch.Tensor
        int64 [n].
    temperature : float
        T above 0; logits are divided by it.
    alpha : float
        Weight of the teacher's term, 0 to 1.
    scale_by_t2 : bool
        Whether to multiply the teacher's term by T^2. Its gradient decreases like 1 / T^2. With the factor, its size
        barely depends on T, and at alpha = 1 it tends to (student - teacher) / (n classes) with centred logits as T
        grows.

    Returns
    -------
    torch.Tensor
        A scalar.

    Raises
    ------
    ValueError
        If shapes do not fit, a logit is not finite, a label is not a class, or a number is out of range.

    References
    ----------
    Hinton, Vinyals and Dean, 2015, section 2 (the limit is their equation 4).

    Examples
    --------
    >>> teacher, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> round(distillation_loss(teacher, teacher, labels, temperature=4, alpha=1).item(), 6)
    0.0
    """
    loss = Distillation(temperature, alpha, scale_by_t2)
    if student_logits.dim() != 2 or 0 in student_logits.shape:
        raise ValueError(f"student_logits are {list(student_logits.shape)}: expected [n, classes]")
    if labels.shape != student_logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: expected int64 [{len(student_logits)}]")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        _check_finite(name, logits)
    wrong = labels[(labels < 0) | (labels >= student_logits.shape[1])]
    if len(wrong):
        raise ValueError(f"labels has {int(wrong[0])}: expected 0 to {student_logits.shape[1] - 1}")
    return loss(student_logits, (labels, teacher_logits))


def _check_finite(name, logits):
    if not logits.isfinite().all():
        row, column = (~logits.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}, {column}] is {logits[row, column].item()}: expected finite logits")


@dataclass(frozen=True)
class Distillation:
    """:func:`distillation_loss` as ``loss(student_logits, (labels, teacher_logits))`` for
    :func:`permask_core.training.fit`. It does not check values, because a GPU would have to synchronise."""

    temperature: float
    alpha: float = 0.8
    scale_by_t2: bool = True

    def __post_init__(self):
        if not isinstance(self.temperature, Real) or not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature!r}: expected a number above 0")
        if not isinstance(self.alpha, Real) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}: expected a number from 0 to 1")
        if not isinstance(self.scale_by_t2, bool):
            raise ValueError(f"scale_by_t2 is {self.scale_by_t2!r}: expected True or False")

    def __call__(self, student_logits, targets):
        labels, teacher_logits = targets
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(f"student_logits are {list(student_logits.shape)} and teacher_logits "
                             f"{list(teacher_logits.shape)}: expected [n, classes] for both")
        student, teacher = (F.log_softmax(logits / self.temperature, 1)
                            for logits in (student_logits, teacher_logits.detach().to(student_logits.dtype)))
        # batchmean, because "mean" would also divide by the number of classes.
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        factor = self.temperature ** 2 if self.scale_by_t2 else 1
        return self.alpha * factor * divergence + (1 - self.alpha) * F.cross_entropy(student_logits, labels)


@dataclass(frozen=True, eq=False)
class TeacherSplit:
    """A split whose batches have the inputs, the labels and the teacher's logits: those in ``logits`` [n, classes], or
    the output of the ``teacher`` for the same augmented inputs."""

    split: object
    teacher: torch.nn.Module | None = None
    logits: torch.Tensor | None = None
    precision: str = "float32"

    def __post_init__(self):
        if (self.teacher is None) == (self.logits is None):
            raise ValueError("expected either a teacher or its logits")

    def __len__(self):
        return len(self.split)

    def to(self, device):
        """Return the split with its teacher and its logits on a device."""
        return replace(self, split=self.split.to(device), teacher=self.teacher and self.teacher.to(device),
                       logits=None if self.logits is None else self.logits.to(device))

    def batches(self, indices, device="cpu", augmented=None):
        """Yield batches as in :meth:`permask_core.data.splits.Split.batches`, with pairs of labels and logits."""
        indices = list(indices)
        for chosen, (x, y) in zip(indices, self.split.batches(indices, device, augmented)):
            if self.logits is not None:
                logits = self.logits[chosen.to(self.logits.device)].to(device)
            else:
                with evaluation_mode(self.teacher), autocast(x.device, self.precision):
                    logits = self.teacher(x)
            yield x, (y, logits)


def distil(student, teacher, train, recipe, *, seed, temperature, alpha=0.8, scale_by_t2=True, device=None,
           **how_to_fit):
    """Train a student in place on the labels and a teacher's logits.

    Without augmentation, the teacher's logits are computed once. With augmentation, teacher and student get the same
    augmented inputs. The teacher is in evaluation mode, and its weights and buffers do not change.

    Parameters
    ----------
    student : torch.nn.Module
    teacher : torch.nn.Module or array-like
        A network with the same classes as the student, or its logits for the inputs of ``train``, [n, classes], from
        :func:`permask_core.training.predict`, which a sweep over temperatures can reuse.
    train, recipe, seed, device, **how_to_fit
        As in :func:`permask_core.training.fit`.
    temperature, alpha, scale_by_t2
        As in :func:`distillation_loss`.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        As in :func:`permask_core.training.fit`; or if the teacher's logits do not fit the data, are not finite, or are
        given although the split augments its inputs.
    FloatingPointError
        As in :func:`permask_core.training.fit`.
    """
    loss = Distillation(temperature, alpha, scale_by_t2)
    train = as_split(train)
    if isinstance(teacher, torch.nn.Module):
        device = device or default_device()
        logits = None if train.augments else predict(teacher.to(device), train)
    elif train.augments:
        raise ValueError("teacher is a tensor of logits, and the split augments its inputs: expected the network, "
                         "because its logits change in every epoch")
    else:
        teacher, logits = None, torch.as_tensor(teacher)
    if logits is not None:
        if logits.dim() != 2 or len(logits) != len(train):
            raise ValueError(f"the teacher's logits are {list(logits.shape)}: expected [{len(train)}, classes]")
        _check_finite("teacher", logits)
        teacher = None
    taught = TeacherSplit(train, teacher, logits, recipe.precision)
    return fit(student, taught, recipe, seed=seed, loss=loss, device=device, **how_to_fit)
