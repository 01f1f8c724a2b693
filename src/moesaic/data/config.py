"""What to train on, as configuration: sources, tokenizer, sequences and batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.data.objective.check import check_lengths, check_sentinels
from moesaic.data.objective.config import MODES, CausalLM, ObjectiveConfig, ul2_of
from moesaic.errors import ConfigError

PythonDomain = Literal["prose", "code", "tables", "documentation", "chat", "numbers"]
DEMO_DOMAINS: tuple[PythonDomain, ...] = ("prose", "code")
ProblemDomain = Literal["sums", "stories", "comparisons", "orders"]
PROBLEM_DOMAINS: tuple[ProblemDomain, ...] = ("sums", "stories", "comparisons", "orders")


class PythonSource(Config):
    """What every machine with Python has: its documentation topics (domain `prose`), the sources of its standard library
    (domain `code`) and its table of Unicode characters (domain `tables`); made of them, all of its documentation (domain
    `documentation`: the topics and the docstrings of the library), questions about functions with docstrings as answers
    (domain `chat`), and the tables of numbers that its tests compare with (domain `numbers`; some packages of Python leave
    them out).

    Attributes:
        domains: which of them to read.
        max_bytes: reading a domain stops with the document that reaches this many UTF-8 bytes; None for all of it
            (about 0.5 MB of prose, 9 MB of code, 1.5 MB of tables, and of the others 2, 2 and 4 MB).
    """

    type: Literal["python"] = "python"
    domains: tuple[PythonDomain, ...] = Field(default=DEMO_DOMAINS, min_length=1)
    max_bytes: PositiveInt | None = None


class ProblemsSource(Config):
    """Problems with worked solutions, made from a seed: sums, word problems, comparisons of two sums, and orders of
    several names. Each is a document: a question, steps, and the answer after `#`.

    A problem's side of the split depends on what is to be computed, not on its wording.

    Attributes:
        domains: which kinds to make.
        count: problems of each kind; some may be equal.
        steps: numbers of steps to draw from: changes of a sum, or names between the first and the last of an order.
            Comparisons have a step for each side.
        seed: of the problems.
    """

    type: Literal["problems"] = "problems"
    domains: tuple[ProblemDomain, ...] = Field(default=PROBLEM_DOMAINS, min_length=1)
    count: PositiveInt = 10_000
    steps: tuple[Annotated[int, Field(ge=1, le=10)], ...] = Field(default=(2,), min_length=1)
    seed: NonNegativeInt = 0


class _CappedSource(Config):
    """Limits common to all sources that a user brings.

    Attributes:
        domain: name under which these documents are counted and evaluated.
        max_documents: stop after this many documents; None for all.
        max_bytes: stop with the document that reaches this many UTF-8 bytes; None for all.
    """

    domain: str = Field(default="text", min_length=1)
    max_documents: PositiveInt | None = None
    max_bytes: PositiveInt | None = None


class TextSource(_CappedSource):
    """UTF-8 text files; each file is a document unless `separator` is set.

    Attributes:
        paths: files, folders (every file below, hidden ones left out) or globs (`notes/**/*.md`), read in this order;
            files of one folder or glob in sorted order.
        separator: cut each file into documents at this string, e.g. a blank line or `<|endoftext|>`.
    """

    type: Literal["text"] = "text"
    paths: tuple[str, ...] = Field(min_length=1)
    separator: str | None = Field(default=None, min_length=1)


class JsonlSource(_CappedSource):
    """Files with one JSON object a line, each a document.

    Attributes:
        paths: files, folders or globs, as in `TextSource`.
        text_field: key that holds the text.
        domain_field: key that holds the domain; None to use `domain` for all.
    """

    type: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...] = Field(min_length=1)
    text_field: str = "text"
    domain_field: str | None = None


class DatasetsSource(_CappedSource):
    """A dataset of the HF `datasets` library; each row is a document. The fields are those of `load_dataset`.

    Attributes:
        path: hub name, local folder, or the name of a format (`json`, `parquet`, `text`) together with `data_files`.
        name: configuration of the dataset.
        data_files: files of the dataset: a path, several, or a mapping from split to paths.
        split: which split to read.
        revision: hub revision; fix it when results must be repeated.
        streaming: read rows as they arrive, in bounded memory and without a local copy.
        text_field: column that holds the text.
        domain_field: column that holds the domain; None to use `domain` for all.
    """

    type: Literal["datasets"] = "datasets"
    path: str
    name: str | None = None
    data_files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    text_field: str = "text"
    domain_field: str | None = None


Source = Annotated[
    PythonSource | ProblemsSource | TextSource | JsonlSource | DatasetsSource, Field(discriminator="type")
]


class TrainBPE(Config):
    """Train a byte-level BPE tokenizer on the training documents.

    Attributes:
        vocab_size: tokens in the vocabulary, counting 256 bytes and 2 special tokens. A small corpus may yield fewer:
            size the model by `len(tokenizer)`.
        max_bytes: learn merges from the first this many bytes of training text.
        sentinels: also give it this many sentinels, `<extra_id_0>` and so on, and the mode tokens `[NLU]`, `[NLG]` and
            `[S2S]`, for `objective: {type: ul2}`. They count in `vocab_size`; 0 gives none of either.
    """

    type: Literal["train_bpe"] = "train_bpe"
    vocab_size: int = Field(default=4096, ge=258)
    max_bytes: PositiveInt = 256 * 2**20
    sentinels: NonNegativeInt = 0

    @property
    def extra_tokens(self) -> tuple[str, ...]:
        """Names of the tokens beside text and its end."""
        return (*MODES, *(f"<extra_id_{number}>" for number in range(self.sentinels))) if self.sentinels else ()

    @model_validator(mode="after")
    def _room(self) -> TrainBPE:
        least = 258 + len(self.extra_tokens)
        if self.vocab_size < least:
            raise ConfigError(
                "vocab_size", self.vocab_size, f"has no room for {self.sentinels} sentinels", f"use {least} or more"
            )
        return self


class PretrainedTokenizer(Config):
    """Use an existing tokenizer.

    Attributes:
        path: folder or hub name, as `AutoTokenizer.from_pretrained` takes it.
    """

    type: Literal["pretrained"] = "pretrained"
    path: str


TokenizerConfig = Annotated[TrainBPE | PretrainedTokenizer, Field(discriminator="type")]


class MixtureStretch(Config):
    """Part of the training, and of what its batches are mixed.

    Attributes:
        until: the stretch ends with this batch of the run, counted from 1 (with `accumulation_steps: 1` a batch is a
            step); None for the rest of the run.
        shares: share of each domain in the training sequences, in any unit; a domain that is not named has none.
    """

    until: PositiveInt | None = None
    shares: dict[str, PositiveFloat] = Field(min_length=1)


class DataConfig(Config):
    """The `data` section of a run.

    Attributes:
        sources: where documents come from, read in this order.
        tokenizer: how text becomes tokens.
        sequence_length: tokens in a training sequence (T).
        batch_size: sequences in a batch over all data-parallel ranks together (B), before accumulation.
        validation_fraction: expected share of documents held out. A document's side depends on its text alone: it
            stays when documents are added or reordered, and equal texts are never on both sides.
        seed: seed of the order of training sequences; it does not move documents between the sides.
        mixture: of which domains training sequences come, in stretches one after the other; each domain is then cut into
            sequences by itself. None takes all text, a domain as often as it has text. Validation has all domains in
            any case.
        objective: what training sequences ask for: the next token, or what denoisers hid (UL2), mixed or one after the
            other; docs/openmoe.md. Validation is always causal language modelling.
        domains_are: tell the model the domain of each token as its "modality", or that of each sequence as its "task", for
            routers and losses that look at them. Domains are numbered in the order in which they are read. With "task"
            each domain is cut into training sequences by itself, so that none holds two; None tells the model nothing.
        isolate_documents: restart positions at each document, so that attention does not cross documents, and predict
            no document's first token from the one before it. Needs `use_cache=False`; see docs/data.md.
    """

    sources: tuple[Source, ...] = Field(default=(PythonSource(),), min_length=1)
    tokenizer: TokenizerConfig = TrainBPE()
    sequence_length: int = Field(default=256, ge=2)
    batch_size: PositiveInt = 16
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    seed: NonNegativeInt = 0
    mixture: tuple[MixtureStretch, ...] | None = Field(default=None, min_length=1)
    objective: ObjectiveConfig = CausalLM()
    domains_are: Literal["modality", "task"] | None = None
    isolate_documents: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        ends = [stretch.until for stretch in self.mixture or ()]
        for number, end in enumerate(ends):
            last = number == len(ends) - 1
            if last and end is not None:
                raise ConfigError(
                    f"mixture.{number}.until", end, "leaves the rest open", "remove it from the last stretch"
                )
            if not last and (end is None or end <= (ends[number - 1] or 0 if number else 0)):
                raise ConfigError(
                    f"mixture.{number}.until", end, "does not end after the stretch before it", "write rising numbers"
                )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> DataConfig:
        check_lengths(self.objective, self.sequence_length)
        if isinstance(self.tokenizer, TrainBPE):
            check_sentinels(self.objective, self.sequence_length, self.tokenizer.sentinels)
        if self.isolate_documents and ul2_of(self.objective):
            raise ConfigError(
                "isolate_documents", True, "does not go with denoising, whose texts span documents", "set it to false"
            )
        return self
