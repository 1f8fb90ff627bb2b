"""Checks before the first step: of configs, data, normalization and checkpoints."""
