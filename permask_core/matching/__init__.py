"""Permutations that move one network onto another.

"source" is moved onto "target": unit i of the result is unit ``permutation[i]`` of the source. (Git Re-Basin's own
code moves B onto A; the permuted-mask paper moves A, whose mask is wanted, onto B.)
"""

from permask_core.matching.activations import activation_correlations, match_activations
from permask_core.matching.align import Alignment, align
from permask_core.matching.batchnorm import interpolate, repair, reset_batchnorm
from permask_core.matching.checking import (
           check_function,
           derangements,
           draw_stable_weights,
           draw_weights,
           function_change,
)
from permask_core.matching.groups import Entry, Fixed, Group, Groups, Tap, check_groups
from permask_core.matching.permutations import Permutations, permute, random_permutations
from permask_core.matching.tracer.trace import permutation_groups
from permask_core.matching.weights import match_weights

__all__ = ["Alignment", "Entry", "Fixed", "Group", "Groups", "Permutations", "Tap", "activation_correlations", "align",
           "check_function", "check_groups", "derangements", "draw_stable_weights", "draw_weights", "function_change",
           "interpolate", "match_activations", "match_weights", "permutation_groups", "permute", "random_permutations",
           "repair", "reset_batchnorm"]
