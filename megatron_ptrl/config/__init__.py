"""One frozen dataclass per concern; the flags, the YAML keys and `--print_config` come from the fields.

Sizes are in tokens or samples, times in seconds, loss terms in nats. A field named like one of Megatron-Core's
`TransformerConfig` means the same thing.
"""

from megatron_ptrl.config.assemble import AssembleConfig, ThinkingFilterConfig
from megatron_ptrl.config.convert import ConvertConfig
from megatron_ptrl.config.evaluate import AnswersConfig, EvaluateConfig, HarnessConfig
from megatron_ptrl.config.judge import GateConfig, JudgeConfig, LexicalConfig, VerifyConfig
from megatron_ptrl.config.loss import DEFAULT_CHUNK_TOKENS, DEFAULT_TOP_K, LossConfig, RewardShaping
from megatron_ptrl.config.model import ModelConfig, ParallelConfig
from megatron_ptrl.config.policy import PolicyLossConfig
from megatron_ptrl.config.pretrain import DataConfig, PretrainConfig, SampleConfig, TrainConfig
from megatron_ptrl.config.remit import RemitConfig
from megatron_ptrl.config.rl import PromptsConfig, RLConfig, RolloutConfig
from megatron_ptrl.config.rollout_server import EngineConfig, RolloutServerConfig
from megatron_ptrl.config.run import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    PaceConfig,
    RowsConfig,
    RunConfig,
)
from megatron_ptrl.config.score import ScoreConfig, SelectConfig
from megatron_ptrl.config.segment import CleanConfig, QualityConfig, SegmentConfig, SplitConfig, TaskConfig
from megatron_ptrl.config.sft import ChatDataConfig, SFTConfig, SFTTrainConfig
from megatron_ptrl.config.think import ExecutorConfig, GeneratorConfig, SamplingConfig, ServerConfig, ThinkConfig
from megatron_ptrl.config.think_report import AskConfig, ThinkReportConfig
from megatron_ptrl.config.tools import DoctorConfig, ReportConfig, TokenizeConfig

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "DEFAULT_TOP_K",
    "AnswersConfig",
    "AskConfig",
    "AssembleConfig",
    "ChatDataConfig",
    "CheckpointConfig",
    "CleanConfig",
    "ConvertConfig",
    "DataConfig",
    "DoctorConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExecutorConfig",
    "GateConfig",
    "GeneratorConfig",
    "HarnessConfig",
    "JudgeConfig",
    "LexicalConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PaceConfig",
    "ParallelConfig",
    "PolicyLossConfig",
    "PretrainConfig",
    "PromptsConfig",
    "QualityConfig",
    "RLConfig",
    "RemitConfig",
    "ReportConfig",
    "RewardShaping",
    "RolloutConfig",
    "RolloutServerConfig",
    "RowsConfig",
    "RunConfig",
    "SFTConfig",
    "SFTTrainConfig",
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
    "VerifyConfig",
]
