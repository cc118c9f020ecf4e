"""Permutation groups of any network, by following its operations."""
