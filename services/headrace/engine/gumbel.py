"""Counter-based noise: the number for a token is a function of what it decides, not of when it is drawn."""

import torch

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
"""Of the 32-bit finalizer "lowbias32" (C. Wellons, hash-prospector, 2018); the second as a signed word."""


def noise_key(seed: int, choice: int, position: int) -> tuple[int, int]:
    """Return two signed 32-bit words that key the noise of one position of one answer.

    Args:
        seed: 64 bits; others are reduced to them.
        choice: Index of the answer.
        position: Position that the chosen token will have.
    """
    key = seed & _MASK64
    for word in (choice, position):
        key = _mix64(key ^ _mix64(word + 1))
    return _signed(key & _MASK32), _signed(key >> 32)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise for tokens; any token's noise can be had alone.

    The hash works in wrapping 32-bit integers, so its bits are equal on every device; only the
    logarithms after it may differ in the last place.

    Args:
        keys: `[rows, 2]`, int32, from `noise_key`.
        token_ids: `[tokens]` or `[rows, tokens]`, int32.

    Returns:
        `[rows, tokens]`, fp32.
    """
    first, second = keys.unsqueeze(-1).unbind(1)
    bits = _mix32_(_mix32_(token_ids ^ first) ^ second)
    # Only uniforms near 0 make a token win, and fp32 resolves all 31 bits there: hence log1p of the complement.
    uniform = bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix32_(words: torch.Tensor) -> torch.Tensor:
    """Scatter signed 32-bit words, in place; shifts are arithmetic, hence the masks."""
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    words *= _MULTIPLIERS[0]
    words ^= (words >> 15).bitwise_and_(0x1FFFF)
    words *= _MULTIPLIERS[1]
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    return words


def _mix64(word: int) -> int:
    """Scatter 64 bits (the finalizer of SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK64
    return word ^ word >> 31


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
