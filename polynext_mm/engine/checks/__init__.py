"""All that is told before the first step: faults of configs, data, normalization, checkpoints."""
