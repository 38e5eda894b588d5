"""The one home of every number a user can set: its default, unit and allowed range.

One file per section, named like its key. YAML keys and command-line flags are the same dotted names
(``privacy.epsilon`` / ``--privacy.epsilon``). A field's type is its range, see
:mod:`sapf_ray.config.kinds`; YAML, flags and Python are validated by it alike. Every field is
*public* information: sensitive inputs are arguments of functions, never part of a config.

Defaults are those of the paper's Table 13; where they differ the field says why.

>>> from_dict({"privacy": {"epsilon": 3}}).privacy.epsilon
3.0
>>> PrivacyConfig(accountant="moments")
Traceback (most recent call last):
sapf_ray.errors.ConfigError: privacy.accountant = 'moments': must be one of pld, rdp
"""

from __future__ import annotations

from sapf_ray.config.audit import AuditConfig
from sapf_ray.config.cluster import ClusterConfig
from sapf_ray.config.data import DataConfig
from sapf_ray.config.evaluation import EvaluationConfig
from sapf_ray.config.evolution import EvolutionConfig
from sapf_ray.config.finetune import FinetuneConfig
from sapf_ray.config.forms import config_hash, flatten, from_dict, nest, result_keys, to_dict
from sapf_ray.config.grounding import GroundingConfig
from sapf_ray.config.model import ModelConfig
from sapf_ray.config.privacy import PrivacyConfig
from sapf_ray.config.run import AFTERWARDS, EXECUTION_ONLY, RunConfig
from sapf_ray.config.saliency import (
    SaliencyConfig,
)
from sapf_ray.config.synthesis import SynthesisConfig
from sapf_ray.config.tracking import TrackingConfig
from sapf_ray.config.tuning import TuningConfig

__all__ = [
    "AFTERWARDS",
    "EXECUTION_ONLY",
    "AuditConfig",
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvolutionConfig",
    "FinetuneConfig",
    "GroundingConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "SaliencyConfig",
    "SynthesisConfig",
    "TrackingConfig",
    "TuningConfig",
    "config_hash",
    "flatten",
    "from_dict",
    "nest",
    "result_keys",
    "to_dict",
]
