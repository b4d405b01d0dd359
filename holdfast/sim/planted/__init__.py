"""Every planted bug, by what it breaks. A later feature adds its own to the file it belongs to."""

from holdfast.sim.planted import brain, drafts, graphs, pages, recovery, streams, tiers

MUTATIONS = (
    *brain.MUTATIONS,
    *drafts.MUTATIONS,
    *graphs.MUTATIONS,
    *pages.MUTATIONS,
    *recovery.MUTATIONS,
    *streams.MUTATIONS,
    *tiers.MUTATIONS,
)
