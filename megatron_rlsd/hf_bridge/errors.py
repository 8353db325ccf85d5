"""What can be wrong between a Hugging Face folder and a Megatron model."""


class HFBridgeError(ValueError):
    """A Hugging Face model and the Megatron model do not fit together."""


class HFConfigError(HFBridgeError):
    """config.json holds something the Megatron model would not honour, or lacks a needed key."""


class HFCheckpointError(HFBridgeError):
    """A checkpoint folder is damaged, or its tensors are not the ones the model needs."""


def listed(names: list[str] | tuple[str, ...], limit: int = 12) -> str:
    """Names for an error message, the rest counted: ``a, b and 3 more``."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
