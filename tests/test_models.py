"""Hugging Face architectures, tiny and random: captured whole, every site recorded, outputs as they were."""

import logging

import pytest
import torch

import sparsify
from sparsify import Bucket, Budget, Plan, backend

transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128}
BIDIRECTIONAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

REWRITTEN = {"exact", "kept dense"}


def llama(attention):
    config = transformers.LlamaConfig(**TEXT, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config)


def qwen3(attention):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, attn_implementation=attention))


def mistral(attention):
    config = transformers.MistralConfig(**TEXT, sliding_window=8, attn_implementation=attention)
    return transformers.MistralForCausalLM(config)


def gemma2(attention):
    config = transformers.Gemma2Config(**TEXT, sliding_window=8, attn_implementation=attention)
    return transformers.Gemma2ForCausalLM(config)


def gemma3(attention):
    config = transformers.Gemma3TextConfig(**TEXT, sliding_window=8, layer_types=["sliding_attention",
                                           "full_attention"], attn_implementation=attention)
    return transformers.Gemma3ForCausalLM(config)


def bert(attention):
    return transformers.BertModel(transformers.BertConfig(**BIDIRECTIONAL, vocab_size=64,
                                                          attn_implementation=attention))


def vit(attention):
    config = transformers.ViTConfig(**BIDIRECTIONAL, image_size=16, patch_size=4, attn_implementation=attention)
    return transformers.ViTModel(config)


def t5(attention):
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=attention)


# How many sites each has; all are rewritten, or kept dense by SDPA itself.
ARCHITECTURES = {llama: 2, qwen3: 2, mistral: 2, gemma2: 2, gemma3: 2, bert: 2, vit: 2, t5: 6}
CASES = [(architecture, attention) for architecture in ARCHITECTURES for attention in ("eager", "sdpa")
         if (architecture, attention) != (gemma2, "sdpa")]  # no SDPA in transformers: the soft cap


def inputs_of(model, batch, length):
    if isinstance(model, transformers.ViTModel):
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    ids = torch.randint(1, 64, (batch, length))
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    causal = not isinstance(model, transformers.BertModel)
    return {"input_ids": ids, "attention_mask": mask, **({"use_cache": False} if causal else {})}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def records(monkeypatch):
    """The records of the last graph that was compiled."""
    last = []

    def rewrite_and_note(*arguments):
        graph, last[:] = rewrite_graph(*arguments)
        return graph, last

    rewrite_graph = backend.rewrite_graph
    monkeypatch.setattr(backend, "rewrite_graph", rewrite_and_note)
    return last


@pytest.mark.parametrize(("architecture", "attention"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_outputs_stay_and_every_site_has_a_record(architecture, attention, records):
    model = architecture(attention).eval()
    calls = [inputs_of(model, 2, 20), inputs_of(model, 3, 13)]
    expected = [model(**call)[0] for call in calls]
    inner = "aot_eager" if architecture in (llama, bert) else "eager"
    sparsify.compile(model, Plan.dense(), backend=inner, fullgraph=True)
    for call, output in zip(calls, expected, strict=True):
        seeing = call.get("attention_mask", torch.ones(output.shape[:2])).bool()
        torch.testing.assert_close(model(**call)[0][seeing], output[seeing], atol=2e-5, rtol=2e-5)

    assert len(records) == ARCHITECTURES[architecture]
    for record in records:
        assert record.line.split(":")[0].endswith(".py")
        assert record.outcome in REWRITTEN, record.why


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_gives_the_same_tokens(attention, caplog):
    model = llama(attention).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(1, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    # Decoding crosses an edge: a single query stays dense, and needs no graph of its own in the second bucket.
    plan = Plan((Bucket(1, 16, Budget.dense()), Bucket(16, None, Budget(0.5))))
    sparsify.compile(model, plan, backend="eager")
    with caplog.at_level(logging.INFO, logger="sparsify"):
        assert torch.equal(model.generate(ids, **settings), expected)
    assert len([record for record in caplog.records if record.name == "sparsify"]) == 2  # prefill and decode


def test_generate_protects_the_prompt(caplog):
    """Ids are found by their name, a cache that begins empty has the prompt's keys, later steps drop nothing."""
    model = llama("sdpa").eval()
    model.config.max_position_embeddings = 1024
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(1, 64, (2, 700))
    seen = []

    def protect(ids):
        seen.append(tuple(ids.shape))
        return torch.ones_like(ids, dtype=torch.bool)

    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **settings).logits
    sparsify.compile(model, Plan((Bucket(1, None, Budget(1.0, sinks=0, local=0)),)), backend="eager", protect=protect)
    with caplog.at_level(logging.DEBUG, logger="sparsify"):
        logits = model.generate(ids, **settings).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    assert seen == [(2, 700), (2, 1), (2, 1)]
    sites = [record.getMessage() for record in caplog.records if record.getMessage().startswith("site ")]
    assert sum("protected keys are kept" in site for site in sites) == 2  # those of the prompt's graph
    assert not any("are not kept" in site for site in sites)


def test_llama_runs_sparse_through_inductor(records):
    model = llama("sdpa").eval()
    ids = torch.randint(1, 64, (2, 100))
    expected = model(ids, use_cache=False).logits
    sparsify.compile(model, Plan((Bucket(1, None, Budget(0.0)),)), fullgraph=True)  # tolerance 0 drops nothing
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=2e-5)
    assert [record.outcome for record in records] == ["sparse"] * 2
