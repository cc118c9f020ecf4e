"""Permutation groups of any network, found by tracing its operations."""
