"""Training: a run in YAML, a loop on plain torch, checkpoints that resume exactly, and hooks for HF Trainer."""

from __future__ import annotations

from moesaic.train.alerts import AlertsConfig
from moesaic.train.balance_callback import BalanceCallback
from moesaic.train.checkpoint import CheckpointStore, check_same_run, load_state
from moesaic.train.config import TraceConfig, TrainConfig
from moesaic.train.evaluate import Evaluation, evaluate, overall
from moesaic.train.hf_trainer import RoutingMetricsCallback, RoutingStepCallback
from moesaic.train.load import check_weight_files, load_model
from moesaic.train.loop import Trainer, TrainResult, train
from moesaic.train.metrics import StepMetrics, read_metrics
from moesaic.train.model import build_model
from moesaic.train.run import RunConfig
from moesaic.train.schedule import (
    ConstantSchedule,
    CosineSchedule,
    InverseSquareRootSchedule,
    Schedule,
    StepSchedule,
    WSDSchedule,
)
from moesaic.train.stock_balance import Balancer, balance
from moesaic.train.trace_callback import TraceCallback

__all__ = [
    "AlertsConfig",
    "BalanceCallback",
    "Balancer",
    "CheckpointStore",
    "ConstantSchedule",
    "CosineSchedule",
    "Evaluation",
    "InverseSquareRootSchedule",
    "RoutingMetricsCallback",
    "RoutingStepCallback",
    "RunConfig",
    "Schedule",
    "StepMetrics",
    "StepSchedule",
    "TraceCallback",
    "TraceConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WSDSchedule",
    "balance",
    "build_model",
    "check_same_run",
    "check_weight_files",
    "evaluate",
    "load_model",
    "load_state",
    "overall",
    "read_metrics",
    "train",
]
