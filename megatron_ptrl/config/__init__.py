"""One frozen dataclass per concern; the flags, the YAML keys and `--print_config` come from the fields.

Sizes are in tokens or samples, times in seconds, loss terms in nats. A field named like one of Megatron-Core's
`TransformerConfig` means the same thing.
"""

from megatron_ptrl.config.assemble import AssembleConfig, ThinkingFilterConfig, ThinkReportConfig
from megatron_ptrl.config.loss import DEFAULT_CHUNK_TOKENS, DEFAULT_TOP_K, LossConfig, RewardShaping
from megatron_ptrl.config.model import ModelConfig, ParallelConfig
from megatron_ptrl.config.pretrain import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    PretrainConfig,
    SampleConfig,
    TrainConfig,
)
from megatron_ptrl.config.remit import RemitConfig
from megatron_ptrl.config.score import ScoreConfig, SelectConfig
from megatron_ptrl.config.segment import CleanConfig, QualityConfig, SegmentConfig, SplitConfig, TaskConfig
from megatron_ptrl.config.think import ExecutorConfig, SamplingConfig, ServerConfig, ThinkConfig
from megatron_ptrl.config.tools import DoctorConfig, ReportConfig, TokenizeConfig

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "DEFAULT_TOP_K",
    "AssembleConfig",
    "CheckpointConfig",
    "CleanConfig",
    "DataConfig",
    "DoctorConfig",
    "ExecutorConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PretrainConfig",
    "QualityConfig",
    "RemitConfig",
    "ReportConfig",
    "RewardShaping",
    "SampleConfig",
    "SamplingConfig",
    "ScoreConfig",
    "SegmentConfig",
    "SelectConfig",
    "ServerConfig",
    "SplitConfig",
    "TaskConfig",
    "ThinkConfig",
    "ThinkReportConfig",
    "ThinkingFilterConfig",
    "TokenizeConfig",
    "TrainConfig",
]
