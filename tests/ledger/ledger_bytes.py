"""C16: the bytes of weights in NF4 with double quantisation, as bitsandbytes holds them, and what
65 billion of them take.
"""

import torch
from run import entry

from mmkit import models
from mmkit.models.parts import numel_and_nbytes

IDS = ("C16",)
BILLION = 65
SIZES = {"our base": None, "random, 512 wide": 512, "random, 1,024 wide": 1024}


def model_of(width, seed):
    if width is None:
        return models.load()[0]
    torch.manual_seed(seed)
    return models.tiny_random_model("llava", seed=seed, hidden_size=width, vocab_size=8192)


def weigh(width, seed):
    """Every linear layer of the text model packed; bits for each packed number, and the bytes of
    the whole model beside bf16.
    """
    import bitsandbytes as bnb

    m = model_of(width, seed)
    text = [m.get_submodule(n).weight for n in models.linear_module_names(m, "text")]
    packed = [
        numel_and_nbytes(
            bnb.nn.Params4bit(
                w.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cpu")
        )
        for w in text
    ]
    n, b, every = (
        sum(k for k, _ in packed),
        sum(k for _, k in packed),
        sum(p.numel() for p in m.parameters()),
    )
    return {
        "bits a number": 8 * b / n,
        "GB for 65 billion": BILLION * b / n,
        "times less than bf16": 2 * n / b,
        "times less, whole model": 2 * every / (b + 2 * (every - n)),
        "times less than fp32": 4 * n / b,
    }


def plain(bits):
    return {
        "bits a number": bits,
        "GB for 65 billion": BILLION * bits / 8,
        "times less than bf16": 16 / bits,
        "times less, whole model": 16 / bits,
        "times less than fp32": 32 / bits,
    }


def measure(cells, seeds, small=False):
    found = {}
    for s in seeds:
        arms = {
            f"NF4, {name}": lambda w=w: weigh(w, s)
            for name, w in list(SIZES.items())[: 1 if small else None]
        } | {"bf16": lambda: plain(16), "codes alone, no constants": lambda: plain(4)}
        for arm, f in arms.items():
            for m, v in cells(arm, s, f).items():
                found.setdefault((arm, m), {})[s] = v
    big = [a for a, m in found if m == "bits a number" and a.startswith("NF4")][-1]
    tests = [
        dict(
            statement="65 billion weights in NF4 take less than 24 GB",
            a=[big, "GB for 65 billion"],
            b=24,
            expect="below",
        ),
        dict(
            statement="they take less than 48 GB: the card on which the paper did it",
            a=[big, "GB for 65 billion"],
            b=48,
            expect="below",
            control=True,
        ),
        dict(
            statement="the packed weights alone are at least 5.8 times smaller than bf16",
            a=[big, "times less than bf16"],
            b=5.8,
            expect="not below",
        ),
        dict(
            statement="bf16 takes 16 bits: the scale reads right",
            a=["bf16", "GB for 65 billion"],
            b=130,
            expect="equal",
            control=True,
        ),
        dict(
            statement="constants cost something: more than 4 bits",
            a=[big, "bits a number"],
            b=["codes alone, no constants", "bits a number"],
            expect="above",
            control=True,
        ),
    ]
    yield entry(
        cells,
        seeds,
        "C16",
        found,
        tests,
        ("bf16", "codes alone, no constants"),
        None,
        draws_lesions=False,
        claim=(
            "QLoRA fine-tunes 65B on a 24 GB card, with 5.8 times less memory, 22% more time, 87%"
            " less cost."
        ),
        measured=(
            "The bytes of the text model's linear layers in NF4 with double quantisation (codes,"
            " scales, scales of scales, tables), in our base and in larger random models; from"
            " these, 65 billion of them. Bytes depend on shapes and on nothing else, so every seed"
            " gives the same and the intervals have no width: they are exact, not certain by luck."
        ),
        setup=(
            "bitsandbytes on the CPU: Params4bit with compress_statistics, blocks of 64, 256 scales"
            " to a second scale; counted by mmkit.models.size."
        ),
        limitations=(
            "Time and cost, which need a GPU; what activations, adapters and optimiser add (the"
            " planner does that). The smaller a matrix, the more its tables weigh: 65 billion is"
            " taken at the rate of the largest."
        ),
    )
