"""Matched comparisons: arms that differ in named settings only, trained on the same data, order, noise and weights."""
