"""How far the projector alone gets in the tour's steps: three seeds, three learning rates.

    python tests/ledger/projector_seeds.py [--steps 600 --seeds 0,1,2 --rates 1e-2,2e-2,4e-2]

Beside each score: the base, and the same model with another lesion's image. About a quarter of an
hour on one core.
"""

import argparse

import torch

from mmkit import data, evaluate, models, training
from mmkit.core.runtime import describe_machine
from mmkit.data.own_pairs import hold_out_test
from mmkit.evaluate.stages import choose_measure, compare_stages, describe_difference, score_stage


def parse_arguments():
    "The tour's settings, where the command line gives no others."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="1e-2,2e-2,4e-2")
    return parser.parse_args()


def measure_seed(seed, args):
    "Print the projector's score, its gain over the base and over shuffled images, for each rate."
    pairs = data.load_melanoma_pairs(n=args.pairs, seed=seed, prevalence=0.4)
    train, test = hold_out_test(pairs, 0.1, seed=seed)
    measure = choose_measure(test)
    base, processor = models.load("base")

    def describe(model, image_condition="original"):
        captions = evaluate.generate(
            model, processor, test, image_condition=image_condition, seed=seed, show_progress=False
        )
        return score_stage(test, captions, measure)

    before = describe(base)
    print(f"seed {seed}: {len(train)} pairs to train on, {len(test)} to test; base {before}")
    for rate in map(float, args.rates.split(",")):
        model = training.fit(
            models.load("base")[0],
            processor,
            train,
            train="projector",
            seed=seed,
            max_steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=rate,
            show_progress=False,
        ).model
        after, shuffled = describe(model), describe(model, "shuffled")
        print(f"  learning rate {rate:g}: projector {after}, with shuffled images {shuffled}")
        print("   ", describe_difference("over the base", compare_stages(before, after)))
        gain = compare_stages(shuffled, after)
        print("   ", describe_difference("over shuffled images", gain), flush=True)


def main():
    "Print every seed under the machine and the settings."
    args = parse_arguments()
    torch.set_num_threads(1)
    print(f"{describe_machine()}, torch {torch.__version__}; {vars(args)}; macro-F1 of captions")
    for seed in map(int, args.seeds.split(",")):
        measure_seed(seed, args)


if __name__ == "__main__":
    main()
