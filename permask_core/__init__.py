"""permask_core: sparse training and weight symmetry, as pure functions over flat dicts of tensors.

The rooms, ground floor first (a module imports only from floors below its own):

0. ``files``, ``tables``, ``vision``, ``progress``
1. ``masks``, ``statistics``, ``store``, ``resume``, ``processes``
2. ``models``, ``data``, ``pruning``, ``matching``, ``sparse``, ``landscape``
3. ``parameters``, ``training``, ``distillation``
4. ``stages``, ``lottery``, ``transfer``, ``dst``, ``label_spaces``, ``presets``, ``display``
"""

__version__ = "0.1.0"
