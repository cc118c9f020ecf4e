"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes, part of the package itself.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (its
test part).
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits(seed=0, test_size=360):
    """The digits, split stratified by class, standardised by the training part's mean and deviation.

    Parameters
    ----------
    seed : int
        Of the split.
    test_size : int
        Number of test images, 10 to 1,787: both parts keep every class.

    Returns
    -------
    (torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int)
        Training inputs [n, 1, 8, 8] and labels [n], test inputs and labels, and the number of classes.
    """
    if not isinstance(test_size, int) or not 10 <= test_size <= 1787:
        raise ValueError(f"test_size is {test_size!r}: expected an integer from 10 to 1787")
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=test_size, stratify=y, random_state=seed)
    mean, sd = x_train.mean(), x_train.std()
    images = (torch.from_numpy((part - mean) / sd).float().view(-1, 1, 8, 8) for part in (x_train, x_test))
    labels = (torch.from_numpy(part).long() for part in (y_train, y_test))
    (x_train, x_test), (y_train, y_test) = images, labels
    return x_train, y_train, x_test, y_test, 10
