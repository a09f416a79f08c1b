"""A 64-bit checksum of bytes that stay on a GPU: torch's integer operations, and the same number on every device.

Every 8 bytes are one word. A word is combined with its place and mixed by a bijection of 64-bit numbers (splitmix64's
finalizer, Steele et al. 2014, doi:10.1145/2660193.2660195); the checksum is the sum of all, modulo 2^64. So a change
within one word always changes it, and any other change stays unseen with a chance of about 2^-64. It finds damage; it
is no protection against deliberate tampering.
"""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

_PIECE = 1 << 21  # words that are mixed at once; their temporaries take 48 MiB
_PLACE, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def checksum(data: UInt8[Tensor, " nbytes"]) -> str:
    """`sum64:` and 16 hexadecimal digits; waits for the device once, at the end."""
    whole, rest = data[: len(data) // 8 * 8], data[len(data) // 8 * 8 :]
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    at = 0
    for piece in whole.split(8 * _PIECE):
        total += _mixed(_words(piece), at)
        at += len(piece) // 8
    if len(rest):
        total += _mixed(_words(F.pad(rest, (0, 8 - len(rest)))), at)
    return f"sum64:{int(total) & _MASK:016x}"


def _words(piece: UInt8[Tensor, " nbytes"]) -> Int64[Tensor, " words"]:
    aligned = piece if piece.storage_offset() % 8 == 0 and piece.data_ptr() % 8 == 0 else piece.clone()
    return aligned.view(torch.int64)


def _mixed(words: Int64[Tensor, " words"], start: int) -> Int64[Tensor, ""]:
    """Sum of the mixed words, the first of which is word number `start`; int64 wraps, as it must."""
    places = torch.arange(start + 1, start + 1 + len(words), device=words.device)
    mixed = words ^ places.mul_(_signed(_PLACE))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed ^= _shifted(mixed, shift)
        mixed *= _signed(factor)
    mixed ^= _shifted(mixed, 31)
    return mixed.sum()


def _shifted(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right, which fills with zeros (torch's own fills with the sign)."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
