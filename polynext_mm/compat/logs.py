"""Lines that are printed as well where the console is quiet: see ``engine/console.py``."""

from __future__ import annotations

import logging


def say(text: str, level: int = logging.INFO) -> None:
    """Log a line that users should see, in mmengine's current logger."""
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().log(level, text, extra={'console': True})
