"""The physical floor of a workload on this machine: the least time that its reads and products can take.

A step reads all weights once; a token costs its linears, a prompt or an answer its causal attention. Memory and
products overlap ideally, the cache of keys and values is read for nothing, and prompts that begin alike are computed
once. Products count at the rate of fp32: engines that multiply integers may come below that part.
"""

import statistics
from collections.abc import Sequence
from itertools import takewhile

from rates import Rates
from workloads import Ask, Workload

LINEAR_FLOP = 2 * 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
"""Of a token in the 30 layers of SmolLM2-135M: attention projections and MLP."""
HEAD_FLOP = 2 * 576 * 49_152
"""Of the logits of one token."""
ATTENTION_FLOP = 30 * 2 * 2 * 576 // 2
"""Times the square of the length: scores and sums of 9 heads of 64 in 30 layers, half of them masked."""


def floor(workload: Workload, asks: Sequence[Ask], rates: Rates, weights_bytes: int) -> float:
    """Return the least value of the workload's figure for these requests.

    Args:
        workload: Names the figure and the number of users.
        asks: Its requests.
        rates: Of the machine.
        weights_bytes: Size of the weights as they are stored.
    """
    match workload.figure:
        case "tpot_p50_s":
            return rates.floor_s(weights_bytes, workload.users * (LINEAR_FLOP + HEAD_FLOP))
        case "ttft_p50_s":
            prompts = [Ask(prompt=ask.prompt, num_tokens=1) for ask in asks]
            return statistics.median(rates.floor_s(weights_bytes, _flop(ask, 0)) for ask in prompts)
        case "total_s" | "s_per_token":
            num_tokens = sum(ask.num_tokens for ask in asks)
            flop = sum(_flop(ask, _shared(ask, asks[:index])) for index, ask in enumerate(asks))
            total_s = rates.floor_s(weights_bytes * num_tokens / workload.users, flop)
            return total_s if workload.figure == "total_s" else total_s / num_tokens
        case other:
            raise ValueError(f"no floor is known for {other}")


def _flop(ask: Ask, num_known: int) -> int:
    """Return the work of a request whose first `num_known` tokens are computed; its last token is only drawn."""
    length = len(ask.prompt) + ask.num_tokens - 1
    linear = LINEAR_FLOP * (length - num_known) + HEAD_FLOP * ask.num_tokens
    return linear + ATTENTION_FLOP * (length**2 - num_known**2)


def _shared(ask: Ask, earlier: Sequence[Ask]) -> int:
    """Return how many tokens of the prompt, short of all, begin an earlier one."""
    lengths = (
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ask.prompt[:-1], other.prompt, strict=False)))
        for other in earlier
    )
    return max(lengths, default=0)
