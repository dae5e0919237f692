"""What differs between the tasks: the head, the loss, how logits are read, and the scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa.downstream import metrics
from gmm_jepa.downstream.augment import SpecAugment
from gmm_jepa.downstream.data import Labelled, place
from gmm_jepa.downstream.model import CtcHead, PooledHead, Probe
from gmm_jepa.downstream.settings import CtcSettings, ProbeSettings, TaskName
from gmm_jepa.downstream.vocabulary import (
    CharacterVocabulary,
    SlotVocabulary,
    Vocabulary,
    slot_types,
)
from gmm_jepa.errors import InputError, require


class Task(ABC):
    """A task on answers that are strings.

    Attributes:
        name: asr, er or sf.
        scores: names of the scores, the one that chooses first.
        higher_is_better: of that one.
        batches_by_length: like lengths are batched together.
    """

    name: TaskName
    scores: tuple[str, ...]
    higher_is_better: bool
    batches_by_length: bool

    @abstractmethod
    def build(self, n_layers: int, width: int, settings: ProbeSettings) -> Probe:
        """A fresh model, from PyTorch's global generator."""

    @abstractmethod
    def loss(self, logits: Tensor, lengths: Tensor, answers: Sequence[str]) -> Tensor:
        """Mean over the batch, a scalar on the logits' device."""

    @abstractmethod
    def read(self, logits: Tensor, lengths: Tensor) -> list[str]:
        """The answers of a batch of logits."""

    @abstractmethod
    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """All `scores`, in percent."""


class CtcTask(Task):
    """Tokens by connectionist temporal classification, read greedily."""

    vocabulary: Vocabulary
    batches_by_length = True

    def build(self, n_layers: int, width: int, settings: ProbeSettings) -> Probe:
        """BiLSTM on augmented features."""
        assert isinstance(settings, CtcSettings)
        head = CtcHead(
            width,
            len(self.vocabulary),
            projection=settings.projection,
            rnn_layers=settings.rnn_layers,
            rnn_width=settings.rnn_width,
            dropout=settings.dropout,
        )
        return Probe(n_layers, head, SpecAugment(settings.augment, settings.seed))

    def loss(self, logits: Tensor, lengths: Tensor, answers: Sequence[str]) -> Tensor:
        """CTC of logits (B, T, V); an answer that needs more frames than there are counts zero."""
        tokens = [torch.tensor(self.vocabulary.encode(answer)) for answer in answers]
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(tokens).to(logits.device),
            lengths,
            torch.tensor([len(t) for t in tokens]),
            blank=self.vocabulary.blank,
            zero_infinity=True,
        )

    def read(self, logits: Tensor, lengths: Tensor) -> list[str]:
        """The likeliest token of every frame, repeats merged, blanks dropped."""
        answers = []
        for row, n in zip(logits.argmax(-1).cpu(), lengths.tolist()):
            merged = torch.unique_consecutive(row[:n]).tolist()
            kept = [token for token in merged if token != self.vocabulary.blank]
            answers.append(self.vocabulary.decode(kept))
        return answers


class Recognition(CtcTask):
    """Speech recognition: characters, word error rate."""

    name: TaskName = "asr"
    scores = ("wer", "cer")
    higher_is_better = False

    def __init__(self) -> None:
        require("jiwer", extra="probe")  # the scores need it, and they come last
        self.vocabulary = CharacterVocabulary()

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Word and character error rate."""
        return {
            "wer": metrics.word_error_rate(hypotheses, references),
            "cer": metrics.character_error_rate(hypotheses, references),
        }


class SlotFilling(CtcTask):
    """Slot filling: characters and slot tags, F1 of slot types."""

    name: TaskName = "sf"
    scores = ("slot_type_f1", "slot_value_cer")
    higher_is_better = True

    def __init__(self, kinds: Sequence[str]) -> None:
        self.vocabulary = SlotVocabulary(kinds)

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """F1 of slot types, character error rate of slot values."""
        return {
            "slot_type_f1": metrics.slot_type_f1(hypotheses, references),
            "slot_value_cer": metrics.slot_value_cer(hypotheses, references),
        }


class Classification(Task):
    """One class an utterance: emotions, or any other label."""

    name: TaskName = "er"
    scores = ("accuracy",)
    higher_is_better = True
    batches_by_length = False

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._number = {name: i for i, name in enumerate(self.classes)}

    def build(self, n_layers: int, width: int, settings: ProbeSettings) -> Probe:
        """Mean over frames between two linear layers."""
        head: nn.Module = PooledHead(width, len(self.classes), projection=settings.projection)
        return Probe(n_layers, head, None)

    def loss(self, logits: Tensor, lengths: Tensor, answers: Sequence[str]) -> Tensor:
        """Cross-entropy of logits (B, C)."""
        truth = torch.tensor([self._number[answer] for answer in answers])
        return F.cross_entropy(logits, truth.to(logits.device))

    def read(self, logits: Tensor, lengths: Tensor) -> list[str]:
        """The likeliest class."""
        return [self.classes[i] for i in logits.argmax(-1).tolist()]

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Share of right answers."""
        return {"accuracy": metrics.accuracy(hypotheses, references)}


def task_for(name: TaskName, data: Labelled) -> Task:
    """The task, with the classes or slots that occur in the data.

    Raises:
        InputError: there is only one class or no slot, or one occurs outside the train part only.
        ImportError: a package that the scores need is absent.
    """
    if name == "asr":
        return Recognition()
    if name == "sf":
        kinds = slot_types(data.answers)
        if not kinds:
            raise InputError(f"{data.key}: no slot (B-type value E-type) in any line")
        return SlotFilling(kinds)
    classes = sorted(set(data.answers))
    if len(classes) < 2:
        raise InputError(f"{data.key}: expected two classes or more, got only {classes[0]!r}")
    for fold in data.folds:
        learnt = {data.answers[i] for i in fold.train}
        for i in (*fold.dev, *fold.test):
            if data.answers[i] not in learnt:
                together = f", as each {data.split_by} is in one part: try --split-by utterance"
                raise InputError(
                    f"{place(data.corpus, i)}: class {data.answers[i]!r} does not occur in the "
                    f"train part{together if data.split_by else ''}"
                )
    return Classification(classes)
