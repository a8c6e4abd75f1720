"""The configuration of a run: frozen sections of settings that cannot hold a wrong value."""

from sgan_dist.config.identity import FREE_AT_RESUME, POOLED, SETTINGS, result_settings, resumable
from sgan_dist.config.names import RENAMED_NETWORKS
from sgan_dist.config.reading import find_config, load, load_config, parse, save
from sgan_dist.config.settings import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EmaConfig,
    LossConfig,
    MachineConfig,
    ModelConfig,
    OptimConfig,
    RemoteConfig,
    StreamConfig,
    TeacherAugmentConfig,
    TrackingConfig,
    TrainConfig,
)  # fmt: skip

__all__ = [
    "FREE_AT_RESUME", "POOLED", "RENAMED_NETWORKS", "SETTINGS", "AugmentConfig", "BatchConfig",
    "CheckpointConfig", "Config", "DataConfig", "EmaConfig", "LossConfig", "MachineConfig",
    "ModelConfig", "OptimConfig", "RemoteConfig", "StreamConfig", "TeacherAugmentConfig",
    "TrackingConfig", "TrainConfig", "find_config", "load", "load_config", "parse",
    "result_settings", "resumable", "save",
]  # fmt: skip
