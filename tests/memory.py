"""Where tensors lie in main memory."""

from collections.abc import Iterable

from torch import Tensor


def span(tensors: Iterable[Tensor]) -> int:
    """Bytes from the first tensor's beginning to the last one's end, empty ones left out."""
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel()]
    return max(end for _, end in ends) - min(start for start, _ in ends)
