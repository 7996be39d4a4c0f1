"""`check_mask` finds every pair that mask and proof disagree about, and says where."""

import pytest
import torch

from sparsify import MaskError, ShapeError
from sparsify.ops.verify import check_mask

Q_LEN, KV_LEN = 5, 7


@pytest.fixture
def q(rng, device):
    return torch.randn(2, 3, Q_LEN, 8, generator=rng, device=device)


def check(q, mask, causal_offset=None, window=None, key_mask=None, query_documents=None, key_documents=None,
          attn_mask=None):
    return check_mask(q, mask, KV_LEN, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, 3,
                      "model.py:214")


def cases(rng, device):
    """What a mask shows, and its proof."""
    i, j = torch.arange(Q_LEN, device=device)[:, None], torch.arange(KV_LEN, device=device)
    keys = torch.rand(2, KV_LEN, generator=rng, device=device) > 0.4
    ids = torch.randint(0, 2, (1, KV_LEN), generator=rng, device=device)
    carried = torch.rand(2, 3, Q_LEN, KV_LEN, generator=rng, device=device) > 0.5
    yield (j <= i + 2)[None, None], {"causal_offset": 2}
    yield ((j <= i + 2) & (j > i - 1))[None, None], {"causal_offset": 2, "window": 3}
    yield keys[:, None, None], {"key_mask": keys}
    yield (j <= i) & keys[:, None, None], {"causal_offset": 0, "key_mask": keys}
    yield (ids[:, :Q_LEN, None] == ids[:, None])[:, None], {"query_documents": ids[:, :Q_LEN], "key_documents": ids}
    yield (j <= i) & carried, {"causal_offset": 0, "attn_mask": carried}
    yield torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), {}


def test_a_true_proof_gives_a_copy(q, rng, device):
    for visible, proof in cases(rng, device):
        checked = check(q, visible, **proof)
        assert torch.equal(checked, q)
        assert checked.data_ptr() != q.data_ptr()
        assert checked.stride() == q.stride()


def test_one_wrong_pair_is_found(q, rng, device):
    for visible, proof in cases(rng, device):
        visible = visible.expand(2, 3, Q_LEN, KV_LEN).clone()
        visible[1, 2, 3, 4] ^= True
        shows, hides = ("mask", "proof") if visible[1, 2, 3, 4] else ("proof", "mask")
        with pytest.raises(MaskError) as caught:
            check(q, visible, **proof)
        message = str(caught.value)
        assert message.startswith(f"site 3 at model.py:214: the {shows} shows key 4 to query 3 (batch row 1, head 2)")
        assert f"the {hides} hides it; 1 of 210 pairs" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fill", [-1e4, "lowest", -torch.inf])
def test_what_is_added_hides_where_it_is_low(q, device, dtype, fill):
    fill = torch.finfo(dtype).min if fill == "lowest" else fill
    bias = torch.linspace(-50, 50, KV_LEN, device=device).to(dtype).expand(1, 1, Q_LEN, KV_LEN)
    hidden = torch.ones(1, 1, Q_LEN, KV_LEN, dtype=torch.bool, device=device).triu(1)
    check(q, bias.masked_fill(hidden, fill), causal_offset=0, attn_mask=bias)
    check(q, bias.masked_fill(hidden, fill), attn_mask=bias.masked_fill(hidden, fill))
    with pytest.raises(MaskError):
        check(q, bias.masked_fill(hidden, fill), attn_mask=bias)


def test_a_proof_off_by_one_is_found(q, device):
    visible = torch.ones(1, 1, Q_LEN, KV_LEN, dtype=torch.bool, device=device).tril()
    for wrong in ({"causal_offset": 1}, {"causal_offset": -1}, {}, {"causal_offset": 0, "window": 3}):
        with pytest.raises(MaskError):
            check(q, visible, **wrong)


def test_a_mask_of_another_shape_is_refused(q, device):
    with pytest.raises(ShapeError, match=r"mask has shape \[1, 1, 5, 6\]"):
        check(q, torch.ones(1, 1, Q_LEN, KV_LEN - 1, dtype=torch.bool, device=device))


def test_torch_accepts_the_op(q, device):
    visible = torch.ones(1, 1, Q_LEN, KV_LEN, dtype=torch.bool, device=device).tril()
    for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(check_mask, (x, visible, KV_LEN, 0, None, None, None, None, None, 3, "model.py:214"))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiler_keeps_the_check(q, device, backend):
    def function(q, visible):
        return check(q, visible, causal_offset=0).sum()

    visible = torch.ones(1, 1, Q_LEN, KV_LEN, dtype=torch.bool, device=device).tril()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(q, visible), q.sum())
    with pytest.raises(MaskError):
        compiled(q, visible.tril(-1))
