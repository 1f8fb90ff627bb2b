"""Predictions from Python: :class:`Predictor`, and the results that it returns."""

from .predictor import Predictor
from .results import Detections, Segmentation

__all__ = ['Detections', 'Predictor', 'Segmentation']
