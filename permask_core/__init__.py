"""permask_core: sparse training and weight symmetry, as pure functions over flat dicts of tensors.

The packages by level, lowest first (a module imports only from its own package or from packages on lower levels):

0. ``runs``, ``models``
1. ``masks``, ``data``
2. ``pruning``, ``matching``, ``sparse``
3. ``training``, ``experts``
4. ``evaluation``
5. ``experiments``, ``display``

The names below are what most scripts need. Each is imported when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "masks": ("apply_masks", "load_masks", "masks_of", "prunable_weights", "save_masks", "sparsity", "watch"),
    "pruning": ("magnitude_masks",),
    "matching": ("align", "match_activations", "match_weights", "permutation_groups", "permute"),
    "sparse": ("FanInLinear", "condense"),
    "sparse.dynamic": ("Rewiring", "Topology"),
    "training": ("Recipe", "evaluate", "fit", "predict"),
}
_HOME = {name: room for room, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
