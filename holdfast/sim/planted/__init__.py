"""Every planted bug, by what it breaks. A later feature adds its own to the file it belongs to."""

from holdfast.sim.planted import brain, drafts, graphs, recovery, streams, tiers

MUTATIONS = (
    *brain.MUTATIONS,
    *drafts.MUTATIONS,
    *graphs.MUTATIONS,
    *recovery.MUTATIONS,
    *streams.MUTATIONS,
    *tiers.MUTATIONS,
)
