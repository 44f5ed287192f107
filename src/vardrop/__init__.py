"""vardrop: dropout that learns its rates, tells its uncertainty, and shrinks networks."""

from vardrop import functional, kl, layers, presets, rates, sparsity, testing, uncertainty
from vardrop.convert import Report, convert_, restore_
from vardrop.diagnosis.adaptive_l2 import effective_l2
from vardrop.diagnosis.diagnose import diagnose
from vardrop.diagnosis.fixes.fix import fix_variance_shift_
from vardrop.ensemble import Ensemble
from vardrop.gradient import gradient_variance
from vardrop.objective import ELBO, dropout_rates, kl_divergence
from vardrop.prediction.mc import mc_predict
from vardrop.prediction.prediction import Prediction
from vardrop.prediction.stochastic import stochastic
from vardrop.replace import replace_dropout_
from vardrop.set_rates import set_rates_
from vardrop.sparsity.compact import compact
from vardrop.sparsity.compressed import compressed_size, load_compressed, save_compressed
from vardrop.sparsity.finetune import finetune
from vardrop.sparsity.precision import quantize_to_noise
from vardrop.sparsity.sparsify import sparsify_
from vardrop.uncertainty.acquisition import acquire
from vardrop.uncertainty.selection import select
from vardrop.variance import VarianceTerms, variance_terms
from vardrop.weights.additive import GaussianPosterior
from vardrop.weights.estimators import estimator
from vardrop.weights.modules import register_layer
from vardrop.weights.multiplicative import GaussianDropout, VariationalDropout
from vardrop.weights.random_weight import RandomWeight
from vardrop.weights.sparse import SparseVariationalDropout

__version__ = "0.1.0"
__all__ = [
    "ELBO",
    "Ensemble",
    "GaussianDropout",
    "GaussianPosterior",
    "Prediction",
    "RandomWeight",
    "Report",
    "SparseVariationalDropout",
    "VarianceTerms",
    "VariationalDropout",
    "acquire",
    "compact",
    "compressed_size",
    "convert_",
    "diagnose",
    "dropout_rates",
    "effective_l2",
    "estimator",
    "finetune",
    "fix_variance_shift_",
    "functional",
    "gradient_variance",
    "kl",
    "kl_divergence",
    "layers",
    "load_compressed",
    "mc_predict",
    "presets",
    "quantize_to_noise",
    "rates",
    "register_layer",
    "replace_dropout_",
    "restore_",
    "save_compressed",
    "select",
    "set_rates_",
    "sparsify_",
    "sparsity",
    "stochastic",
    "testing",
    "uncertainty",
    "variance_terms",
]
