"""Training: the step, the run around it, and the run's folder."""
