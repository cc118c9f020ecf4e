"""The language of skills: every answer is exact, labels are where it is predicted, shares and splits are as asked."""

import pytest
import torch

from permask_core.data import load_dataset
from permask_core.data.skills import SKILLS, decoded

SOLVE = {"reverse": lambda q: q[::-1], "sort": lambda q: "".join(sorted(q)),
         "larger": lambda q: "".join(max(a, b) for a, b in zip(q, q[1:] + q[0])),
         "replace": lambda q: q.translate(str.maketrans("0123456789", "3709184265"))}


@pytest.mark.parametrize("digits", [2, 5])
def test_every_answer_is_right_and_labelled(digits):
    data = load_dataset("skills", digits=digits, n_train=400, n_test=80)
    assert data.input_shape == (2 * digits + 1,) and data.classes == 15
    for split in (data.train, data.test):
        for x, y, member in zip(split.x, split.y, split.attributes["skill"].member):
            skill, rest = decoded(torch.cat([x, y[-1:]])).split(" ")
            question, answer = rest.split("=")
            assert skill == SKILLS[int(member.nonzero())] and len(question) == len(answer) == digits
            assert answer == SOLVE[skill](question)
            assert y.tolist() == [-100] * (digits + 1) + [int(digit) for digit in answer]


def test_shares_of_skills():
    data = load_dataset("skills", n_train=20_000, n_test=40)
    assert torch.allclose(data.train.attributes["skill"].member.double().mean(0),
                          torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), atol=0.015)
    assert data.test.attributes["skill"].member.sum(0).tolist() == [10] * 4
    without = load_dataset("skills", n_train=500, shares=(1, 1, 1, 0)).train
    assert not without.attributes["skill"].member[:, 3].any() and without.attributes["skill"].member[:, :3].any(0).all()


def test_seeds_and_splits_have_other_questions():
    one, other = (load_dataset("skills", n_train=200, n_test=200, seed=seed) for seed in (0, 1))
    again = load_dataset("skills", n_train=200, n_test=200)
    assert torch.equal(one.train.x, again.train.x) and torch.equal(one.test.x, again.test.x)
    assert not torch.equal(one.train.x, other.train.x) and not torch.equal(one.train.x[:, 1:], one.test.x[:, 1:])


@pytest.mark.parametrize("options, message", [
    ({"digits": 1}, "digits is 1: expected an integer of at least 2"), ({"n_test": 3}, "n_test is 3"),
    ({"shares": (1, 2)}, r"shares is \[1.0, 2.0\]: expected 4 numbers of at least 0, not all 0"),
    ({"shares": (0, 0, 0, 0)}, "not all 0"), ({"shares": (1, 1, 1, -1)}, "shares is"), ({"seed": -1}, "seed is -1")])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("skills", **options)
