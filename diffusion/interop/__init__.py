"""Weights and settings of other codebases, in and out."""
