"""Random attention programs: every spelling crossed with every other, compiled, and compared with eager.

A `Program` is data: how q, k and v are laid out, where the scale is, what hides keys and how it is applied, how the
softmax is spelled. `run` runs it. What the pass must rewrite of it says `Program.supported`; all of it must be right.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import attention_units, judge

LAYOUTS = ("heads", "folded", "length first", "single head", "grouped", "transposed", "values left", "loop", "chunks")
SCALES = ("none", "query", "key", "both", "multiply", "divide", "after mask", "tensor", "per head", "alpha")
MASKS = ("none", "triu", "tril", "arange", "window", "both sides", "chunk", "right padding", "left padding",
         "causal and padding", "documents", "causal documents", "prefix", "any", "ALiBi", "relative", "bias")
FILLS = ("-inf", "lowest", "-1e9")
STEPS = ("masked_fill", "masked_fill_", "where", "add", "multiply")
SOFTMAXES = ("functional", "method", "wide", "cast", "exp", "exp max", "late division", "log_softmax", "plus one",
             "plus one max", "sink")
REPEATS = ("none", "repeat_interleave", "expand", "index")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
REACH, CHUNK, CAP, SCALE = 3, 4, 3.0, 0.4


@dataclass(frozen=True)
class Program:
    """One attention: `run` says what the words mean. `heads` share `kv_heads`; `longer`: kv_len - q_len."""

    layout: str = "heads"
    scale: str = "none"
    mask: str = "none"
    fill: str = "-inf"
    step: str = "masked_fill"
    softmax: str = "functional"
    softcap: bool = False
    dropout: bool = False
    repeat: str = "none"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    q_len: int = 5
    longer: int = 0
    value_dim: int = 8
    seed: int = 0

    @property
    def supported(self) -> bool:
        """Whether the pass must rewrite all of it."""
        return self.dtype != torch.float64

    @property
    def sites(self) -> int:
        return {"loop": self.heads, "chunks": 2}.get(self.layout, 1)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call, in the op's layout: q [B, H, L, D], k and v [B, Hkv, S, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor  # 0-d
    head_scale: Tensor  # [H]
    keep: Tensor  # bool [B, S]
    ids: Tensor  # [B, S]
    table: Tensor  # [H, distances]
    bias: Tensor  # [H, L, S]
    shown: Tensor  # bool [B, 1, L, S]
    sinks: Tensor  # [H]

    @classmethod
    def of(cls, program: Program, longer: int = 0) -> "Inputs":
        """Random inputs; `longer` adds to both lengths."""
        rng = torch.Generator().manual_seed(program.seed)
        batch, heads, q_len = program.batch, program.heads, program.q_len + longer
        kv_len = q_len + program.longer

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(program.dtype)

        places = torch.arange(kv_len)
        first = torch.randint(1, kv_len + 1, (batch, 1), generator=rng)
        shown = torch.rand(batch, 1, q_len, kv_len, generator=rng) > 0.4
        shown[..., 0] = True
        return cls(
            normal(batch, heads, q_len, 8), normal(batch, program.kv_heads, kv_len, 8),
            normal(batch, program.kv_heads, kv_len, program.value_dim),
            torch.tensor(SCALE, dtype=program.dtype), torch.rand(heads, generator=rng).to(program.dtype),
            places >= kv_len - first if program.mask == "left padding" else places < first,
            (torch.rand(batch, kv_len, generator=rng) > 0.6).cumsum(-1),
            normal(heads, 64), normal(heads, q_len, kv_len), shown, normal(heads))

    def fixed(self) -> "Inputs":
        """The same, told to Dynamo: as in models, heads and head dims are numbers."""
        for name, dims in {"q": (1, 3), "k": (1, 3), "v": (1, 3), "head_scale": 0, "table": (0, 1), "bias": 0,
                           "shown": 1, "sinks": 0}.items():
            torch._dynamo.mark_static(getattr(self, name), dims)
        return self

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in vars(self).values()))


def run(program: Program, x: Inputs, wide: torch.dtype) -> Tensor:
    """The program; `wide` is what it upcasts to. Returns [B, H, L, Dv]."""
    hidden, bias = hide(program, x), add(program, x)
    if program.layout == "loop":
        share = program.heads // program.kv_heads
        outs = []
        for head in range(program.heads):
            mask = None if hidden is None else hidden[:, min(head, hidden.shape[1] - 1)]
            extra = None if bias is None else bias[:, head]
            q, k, v = x.q[:, head], x.k[:, head // share], x.v[:, head // share]
            outs.append(attend(program, x, q, k, v, mask, extra, x.head_scale[head], x.sinks[head].view(1, 1, 1), wide))
        return torch.stack(outs, 1)
    if program.layout == "chunks":
        half, k, v = x.q.shape[2] // 2, repeat(program, x.k), repeat(program, x.v)
        outs = []
        for rows in (slice(None, half), slice(half, None)):
            mask = hidden if hidden is None or hidden.shape[2] == 1 else hidden[:, :, rows]
            extra = bias if bias is None else bias[:, :, rows]
            outs.append(attend(program, x, x.q[:, :, rows], k, v, mask, extra, x.head_scale[:, None, None],
                               x.sinks[:, None, None], wide))
        return torch.cat(outs, 2)

    q, k, v, head_scale, sinks = x.q, x.k, x.v, x.head_scale[:, None, None], x.sinks[:, None, None]
    if program.layout == "grouped":
        groups = (program.kv_heads, program.heads // program.kv_heads)
        q, k, v = q.unflatten(1, groups), k.unsqueeze(2), v.unsqueeze(2)
        head_scale, sinks = head_scale.unflatten(0, groups), sinks.unflatten(0, groups)
        hidden, bias = ((m if m is None else m.unflatten(1, groups) if m.shape[1] > 1 else m.unsqueeze(2))
                        for m in (hidden, bias))
        return attend(program, x, q, k, v, hidden, bias, head_scale, sinks, wide).flatten(1, 2)
    k, v = repeat(program, k), repeat(program, v)
    if program.layout == "folded":
        shape = (program.batch, program.heads, -1, -1)
        q, k, v = (t.reshape(-1, t.shape[2], t.shape[3]) for t in (q, k, v))
        hidden, bias = (m if m is None else m.expand(shape).flatten(0, 1) for m in (hidden, bias))
        head_scale, sinks = (t.expand(shape).flatten(0, 1) for t in (head_scale[None], sinks[None]))
        out = attend(program, x, q, k, v, hidden, bias, head_scale, sinks, wide)
        return out.view(program.batch, program.heads, *out.shape[1:])
    if program.layout == "single head":
        q, k, v, hidden, bias = (m if m is None else m.squeeze(1) for m in (q, k, v, hidden, bias))
        return attend(program, x, q, k, v, hidden, bias, head_scale, sinks, wide).unsqueeze(1)
    if program.layout == "length first":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attend(program, x, q, k, v, hidden, bias, head_scale, sinks, wide).transpose(1, 2)
    if program.layout == "transposed":
        hidden, bias = (m if m is None else m.mT for m in (hidden, bias))
    return attend(program, x, q, k, v, hidden, bias, head_scale, sinks, wide)


def repeat(program: Program, x: Tensor) -> Tensor:
    """KV heads, each for its group of query heads."""
    share = program.heads // program.kv_heads
    if program.repeat == "repeat_interleave":
        return x.repeat_interleave(share, 1)
    if program.repeat == "expand":
        return x[:, :, None].expand(-1, -1, share, -1, -1).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
    if program.repeat == "index":
        return x[:, torch.arange(program.heads) // share]
    return x


def hide(program: Program, x: Inputs) -> Tensor | None:
    """True where a key is hidden: bool [B or 1, 1, L or 1, S]."""
    q_len, kv_len = x.q.shape[2], x.k.shape[2]
    offset = kv_len - q_len
    i, j = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)
    future, padding, others = j > i, ~x.keep[:, None], x.ids[:, offset:, None] != x.ids[:, None]
    if program.mask in ("none", "relative", "bias"):
        return None
    if program.mask == "triu":
        return torch.ones(q_len, kv_len, dtype=torch.bool).triu(offset + 1)[None, None]
    if program.mask == "tril":
        return ~torch.tril(torch.ones(q_len, kv_len), offset).bool()[None, None]
    hidden = {"arange": future, "ALiBi": future, "window": future | (j <= i - REACH),
              "both sides": (j > i + REACH) | (j < i - REACH), "chunk": future | (j // CHUNK != i // CHUNK),
              "right padding": padding, "left padding": padding, "causal and padding": future | padding,
              "documents": others, "causal documents": future | others,
              "prefix": future & (j >= 2), "any": ~x.shown[:, 0]}[program.mask]
    return hidden[None, None] if hidden.dim() == 2 else hidden[:, None]


def add(program: Program, x: Inputs) -> Tensor | None:
    """What is added to the scores beside masks: [1, H, L, S]."""
    q_len, kv_len = x.q.shape[2], x.k.shape[2]
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    if program.mask == "ALiBi":
        slopes = 2.0 ** -torch.arange(1, program.heads + 1).to(x.q.dtype)
        return (slopes[:, None, None] * distance)[None]
    if program.mask == "relative":
        return x.table[:, (distance + q_len).clamp(0, 63)][None]
    return x.bias[None] if program.mask == "bias" else None


def attend(program: Program, x: Inputs, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, bias: Tensor | None,
           head_scale: Tensor, sinks: Tensor, wide: torch.dtype) -> Tensor:
    """From operands in the layout of the program to its output."""
    transposed, length_first = program.layout == "transposed", program.layout == "length first"
    if program.scale in ("query", "both"):
        q = q * SCALE ** (1.0 if program.scale == "query" else 0.5)
    if program.scale in ("key", "both"):
        k = k * SCALE ** (1.0 if program.scale == "key" else 0.5)
    if length_first:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    elif program.scale == "alpha":
        start = torch.zeros(1, 1, 1, dtype=q.dtype) if bias is None else bias
        scores, bias = torch.baddbmm(start, q, k.mT, beta=1.0, alpha=SCALE), None
    else:
        scores = k @ q.mT if transposed else q @ k.mT
    if program.scale == "multiply":
        scores = scores * SCALE
    if program.scale == "divide":
        scores = scores / (1 / SCALE)
    if program.scale == "tensor":
        scores = scores * x.scale
    if program.scale == "per head":
        scores = scores * head_scale
    if program.softcap:
        scores = torch.tanh(scores / CAP) * CAP
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = cover(program, scores, hidden)
    if program.scale == "after mask":
        scores = scores * SCALE

    dim = -2 if transposed else -1
    weights, total = normalise(program, scores, dim, sinks, wide)
    if program.dropout:
        weights = F.dropout(weights, 0.1, training=False)
    if transposed:
        out = weights.mT @ v
    elif length_first:
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    elif program.layout == "values left":
        out = (v.mT @ weights.mT).mT
    else:
        out = weights @ v
    if total is None:
        return out
    return out / (total.mT if transposed else total.transpose(1, 2) if length_first else total)


def cover(program: Program, scores: Tensor, hidden: Tensor) -> Tensor:
    """Scores, low where a key is hidden."""
    fill = {"-inf": -torch.inf, "lowest": torch.finfo(scores.dtype).min, "-1e9": -1e9}[program.fill]
    if program.step == "masked_fill":
        return scores.masked_fill(hidden, fill)
    if program.step == "masked_fill_":
        return scores.masked_fill_(hidden, fill)
    if program.step == "where":
        return torch.where(hidden, torch.tensor(fill, dtype=scores.dtype), scores)
    if program.step == "add":
        return scores + torch.zeros(hidden.shape, dtype=scores.dtype).masked_fill(hidden, fill)
    return scores + hidden.to(scores.dtype) * fill


def normalise(program: Program, scores: Tensor, dim: int, sinks: Tensor, wide: torch.dtype,
              ) -> tuple[Tensor, Tensor | None]:
    """Attention weights, and the sum that the output is yet to be divided by."""
    kind = program.softmax
    if kind == "functional":
        return F.softmax(scores, dim), None
    if kind == "method":
        return scores.softmax(dim), None
    if kind == "wide":
        return torch.softmax(scores, dim, dtype=wide).to(scores.dtype), None
    if kind == "cast":
        return scores.to(wide).softmax(dim).to(scores.dtype), None
    if kind == "log_softmax":
        return scores.log_softmax(dim).exp(), None
    if kind == "sink":
        column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1], None
    if kind == "exp":
        weights = scores.exp()
        return weights / weights.sum(dim, keepdim=True), None
    if kind == "plus one":
        weights = scores.exp()
        return weights / (1 + weights.sum(dim, keepdim=True)), None
    if kind == "plus one max":
        most = scores.amax(dim, keepdim=True).clamp(min=0)
        weights = (scores - most).exp()
        return weights / (weights.sum(dim, keepdim=True) + (-most).exp()), None
    weights = (scores - scores.amax(dim, keepdim=True)).exp()
    total = weights.sum(dim, keepdim=True)
    return (weights, total) if kind == "late division" else (weights / total, None)


@st.composite
def programs(draw: Any) -> Program:
    """Programs that make sense: what one layout cannot say is left out."""
    layout = draw(st.sampled_from(LAYOUTS))
    mask = draw(st.sampled_from(MASKS))
    scales, softmaxes, heads = SCALES if layout == "folded" else SCALES[:-1], SOFTMAXES, (4, 6)
    if layout == "single head":
        heads = (1,)
    if layout == "transposed":
        softmaxes = SOFTMAXES[:-1]  # no sink: a row of scores is no row of memory
    number = draw(st.sampled_from(heads))
    kv_heads = draw(st.sampled_from([n for n in (number, number // 2, 1) if n]))
    repeats: tuple[str, ...] = ("none",)
    if kv_heads < number and layout not in ("grouped", "loop"):
        # One KV head broadcasts by itself, except where heads are folded into the batch or named by einsum.
        repeats = REPEATS if kv_heads == 1 and layout not in ("folded", "length first") else REPEATS[1:]
    scale = draw(st.sampled_from(scales))
    softcap = draw(st.booleans()) and scale not in ("after mask", "alpha")
    fill = draw(st.sampled_from(FILLS))
    return Program(
        layout, scale, mask, fill, draw(st.sampled_from(STEPS[:4] if fill == "-inf" else STEPS)),
        draw(st.sampled_from(softmaxes)), softcap, draw(st.booleans()), draw(st.sampled_from(repeats)),
        draw(st.sampled_from((*DTYPES[:2], *DTYPES))),  # float64, which is left alone, less often
        draw(st.sampled_from((2, 1, 3))), number, kv_heads, draw(st.sampled_from((5, 7, 10))),
        draw(st.sampled_from((0, 0, 4))), draw(st.sampled_from((8, 12))), draw(st.integers(0, 2**31)))


def check(program: Program, dynamic: bool = False) -> None:
    """Compiled, the program gives what eager gives (`dynamic`: at two lengths), and is rewritten if it must be."""
    wide = torch.promote_types(program.dtype, torch.float32)

    def function(*tensors: Tensor) -> Tensor:
        return run(program, Inputs(*tensors), wide)

    compiled = rewritten(function, dynamic=dynamic)
    for longer in (0, 6) if dynamic else (0,):
        x = Inputs.of(program, longer)
        plain = run(program, x, wide)
        truth = run(replace(program, dtype=torch.float64), x.to(torch.float64), torch.float64)
        ours = compiled.call(*vars(x.fixed()).values())
        assert ours.dtype == plain.dtype and ours.shape == plain.shape, program
        hidden = hide(program, x)
        seeing = torch.ones(1, 1, 1, 1, dtype=torch.bool) if hidden is None else ~hidden.all(-1, keepdim=True)
        units = 4 + attention_units(x.q, x.k, 1.0)
        error, allowed = judge(*(t.where(seeing, 0.0) for t in (ours, plain, truth)), units)
        assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}: {program}"
        if not program.supported:
            assert torch.equal(ours.nan_to_num(), plain.nan_to_num()), program
    refused = [record.why for record in compiled.records if record.outcome == "refused"]
    if program.supported:
        assert not refused, f"{refused}: {program}"
        assert len(compiled.records) == program.sites, program
    else:
        assert len(refused) == len(compiled.records), program


SETTINGS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


@settings(SETTINGS, max_examples=200)
@given(programs())
def test_random_programs(program):
    check(program)


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_folded_into_the_batch_have_sinks_of_their_own(batch):
    """Scaled behind the repeat, keys vary along both parts of the heads, and a batch of one leaves no axis."""
    check(Program("folded", "key", "none", "-inf", "masked_fill", "sink", False, False, "repeat_interleave",
                  torch.float32, batch, 4, 2, 5, 0, 8, 0))


@settings(SETTINGS, max_examples=10)  # symbolic lengths cost Dynamo ten times as much
@given(programs())
def test_random_programs_of_any_length(program):
    check(program, dynamic=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=2000)
@given(programs())
def test_many_random_programs(program):
    check(program)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=200)
@given(programs())
def test_many_random_programs_of_any_length(program):
    check(program, dynamic=True)
