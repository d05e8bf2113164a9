"""Which block a tier forgets first."""

from headrace.core.block import KvLayout
from headrace.core.cost import CostModel
from headrace.core.eviction import BlockFacts, ByValue, EvictionOrder, LeastRecentlyUsed, S3Fifo
from headrace.kvstore.config import Eviction
from headrace.kvstore.stored_block import StoredBlock


def order_of(eviction: Eviction, layout: KvLayout, num_blocks: int) -> EvictionOrder:
    """Return a new order for a tier of `num_blocks`."""
    match eviction:
        case Eviction.VALUE:
            return ByValue(relative_cost(layout), block_tokens=layout.block_tokens, num_blocks=max(1, num_blocks))
        case Eviction.S3FIFO:
            return S3Fifo(num_blocks)
        case Eviction.LRU:
            return LeastRecentlyUsed()


def relative_cost(layout: KvLayout) -> CostModel:
    """Return what computing a token costs, in units of one without context.

    Ranking blocks of one model needs ratios only, so no machine has to be measured: a token takes 24 d^2 operations
    per layer of width d, and 4 d for each token that it attends to. The width of the KV heads stands for d; it is
    smaller where heads are shared, which makes late blocks count for somewhat more.
    """
    width = layout.num_kv_heads * layout.head_dim
    return CostModel(step_s=0.0, prompt_s=0.0, token_s=1.0, pair_s=1 / (6 * width), decode_s=0.0, context_s=0.0)


def order_facts(block: StoredBlock, block_tokens: int) -> BlockFacts:
    """Return what an order may know of a block."""
    return BlockFacts(
        parent=block.parent, num_tokens_before=block.num_blocks_before * block_tokens, tenant=block.tenant
    )
