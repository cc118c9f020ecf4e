"""A synthetic language of four skills with exact answers, for small language models.

A sequence is the name of a skill, a question of a few digits, the sign "=", and the answer, which has as many digits.
The answer is exact, so each skill has an accuracy: the fraction of sequences whose whole answer is right.
"""

import numpy as np
import torch

from permask_core.data.attributes import attribute
from permask_core.data.splits import Split, mix_seed
from permask_core.runs.checks import check_integer

SKILLS = ("reverse", "sort", "larger", "replace")  # "larger": of each digit and the next one, after the last the first
REPLACED = (3, 7, 0, 9, 1, 8, 4, 2, 6, 5)  # the digit that replaces 0, 1, 2, ...
EQUALS, FIRST_SKILL = 10, 11  # tokens; 0 to 9 are the digits
IGNORED = -100  # the label of a position whose next token is no part of the answer


def skills(digits=5, n_train=51_200, n_test=1_600, shares=(0.4, 0.3, 0.2, 0.1), seed=0):
    """Sequences of four skills, each with the next token as the label of the positions that predict the answer.

    Parameters
    ----------
    digits : int
        Digits of a question.
    n_train, n_test : int
        Number of sequences; the test split has the same number of each skill.
    shares : sequence of float
        How often each skill occurs in the training split, in the order of ``SKILLS``; divided by their sum. A share of
        0 leaves a skill out.
    seed : int
        Seed of the questions. Those of the two splits are drawn independently.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split, with inputs and labels int64 [n, 2 digits + 1], and the attribute ``skill``; the shape
        of an input; the number of tokens, 15. Labels are -100 where the next token is not part of the answer.

    Raises
    ------
    ValueError
        If an option is out of range.
    """
    for name, given, least in (("digits", digits, 2), ("n_train", n_train, 1), ("n_test", n_test, len(SKILLS)),
                               ("seed", seed, 0)):
        check_integer(name, given, least)
    shares = np.asarray(shares, dtype=float)
    if shares.shape != (len(SKILLS),) or not (np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
        raise ValueError(f"shares is {shares.tolist()}: expected {len(SKILLS)} numbers of at least 0, not all 0")
    generator = np.random.default_rng(mix_seed(seed, 0))
    train = sequences(generator.choice(len(SKILLS), n_train, p=shares / shares.sum()), digits, generator)
    test = sequences(np.arange(n_test) % len(SKILLS), digits, np.random.default_rng(mix_seed(seed, 1)))
    return train, test, (2 * digits + 1,), FIRST_SKILL + len(SKILLS)


def sequences(which, digits, generator):
    """Return a split of sequences of given skills, int [n], with questions drawn by a generator of NumPy."""
    question = generator.integers(0, 10, (len(which), digits))
    answers = np.stack([question[:, ::-1], np.sort(question), np.maximum(question, np.roll(question, -1, 1)),
                        np.asarray(REPLACED)[question]])
    answer = answers[which, np.arange(len(which))]
    column = np.ones((len(which), 1), int)
    tokens = torch.from_numpy(np.hstack([column * (FIRST_SKILL + which[:, None]), question, column * EQUALS, answer]))
    labels = tokens[:, 1:].clone()
    labels[:, :digits + 1] = IGNORED
    return Split(tokens[:, :-1].contiguous(), labels, attributes={
        "skill": attribute(SKILLS, torch.from_numpy(which))})


def decoded(tokens):
    """Return tokens [n] as text.

    Examples
    --------
    >>> decoded(torch.tensor([11, 1, 2, 10, 2, 1]))
    'reverse 12=21'
    """
    names = [*"0123456789", "=", *(f"{skill} " for skill in SKILLS)]
    return "".join(names[int(token)] for token in tokens)
