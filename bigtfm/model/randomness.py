"""Random numbers as a pure function of named keys: no generator is read or advanced.

Every value depends on (seed, what it is for, its own index) alone, so it is the same on any device, for any
split of the batch over ranks and accumulation steps, when activations are recomputed, and after a resume.
"Counter-based" generators are described in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

mix64 is the finaliser of SplitMix64 (Steele, Lea, Flood 2014); number i of stream k is mix64(k + i * gamma),
as there. mix32 is the finaliser of MurmurHash3 (Appleby 2011): half the memory traffic where every feature
needs bits. Both are shifts, exclusive ors and wrapping products, which torch's signed integers do exactly.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN64, _GOLDEN32 = 0x9E3779B97F4A7C15, 0x9E3779B9  # 2^64 and 2^32 divided by the golden ratio
_CHUNK = 1 << 18  # numbers made at a time: the temporaries stay in cache


def stream_key(seed: int, name: str) -> int:
    """The key (signed 64 bits) of the stream that belongs to `name` under `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def _signed(constant: int, bits: int) -> int:
    return constant - (1 << bits) if constant >> (bits - 1) else constant


def _shift(x: Tensor, count: int, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> count) & ((1 << (bits - count)) - 1)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64."""
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, elementwise on int32."""
    x = (x ^ _shift(x, 16, 32)) * _signed(0x85EBCA6B, 32)
    x = (x ^ _shift(x, 13, 32)) * _signed(0xC2B2AE35, 32)
    return x ^ _shift(x, 16, 32)


def stream(index: Tensor, key: int) -> Tensor:
    """The 64 random bits at each place `index` (int64) of the stream `key`."""
    return mix64(index * _signed(_GOLDEN64, 64) + key)


def uniform(keys: Tensor) -> Tensor:
    """One fp64 number in (0, 1) for each int64 key."""
    return (_shift(mix64(keys), 12, 64).double() + 0.5) * 2.0**-52


def normal(key: int, count: int) -> Tensor:
    """`count` standard normal numbers, fp32 on the CPU; number i depends on (key, i) alone.

    By Box and Muller 1958, computed in fp64 and rounded once, so that vector and scalar code paths give the
    same fp32 number.
    """
    out = torch.empty(count, dtype=torch.float32)
    for start in range(0, count, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, count), dtype=torch.int64)
        bits = stream(index, key)
        radius = _shift(bits, 32, 64).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (bits & 0xFFFFFFFF).double().mul_(2.0**-32 * 2.0 * math.pi).cos_()
        out[start : start + _CHUNK] = radius.mul_(angle)
    return out


def token_words(token_keys: Tensor, key: int) -> Tensor:
    """A random 32-bit word for each token key (int64 [T] -> int32 [T])."""
    return stream(token_keys, key).view(torch.int32)[::2]


def dropout(x: Tensor, probability: float, words: Tensor, site: int) -> Tensor:
    """Zeroes each feature of `x` [T, C] with `probability`, scales the rest (Srivastava et al. 2014).

    The decision on feature c of token t is a hash of (words[t], site, c), `words` being `token_words` of the
    tokens and `site` the number of the place in the model. One 32-bit hash serves two features; the
    probability is therefore rounded to a multiple of 2^-16, and the scale is the rounded one's, so the mean
    is exact.
    """
    cut = min(round(probability * 65536), 65535)
    if cut == 0:
        return x
    features = x.shape[-1]
    pairs = (features + 1) // 2
    place = torch.arange(site * pairs, (site + 1) * pairs, dtype=torch.int32, device=x.device)
    hashes = mix32(words[:, None] ^ mix32(place * _signed(_GOLDEN32, 32)))  # [T, C/2]
    keep = hashes.view(torch.int16)[:, :features] >= cut - 32768  # [T, C]
    return torch.where(keep, x * (65536 / (65536 - cut)), 0.0)
