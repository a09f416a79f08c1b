"""splitmix64's bijection of 64-bit words, on tensors (Steele et al. 2014, doi:10.1145/2660193.2660195)."""

from jaxtyping import Int64
from torch import Tensor


def signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 with the same bits. Example: `signed(2**64 - 1)` is -1."""
    return word - (1 << 64) if word >> 63 else word


GOLDEN = signed(0x9E3779B97F4A7C15)  # what a counter is multiplied by: 2^64 over the golden ratio, made odd
_FACTORS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)))


def mix_(words: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Mixed `words`, in place: int64 wraps as an unsigned word would. Same bits on every device."""
    for shift, factor in _FACTORS:
        words ^= _shifted(words, shift)
        words *= factor
    words ^= _shifted(words, 31)
    return words


def _shifted(words: Tensor, by: int) -> Tensor:
    """A shift to the right that fills with zeros (torch's own fills with the sign)."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)
