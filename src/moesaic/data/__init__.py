"""Text to batches: sources, tokenizer, split, packing, and loaders that resume exactly.

`prepare_data(DataConfig(...), cache_dir)` does it all; its stages, in order and a file each:

    sources ─► Document ─► split ─► tokenise ─► store (files) ─► packing ─► loader
    python_corpus, text_files, hf_datasets      memory-mapped    (T)         (B, T)

Letters in tensor names: B sequences in a batch, T tokens in a sequence.
"""

from moesaic.data.config import (
    DataConfig,
    DatasetsSource,
    JsonlSource,
    MixtureStretch,
    PretrainedTokenizer,
    ProblemsSource,
    PythonSource,
    Source,
    TextSource,
    TokenizerConfig,
    TrainBPE,
)
from moesaic.data.documents import Document
from moesaic.data.loader import OrderedBatches, TokenBatches
from moesaic.data.mixture import MixedBatches
from moesaic.data.objective import (
    UL2,
    CausalLM,
    MixedObjective,
    ObjectiveConfig,
    ObjectivePart,
    PrefixLM,
    SpanCorruption,
    Stage,
    StagedObjective,
)
from moesaic.data.objective.build import TrainingObjective
from moesaic.data.packing import IGNORED_LABEL, Batch, PackedSequences
from moesaic.data.prepare import PreparedData, prepare_data
from moesaic.data.problems import Problem, held_out_problems
from moesaic.data.sources import read_documents
from moesaic.data.summary import Amount, DataSummary
from moesaic.data.text_batches import TextBatches
from moesaic.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "IGNORED_LABEL",
    "UL2",
    "Amount",
    "Batch",
    "CausalLM",
    "DataConfig",
    "DataSummary",
    "DatasetsSource",
    "Document",
    "JsonlSource",
    "MixedBatches",
    "MixedObjective",
    "MixtureStretch",
    "ObjectiveConfig",
    "ObjectivePart",
    "OrderedBatches",
    "PackedSequences",
    "PrefixLM",
    "PreparedData",
    "PretrainedTokenizer",
    "Problem",
    "ProblemsSource",
    "PythonSource",
    "Source",
    "SpanCorruption",
    "Stage",
    "StagedObjective",
    "TextBatches",
    "TextSource",
    "TokenBatches",
    "TokenizerConfig",
    "TrainBPE",
    "TrainingObjective",
    "held_out_problems",
    "load_tokenizer",
    "prepare_data",
    "read_documents",
    "train_tokenizer",
]
