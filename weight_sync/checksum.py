"""A 64-bit checksum of bytes that stay on a GPU: torch's integer operations, and the same number on every device.

Every 8 bytes are one word. A word is combined with its place and mixed by a bijection of 64-bit numbers
(`opd.splitmix64`); the checksum is the sum of all, modulo 2^64. So a change within one word always changes it, and any
other change stays unseen with a chance of about 2^-64. It finds damage; it is no protection against deliberate
tampering.
"""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from opd.splitmix64 import GOLDEN, mix_

_PIECE = 1 << 21  # words that are mixed at once; their temporaries take 48 MiB
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
    return mix_(words ^ places.mul_(GOLDEN)).sum()
