"""Sampling seeds and coins as functions of the request, never of where or when it runs."""

import hashlib


def sampling_seed(run_seed: int, prompt_id: str, sample: int, version: int) -> int:
    """A 63-bit seed from (run seed, prompt id, sample number, policy version).

    The same trajectory is sampled whichever actor gets the request and however often it is retried.
    Example: `sampling_seed(0, "shop/17", 3, 12)`.
    """
    key = f"{run_seed}\x1f{prompt_id}\x1f{sample}\x1f{version}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def heads(seed: int, unit: str, chance: float) -> bool:
    """Side of a coin that is flipped once for a unit, such as a prompt: True with probability `chance`."""
    digest = hashlib.blake2b(f"{seed}\x1f{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < chance
