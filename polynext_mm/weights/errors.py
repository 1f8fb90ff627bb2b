"""The error that everything to do with checkpoint files raises."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used as asked; the message names it and says what to do."""
