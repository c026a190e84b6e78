"""Settings and weights of other codebases."""
