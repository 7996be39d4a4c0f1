"""A model under study: its weights, its texts, and how much each policy changes what it says.

    subject = Subject.load("tiny-lm", texts=(), documents=24, device="cuda")
    subject.run(Policy("split-6", "absolute", 0.03), length=4096)      -> Outcome, per document
    subject.at_density(Policy("oracle", "share"), 4096, 0.25)          -> Outcome

A *passage* is a stretch of one text: PASSAGE tokens, fewer where the texts are short, a window's where that is longer;
a window is its first `length` tokens, so that windows never overlap. Most passages are judged; CALIBRATION of them,
drawn at random, are kept apart: amounts are set on those. Outcomes are remembered: what two experiments ask for runs
once.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.thesis import shares
from benchmarks.thesis.attention import Policies, PolicyAttention
from benchmarks.thesis.policies import Criticals, Policy
from benchmarks.thesis.quality import Change, compare
from sparsify.errors import OptionError
from sparsify.measurement import encode
from sparsify.models.loading import HELDOUT_TEXT, TINY_LM, load_model, read_text
from sparsify.models.tasks import Rows, heldout_tokens

PASSAGE = 16_384  # tokens: about 40 pages
CALIBRATION = 3  # passages
TOKENS = 98_304  # judged per length, at most
LOGITS = {"cpu": 1 << 27, "cuda": 1 << 29}  # of one forward pass
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Outcome:
    """What a policy did to the judged windows of one length; one value per window each, see `Change`."""

    policy: str
    length: int
    amount: float
    densities: list[float]
    densities_last: list[float]  # over the last quarter of the query blocks
    change: Change

    @property
    def density(self) -> float:
        return sum(self.densities) / len(self.densities)

    @property
    def kl(self) -> float:
        return self.change.mean("kl")

    @property
    def point(self) -> tuple[float, float]:
        return self.density, self.kl

    @property
    def last_point(self) -> tuple[float, float]:
        """Density and KL of the last quarter."""
        return sum(self.densities_last) / len(self.densities_last), self.change.mean("kl_last")

    def to_dict(self) -> dict[str, Any]:
        return {"policy": self.policy, "length": self.length, "amount": round(self.amount, 6),
                "density": round(self.density, 5), "kl": round(self.kl, 7),
                "last_quarter": {"density": round(self.last_point[0], 5), "kl": round(self.last_point[1], 7)},
                "loss_dense": round(self.change.mean("loss_dense"), 5),
                "loss_rise": round(self.change.loss_rise(), 6),
                "windows": {"density": [round(d, 5) for d in self.densities],
                            "kl": [round(x, 7) for x in self.change.kl],
                            "loss_rise": [round(b / a - 1, 6) for a, b in zip(self.change.loss_dense, self.change.loss,
                                                                              strict=True)]}}


@dataclass
class Subject:
    """See the head of this file. `forward` takes ids [B, L] to logits [B, L, vocabulary] through `attention`."""

    name: str
    forward: Callable[[Tensor], Tensor]
    attention: PolicyAttention
    layers: int
    heads: int
    vocabulary: int
    texts: list[Tensor]
    documents: int
    device: torch.device
    token_of: Callable[[int], str]
    _dense: dict[int, list[Tensor]] = field(default_factory=dict)
    _outcomes: dict[tuple[Any, int], Outcome] = field(default_factory=dict)
    _criticals: dict[tuple[Policy, int], Criticals] = field(default_factory=dict)

    @classmethod
    def load(cls, model: str, texts: Sequence[Path], documents: int, device: str) -> "Subject":
        """tiny-lm, or what `load_model` takes; texts: files, each a document, none for the shipped held-out text.

        Raises ModelError, TextError, OptionError.
        """
        attention = PolicyAttention()
        where = torch.device(device)
        place = None if model == "tiny-lm" else model
        loaded = load_model(place, device=device)
        name = _register(attention)
        network: Any = loaded.model
        network.set_attn_implementation(name)
        config = network.config.get_text_config()
        if place is None and not texts:
            whole = torch.from_numpy(heldout_tokens(TINY_LM).astype("int64"))
            pieces = _split(whole, loaded.tokenizer.convert_tokens_to_ids(SEPARATOR))
        else:
            written = [read_text(path) for path in texts or [HELDOUT_TEXT]]
            pieces = [encode(part, loaded.tokenizer) for text in written for part in text.split(SEPARATOR)]
        title = loaded.name.split("-Instruct")[0].split(".")[0]
        return cls(title, lambda ids: network(ids, use_cache=False).logits, attention, config.num_hidden_layers,
                   config.num_attention_heads, config.vocab_size, pieces, documents, where,
                   functools.cache(lambda token: loaded.tokenizer.decode([token])))

    def windows(self, length: int) -> Tensor:
        """Judged windows [windows, length]."""
        return self._split_windows(length)[0]

    def calibration(self, length: int) -> Tensor:
        """Windows that no outcome is taken from [windows, length]."""
        return self._split_windows(length)[1]

    def _split_windows(self, length: int) -> tuple[Tensor, Tensor]:
        wanted = sum(len(text) for text in self.texts) // (self.documents + CALIBRATION)
        size = max(length, min(PASSAGE, wanted))
        found = [text[at: at + length] for text in self.texts for at in range(0, len(text) - length + 1, size)]
        if len(found) < 2:
            raise OptionError(f"lengths holds {length} and the texts have {len(found)} passages that long; two are the "
                              "least, one to judge and one to calibrate. Give shorter lengths or more text.")
        random.Random(0).shuffle(found)
        kept_apart = min(CALIBRATION, max(1, len(found) // 4))
        judged = min(self.documents, len(found) - kept_apart, max(4, TOKENS // length))
        return torch.stack(found[kept_apart: kept_apart + judged]), torch.stack(found[:kept_apart])

    def batches(self, windows: Tensor) -> Iterator[Tensor]:
        """Windows in batches whose logits fit, on the device."""
        for batch in self.batches_of(windows, windows.shape[1]):
            yield batch.to(self.device)

    def batches_of(self, x: Tensor, length: int) -> tuple[Tensor, ...]:
        """Something with an entry a window of this length, in the same batches."""
        fitting = max(1, LOGITS[self.device.type] // (length * self.vocabulary))
        return x.split(1 if self.device.type == "cpu" else fitting)  # caches, not launches, are what counts there

    @torch.no_grad()
    def logits(self, ids: Tensor, policies: Policies, **context: Any) -> Tensor:
        """Logits [B, L, vocabulary] of ids [B, L] under a policy; `context` as in `PolicyAttention.under`."""
        with tensor_cores(), self.attention.under(policies, **context):
            return self.forward(ids)

    def run(self, policies: Policies, length: int, name: str | None = None) -> Outcome:
        """Judge a policy, or one policy (None: dense) per layer."""
        key = (tuple(policies) if isinstance(policies, Sequence) else policies, length)
        if key not in self._outcomes:
            change, densities, last = Change(), list[float](), list[float]()
            for ids, dense in zip(self.batches(self.windows(length)), self._dense_logits(length), strict=True):
                sparse = self.logits(ids, policies)
                densities += self.attention.tally.density().tolist()
                last += self.attention.tally.density(last_quarter=True).tolist()
                change.extend(compare(dense, sparse, ids))
            amount = policies.amount if isinstance(policies, Policy) else 0.0
            title = name or (str(policies.kind) if isinstance(policies, Policy) else "plan")
            outcome = self._outcomes[key] = Outcome(title, length, amount, densities, last, change)
            print(f"  {self.name} {length}: {title} at {amount:.5g}: density {outcome.density:.4f}, "
                  f"KL {outcome.kl:.5f}", flush=True)
        return self._outcomes[key]

    def at_density(self, kind: Policy, length: int, density: float) -> Outcome:
        """Judge a kind of policy at the amount that gives this density on the calibration windows."""
        return self.run(kind.at(self.criticals([kind], length)[0].amount(density)), length)

    @torch.no_grad()
    def criticals(self, kinds: Sequence[Policy], length: int) -> list[Criticals]:
        """Critical amounts of kinds of policy; those not known yet are gathered in one dense pass."""
        bare = [_measured_as(kind) for kind in kinds]
        missing = {kind: Criticals(kind) for kind in bare if (kind, length) not in self._criticals}
        names = {kind.estimator for kind in missing}

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
            for name in names:
                signals = shares.signals_of(name, q, k, scale)
                for kind, criticals in missing.items():
                    if kind.estimator == name:
                        criticals.add(signals, length)

        if missing:
            for ids in self.batches(self.calibration(length)):
                self.logits(ids, None, watch=look)
            self._criticals |= {(kind, length): criticals for kind, criticals in missing.items()}
        return [self._criticals[kind, length] for kind in bare]

    def answers(self, policies: Policies, rows: Rows, marked: Tensor | None = None,
                on_kept: Callable[[int, Tensor, Tensor], None] | None = None) -> tuple[list[bool], float]:
        """For every query of retrieval rows whether its answer is right (greedy), and the density, mean over rows.

        marked   bool [rows, key blocks]: protected, where the policy protects
        on_kept  called with layer, kept blocks and the numbers of the rows in this batch
        """
        right, densities = list[bool](), list[float]()
        for ids, at in zip(self.batches(rows.ids), self.batches_of(torch.arange(len(rows.ids)), rows.ids.shape[1]),
                           strict=True):
            protected = None if marked is None else marked[at].to(self.device)
            heard = None if on_kept is None else functools.partial(_with_rows, on_kept, at)
            best = self.logits(ids, policies, protected=protected, on_kept=heard).argmax(-1).cpu()
            densities += self.attention.tally.density().tolist()
            for row, chosen in zip(at.tolist(), best, strict=True):
                for answer in rows.answers[row]:
                    where = torch.tensor(answer)
                    right.append(bool((chosen[where - 1] == rows.ids[row][where]).all()))
        return right, sum(densities) / len(densities)

    def _dense_logits(self, length: int) -> list[Tensor]:
        """One tensor a batch, float16: its rounding costs a KL of 1e-5 (logits up to 32: steps of 2**-6)."""
        if length not in self._dense:
            self._dense.clear()
            self._dense[length] = [self.logits(ids, None).half() for ids in self.batches(self.windows(length))]
        return self._dense[length]


def _with_rows(on_kept: Callable[[int, Tensor, Tensor], None], rows: Tensor, layer: int, kept: Tensor) -> None:
    on_kept(layer, kept, rows)


def _measured_as(kind: Policy) -> Policy:
    """Variants and protection move an amount's density a little; the curve over densities takes care of that."""
    return Policy(kind.estimator, kind.rule, by=kind.by, sinks=kind.sinks, local=kind.local)


def _split(ids: Tensor, separator: int) -> list[Tensor]:
    ends = [*(ids == separator).nonzero()[:, 0].tolist(), len(ids)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [ids[start:end] for start, end in zip(starts, ends, strict=True) if end > start]


def _register(attention: PolicyAttention) -> str:
    """Make the attention known to transformers, which gives it no mask: it is causal by itself."""
    from transformers import AttentionInterface

    def call(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
             scaling: float | None = None, **others: Any) -> tuple[Tensor, None]:
        for name in ("sliding_window", "softcap", "s_aux"):
            if others.get(name) is not None:
                raise OptionError(f"model has attention with {name}; the experiments know plain causal attention only. "
                                  "Give another model.")
        return attention(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling).transpose(1, 2), None

    name = "sparsify_thesis"
    AttentionInterface.register(name, call)
    return name


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products in TF32 on CUDA; nothing changes on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
