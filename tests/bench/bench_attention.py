"""Relevancy of all words of a caption: batched backward passes against one backward pass a word;
and raw attention: the asked rows against transformers' output_attentions, in memory.
"""

import subprocess
import sys
import time

from mmkit import chat, explain, models
from mmkit.chat.turns import describe_tokens
from mmkit.data.melanoma_pairs import load_melanoma_pairs


def job():
    import torch

    torch.manual_seed(0)
    model, processor = models.load()
    r = load_melanoma_pairs(1, seed=5)[0]
    batch = {
        k: v
        for k, v in chat.encode_example(processor, r["image"], answer=r["caption"]).items()
        if k != "labels"
    }
    at = [
        k - 1
        for k, t in enumerate(describe_tokens(processor, batch["input_ids"][0]))
        if t.role == "answer"
    ]
    return model, batch, at


def relevancy(tower):
    model, batch, at = job()

    def timed(**kw):
        began = time.perf_counter()
        explain.compute_relevancy(model, batch, at, include_vision=tower, **kw)
        return time.perf_counter() - began

    def whole():  # one forward and one backward pass a word: what ten plain lines do
        began = time.perf_counter()
        for k in at:
            explain.compute_relevancy(model, batch, [k], include_vision=tower, batched=False)
        return time.perf_counter() - began

    timed()
    rows = [(timed(), timed(batched=False), whole()) for _ in range(3)]  # in turn
    ours, one, plain = (sorted(v)[1] for v in zip(*rows))
    print(
        f"{'through the tower' if tower else 'to the image tokens'}: {len(at)} words {ours:.2f} s;"
        f" one backward pass a word {one:.2f} s, {ours / one:.2f}× (bar 0.3×); with a forward pass"
        f" each {plain:.2f} s, {ours / plain:.2f}×"
    )


def held(how, T=2000, layers=16):  # MiB that tables take, on a wide tiny model with a long text
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    m = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=64,
            max_position_embeddings=T,
        )
    ).eval()
    ids, rows, kept = torch.randint(0, 64, (1, T)), torch.arange(T - 40, T), []
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    with torch.no_grad():
        m(input_ids=ids)
        before = peak()
        if how == "rows":
            with explain.record_attention(m, lambda n, w: kept.append(w(rows))):
                m(input_ids=ids)
        else:
            m.set_attn_implementation("eager")
            kept = m(input_ids=ids, output_attentions=True).attentions
    print(peak() - before)


if __name__ == "__main__":
    if sys.argv[1:]:
        held(sys.argv[1])
        raise SystemExit
    for tower in (False, True):
        relevancy(tower)
    got = {
        how: float(
            subprocess.run(
                [sys.executable, __file__, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("rows", "all")
    }
    print(
        f"raw attention of 40 of 2,000 positions, 16 layers of 8 heads: {got['rows']:.0f} MiB"
        f" beyond the pass itself; output_attentions {got['all']:.0f} MiB,"
        f" {got['rows'] / got['all']:.3f}×"
    )
