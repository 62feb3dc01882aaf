"Lesions with all their masks, per core and second, at the size that the base sees."

import os
import time

from mmkit.lesions.render import World

SEED, N_LESIONS = int(os.environ.get("MMKIT_SEED", 0)), 300
WANTED_PER_SECOND = 150
world = World(seed=SEED, num_lesions=12_874)
for i in range(10):
    world.render(i)  # fill the caches


def measure_rate(job):
    "The best of three, in processor time: other work on the machine does not count."
    best, third = 0.0, N_LESIONS // 3
    for repeat in range(3):
        began = time.process_time()
        for i in range(repeat * third, (repeat + 1) * third):
            job(i)
        best = max(best, third / (time.process_time() - began))
    return best


print(
    f"  render a lesion         {measure_rate(world.render):8.0f} /s      "
    f"96×96 with its masks, one core, best of three × {N_LESIONS // 3}, seed {SEED}; "
    f"wanted: {WANTED_PER_SECOND}"
)
print(f"  sample its parameters   {measure_rate(world.lesion):8.0f} /s      no image, one core")
