"""Checkpoints on disk: written piece by piece, committed by their manifest, read by any number.

Files only: no MPI, no threads, no clock but the manifest's time stamp. Several processes write a
checkpoint, each its shard; one of them commits it and prunes the older ones.
"""

from psframe.checkpoint.manifest import Manifest
from psframe.checkpoint.names import checkpoint_name, committed_versions, versions
from psframe.checkpoint.pruning import abandon, prune, remove_all
from psframe.checkpoint.reading import Reader, newest, open_checkpoint
from psframe.checkpoint.shard import Shard
from psframe.checkpoint.writing import commit, write_shard

__all__ = [
    "Manifest",
    "Reader",
    "Shard",
    "abandon",
    "checkpoint_name",
    "commit",
    "committed_versions",
    "newest",
    "open_checkpoint",
    "prune",
    "remove_all",
    "versions",
    "write_shard",
]
