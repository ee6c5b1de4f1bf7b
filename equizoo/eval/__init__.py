"""From a model to numbers: potentials, calculators, metrics and plots."""
