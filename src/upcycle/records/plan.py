"""Checkpoints, and the plan of how they become experts."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from upcycle.records.record import Count, Record, Sha256, optional

Gram = NDArray[np.float64]
"""Inner products of task vectors: (experts, experts)."""
AdapterMerge = Literal["average", "apart", "product"]


class Checkpoint(Record):
    """A snapshot of the dense model, or an adapter, that can become an expert."""

    name: str
    path: str
    """A folder: relative to the stage's for our own, absolute for the user's."""
    epoch: float | None = Field(None, ge=0)
    sha256: Sha256 | None = None
    """Hash of a checkpoint of the user's, so that what is built from it notices when it changes in place."""


class Expert(Record):
    """One row of the expansion plan: a checkpoint, the base itself, or a child of two earlier experts."""

    name: str
    kind: Literal["checkpoint", "base", "child"]
    checkpoint: Count | None = None
    """Which of the prepared checkpoints it is."""
    parents: tuple[Count, ...] = ()
    weights: tuple[FiniteFloat, ...] = ()
    similarity: FiniteFloat | None = None
    """How alike the parents were when they were chosen."""

    @property
    def merged_from(self) -> str:
        """`0.26 E0 + 0.74 E1`; empty for an expert that is not merged."""
        return " + ".join(f"{w:.2f} E{p}" for p, w in zip(self.parents, self.weights, strict=True))


class ExpansionPlan(Record):
    """How m experts come from n checkpoints; those come first, in order, then the base if it is kept, then children.

    `gram[i][j]` is the inner product of the FFN task vectors of experts i and j (for children: measured, or the
    expectation over DARE's masks, see `stages.expert_expansion.plan`).
    """

    experts: Annotated[tuple[Expert, ...], Field(min_length=1)]
    merge: Literal["dare", "linear", "slerp", "ties", "dare_ties"]
    drop_rate: float = Field(ge=0, le=0.95)
    seed: Count
    similarity: Literal["cosine", "l2"]
    gram: tuple[tuple[FiniteFloat, ...], ...]
    adapters: AdapterMerge | None = None
    """How LoRA experts are merged; None: experts are whole FFNs."""
    perturb: Literal["none", "noise", "drop"] = "none"
    """How copies are made different (`merging.perturb`), at assembly; `gram` is from before."""
    perturb_rate: float = Field(0.0, ge=0, le=1)
    noise_std: float = Field(0.0, ge=0)
    granularity: int = Field(1, ge=1)
    """G of a MoE's lineage: its experts e G to e G + G - 1 are the slices of expert e."""
    channels: Literal["contiguous", "strided", "random"] = "contiguous"
    """Which channels are in a slice."""
    flops_over_dense: Annotated[float, Field(gt=0)] | None = optional()
    """Of a MoE's lineage: FLOPs of a token over the dense model's, scores of attention left out in both."""
    spread: float = 1.0
    """Every expert E but the base becomes L + spread (E - L) at assembly, L the last checkpoint; `gram` is older."""

    @model_validator(mode="after")
    def _each_expert_has_its_origin(self) -> "ExpansionPlan":
        for number, expert in enumerate(self.experts):
            child = expert.kind == "child"
            if (expert.checkpoint is not None) != (expert.kind == "checkpoint"):
                raise ValueError(f"expert {number} is a {expert.kind} with checkpoint {expert.checkpoint}")
            if len(expert.parents) != 2 * child or len(expert.weights) != 2 * child:
                raise ValueError(f"expert {number} is a {expert.kind} with {len(expert.parents)} parents")
            if any(parent >= number for parent in expert.parents):
                raise ValueError(f"expert {number} has parents {expert.parents}, which do not come before it")
        return self

    @model_validator(mode="after")
    def _children_come_last_and_gram_is_square(self) -> "ExpansionPlan":
        kinds = [expert.kind == "child" for expert in self.experts]
        if kinds != sorted(kinds):
            raise ValueError("a child comes before an expert that is none")
        if {len(self.experts)} != {len(self.gram), *map(len, self.gram)}:
            raise ValueError(f"gram is not {len(self.experts)} by {len(self.experts)}")
        return self

    def spread_of(self, number: int) -> float:
        """That of an expert: the base is one on purpose and stays where it is."""
        return 1.0 if self.experts[number].kind == "base" else self.spread

    @property
    def measured(self) -> str:
        """`FFN task vectors`, and whether experts have moved since: what `gram` and similarities are of."""
        return f"FFN task vectors{f', before expand.spread={self.spread:g}' if self.spread != 1 else ''}"

    @property
    def labels(self) -> list[str]:
        """`E0 checkpoint-9` and so on: what tables and pictures call the experts."""
        return [f"E{number} {expert.name}" for number, expert in enumerate(self.experts)]

    @property
    def lines(self) -> list[str]:
        """`E5 child-5 = 0.26 E0 + 0.74 E1 (their similarity 0.65)` and so on: where each expert comes from.

        Of slices, which of the model's experts they are too.
        """
        lines = []
        for number, (label, expert) in enumerate(zip(self.labels, self.experts, strict=True)):
            merged = f" = {expert.merged_from} (their similarity {expert.similarity:.3f})" if expert.parents else ""
            first = number * self.granularity
            cut = f" (slices: experts {first} to {first + self.granularity - 1})" if self.granularity > 1 else ""
            lines.append(label + merged + cut)
        return lines

    @property
    def children(self) -> tuple[Expert, ...]:
        return tuple(expert for expert in self.experts if expert.kind == "child")

    @property
    def sources(self) -> tuple[Expert, ...]:
        """The experts that exist as dense models."""
        return self.experts[: len(self.experts) - len(self.children)]

    @property
    def similarities(self) -> Gram:
        """Of every two experts, as the plan measures them."""
        return similarities(np.array(self.gram), self.similarity)


def similarities(gram: Gram, kind: str) -> Gram:
    """Cosine, or negative squared L2 distance, of every two task vectors; the cosine with a zero vector is nan."""
    norms = gram.diagonal()
    if kind == "l2":
        return 2 * gram - norms[:, None] - norms[None, :]
    with np.errstate(invalid="ignore"):
        return gram / np.sqrt(np.outer(norms, norms))
