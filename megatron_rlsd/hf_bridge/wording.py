"""Lists in messages the many names that can be wrong with a model."""


def listed(names: list[str] | tuple[str, ...], limit: int = 12) -> str:
    """Names for an error message, the rest counted: ``a, b and 3 more``."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
