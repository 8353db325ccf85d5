"""How long ranks wait for each other when sequences are spread by tokens, or by what they cost.

A simulation on the operations of a model of 8.2 billion parameters (36 layers, 32 heads of 128
channels): two a parameter and token, and attention's, which grow with the square of the length.
Responses are log-normal with a long tail. No time is measured.

    python -m benchmarks.balance
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

from megatron_rlsd.actor.balance import balanced_partition

PARAMETERS, LAYERS, HEADS, CHANNELS = 8.2e9, 36, 32, 256
PROMPT, STAGES, TRIALS = 500, 8, 5
CASES = (
    # sequences, ranks, longest response, its mean, spread of the logarithm, tokens of a pack
    (512, 8, 8_192, 3_000, 0.8, 16_384),
    (512, 8, 32_768, 8_000, 1.0, 33_280),
    (512, 32, 32_768, 8_000, 1.0, 33_280),
    (256, 32, 32_768, 8_000, 1.0, 33_280),
)


def operations(length: int) -> int:
    return int(length * (2 * PARAMETERS + LAYERS * HEADS * CHANNELS * length))


def tokens(length: int) -> int:
    return length


def idle(
    lengths: list[int], ranks: int, limit: int, over_ranks: Callable, within: Callable
) -> tuple[float, float, float]:
    """Shares of the time that ranks wait: at the end of a step; after each micro-batch, where
    experts are split over ranks; in a pipeline, beyond its bubble."""
    parts = balanced_partition(list(map(over_ranks, lengths)), ranks)
    held = [[lengths[i] for i in part] for part in parts]
    count = max(1, max(-(-sum(each) // limit) for each in held))
    while True:
        packs = [
            [[each[i] for i in pack] for pack in balanced_partition(list(map(within, each)), count)]
            for each in held
        ]
        if all(len(pack) < 2 or sum(pack) <= limit for rank in packs for pack in rank):
            break
        count += 1
    costs = [[sum(map(operations, pack)) for pack in rank] for rank in packs]
    sums = [sum(each) for each in costs]
    mean = sum(sums) / ranks
    lockstep = sum(max(each[at] for each in costs) for at in range(count))
    pipeline = max(sum(each) + (STAGES - 1) * max(each) for each in costs)
    even = mean + (STAGES - 1) * mean / count
    return 1 - mean / max(sums), 1 - mean / lockstep, 1 - even / pipeline


def main() -> None:
    print("sequences ranks longest | over ranks, within a rank: step / micro-batch / pipeline of 8")
    for count, ranks, longest, mean, spread, limit in CASES:
        for names, over_ranks, within in (
            ("tokens, tokens", tokens, tokens),
            ("cost,   tokens", operations, tokens),
            ("cost,   cost  ", operations, operations),
        ):
            found = []
            for trial in range(TRIALS):
                rng = random.Random(trial)
                middle = math.log(mean) - spread**2 / 2
                lengths = [
                    PROMPT + max(1, min(longest, round(rng.lognormvariate(middle, spread))))
                    for _ in range(count)
                ]
                found.append(idle(lengths, ranks, limit, over_ranks, within))
            shares = " / ".join(
                f"{statistics.fmean(each):.3f}" for each in zip(*found, strict=True)
            )
            print(f"{count:9} {ranks:5} {longest:7} | {names}: {shares}")


if __name__ == "__main__":
    main()
