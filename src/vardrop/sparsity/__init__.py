"""From learned noise to a smaller network: zeros, networks without them, digits that the noise pays for, files."""

from vardrop.sparsity.attention import CompactAttention
from vardrop.sparsity.compact import Compaction, compact
from vardrop.sparsity.finetune import finetune
from vardrop.sparsity.sparsify import LayerSparsity, SparsityPoint, SparsityReport, sparsify_

__all__ = [
    "CompactAttention",
    "Compaction",
    "LayerSparsity",
    "SparsityPoint",
    "SparsityReport",
    "compact",
    "finetune",
    "sparsify_",
]
