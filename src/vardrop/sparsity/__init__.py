"""From learned noise to a smaller network: zeros, networks without them, digits that the noise pays for, files."""

from vardrop.sparsity.attention import CompactAttention
from vardrop.sparsity.compact import compact
from vardrop.sparsity.compaction import Compaction
from vardrop.sparsity.compressed import CompressedSize, compressed_size, load_compressed, save_compressed
from vardrop.sparsity.export import export_onnx, load_sparse, save_sparse
from vardrop.sparsity.finetune import finetune
from vardrop.sparsity.precision import quantize_to_noise, round_significant, significant_digits
from vardrop.sparsity.search import SparsityPoint
from vardrop.sparsity.sparsify import LayerSparsity, SparsityReport, sparsify_

__all__ = [
    "CompactAttention",
    "Compaction",
    "CompressedSize",
    "LayerSparsity",
    "SparsityPoint",
    "SparsityReport",
    "compact",
    "compressed_size",
    "export_onnx",
    "finetune",
    "load_compressed",
    "load_sparse",
    "quantize_to_noise",
    "round_significant",
    "save_compressed",
    "save_sparse",
    "significant_digits",
    "sparsify_",
]
