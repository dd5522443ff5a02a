"""The one check of a value that all configuration shares."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message`, which names the value and the way out, unless the condition holds."""
    if not condition:
        raise ValueError(message)
