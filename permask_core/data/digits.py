"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes, included in that package.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (its
test part).
"""

import math
from numbers import Real

import torch

from permask_core.data.splits import Split
from permask_core.models.extras import check_extra
from permask_core.runs.checks import check_integer


def digits(seed=0, test_size=360, noise=0.0, copies=1, channels=1):
    """The digits, split stratified by class and standardised by the mean and deviation of the training part.

    Parameters
    ----------
    seed : int
        Seed of the split and of the noise.
    test_size : int
        Number of test images, 10 to 1,787, so that both parts contain every class.
    noise : float
        Standard deviation of normal noise, drawn once for every pixel and added to the standardised images: on the
        clean digits sparse networks hardly differ.
    copies : int
        Number of noisy copies of each test image, which reduce the variance due to the noise.
    channels : int
        1, or 3 for networks that expect colour images: the same image, with its noise, three times.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split of float32 images; the shape [channels, 8, 8]; the number of classes.
    """
    check_integer("test_size", test_size, 10, 1787)
    check_integer("copies", copies, 1)
    if not isinstance(noise, Real) or not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise!r}: expected a standard deviation of at least 0")
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}: expected 1 or 3")
    check_extra("digits", "sklearn", "data")
    # Here, because it takes a second to import and loading finished stages does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=test_size, stratify=y, random_state=seed)
    mean, sd = x_train.mean(), x_train.std()
    generator = torch.Generator().manual_seed(int(seed))

    def split(images, labels, times):
        images = torch.from_numpy((images - mean) / sd).float().view(-1, 1, 8, 8).repeat(times, 1, 1, 1)
        if noise:
            images = images + noise * torch.randn(images.shape, generator=generator)
        return Split(images.repeat(1, channels, 1, 1), torch.from_numpy(labels).long().repeat(times))

    return split(x_train, y_train, 1), split(x_test, y_test, copies), (channels, 8, 8), 10
