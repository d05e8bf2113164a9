"""What the kvstore reports of its blocks."""

from headrace.core.block import KvLayout
from headrace.kvstore.actor import KvStoreView
from headrace.v1 import cluster_pb2


def store_report(view: KvStoreView, layout: KvLayout | None, num_handed: int) -> cluster_pb2.StoreReport:
    """Return the report; canaries are in none of its counts.

    Args:
        view: Snapshot of the actor.
        layout: Of the workers' blocks, once one has told it.
        num_handed: Blocks given to siblings.
    """
    totals, disk = view.totals, view.disk
    block_bytes = 0 if layout is None else layout.block_bytes
    report = cluster_pb2.StoreReport(
        dram_bytes=view.num_named * block_bytes,
        num_asked_blocks=totals.num_asked_blocks,
        num_hit_blocks=totals.num_hit_blocks,
        num_evicted_blocks=totals.num_evicted_blocks,
        num_quarantined_blocks=totals.num_quarantined_blocks,
        num_forged_blocks=totals.num_forged_blocks,
        num_over_quota_puts=totals.num_over_quota_puts,
        num_handed_blocks=num_handed,
    )
    if disk is not None:
        report.disk_bytes = disk.counts.num_bytes
        report.disk_capacity_bytes = disk.counts.num_slots * block_bytes
        report.num_disk_hit_blocks = disk.totals.num_read_blocks
        report.num_disk_evicted_blocks = disk.num_evicted
        report.num_disk_written_blocks = disk.totals.num_written_blocks
        report.num_disk_failed_blocks = disk.totals.num_io_errors + disk.totals.num_full + disk.totals.num_corrupt
        report.num_forged_blocks += disk.num_forged
    return report
