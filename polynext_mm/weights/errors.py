"""The error that everything to do with checkpoint files raises."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used as asked; the message names it and says what to do."""


def shown(text: object, length: int = 120) -> str:
    """Return text from a file for use in a message: shortened, without control codes."""
    text = str(text)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= length else f'{text[: length - 3]}...'
