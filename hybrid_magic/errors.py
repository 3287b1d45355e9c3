"""What a person can be told.

Every message is one line that says what was found, what was wanted and what to do. It is raised
before anything of the person's was changed. This file knows nothing else of the package.
"""

from __future__ import annotations


class HybridMagicError(Exception):
    """A situation in which nothing can be done for the person but to say so."""


class ConfigError(HybridMagicError, ValueError):
    """An option whose value cannot be used."""


class OutOfMemoryError(HybridMagicError):
    """Memory ran out where no smaller piece was left to try."""
