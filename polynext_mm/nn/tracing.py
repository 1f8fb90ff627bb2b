"""For whom the code runs that is running now: for itself, or for a graph that is being recorded."""

import torch


def compiling() -> bool:
    """Whether a graph is recorded, to be compiled here or exported."""
    return torch.compiler.is_compiling() or exporting()


def exporting() -> bool:
    """Whether the graph is for another program (``torch.export``, ONNX), without operators of ours."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
