"""Whether the time of a refused login tells that a user exists: a rank test over interleaved pairs.

Two groups that cannot be told apart give any p between 0 and 1 alike; a p below P_MIN says that they can. `auc` is the
part of pairs, one of each group, in which the wrong password took longer: 0.5 for equal groups.
"""

import argparse
import asyncio
import math
import random
import secrets
import statistics
import time
from collections.abc import Sequence

import uvloop
from deployment import deployment
from http_client import Connection

P_MIN = 0.01
USERS = 20
WARM_UP_PAIRS = 20


async def measure(pairs: int, cost: int) -> int:
    limits = {"AUTHD_MAX_LOGIN_ATTEMPTS": "1000", "AUTHD_ACCOUNT_MAX_FAILURES": "10000"}
    async with deployment(
        AUTHD_BCRYPT_COST=str(cost), AUTHD_ADDRESS_MAX_FAILURES="100000", AUTHD_HASH_THREADS="1", **limits
    ) as port:
        connection = await Connection.open(port)
        users = [f"{secrets.token_hex(8)}@example.com" for _ in range(USERS)]
        for user in users:
            await connection.register(user, "correct horse battery staple")

        async def refused_s(username: str) -> float:
            start = time.perf_counter()
            status, answer = await connection.login(username, "wrong horse battery staple")
            took_s = time.perf_counter() - start
            assert status == 401, (status, answer)
            return took_s

        unknown: list[float] = []
        wrong: list[float] = []
        for number in range(WARM_UP_PAIRS + pairs):
            # Interleaved, and in either order: what the machine does besides hits both groups alike.
            todo = [(unknown, f"{secrets.token_hex(8)}@example.com"), (wrong, users[number % USERS])]
            random.shuffle(todo)
            for group, username in todo:
                group.append(await refused_s(username))
        connection.close()
    return report(unknown[WARM_UP_PAIRS:], wrong[WARM_UP_PAIRS:])


def report(unknown: Sequence[float], wrong: Sequence[float]) -> int:
    for name, group in (("unknown user", unknown), ("wrong password", wrong)):
        quartiles = statistics.quantiles(group, n=4)
        print(
            f"{name:15} median {1000 * quartiles[1]:.2f} ms, middle half {1000 * (quartiles[2] - quartiles[0]):.2f} ms"
        )
    auc, z, p = mann_whitney(wrong, unknown)
    print(f"Mann-Whitney over {len(wrong)} pairs: auc {auc:.3f}, z {z:+.2f}, two-sided p {p:.3f}")
    print(f"{'PASS' if p >= P_MIN else 'FAIL'}: {'not ' * (p >= P_MIN)}separable at p < {P_MIN}")
    return 0 if p >= P_MIN else 1


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The part of pairs in which `first` is larger, and the z and two-sided p of that (normal approximation)."""
    ordered = sorted([(value, True) for value in first] + [(value, False) for value in second])
    rank_sum, ties, place = 0.0, 0, 0
    while place < len(ordered):
        end = place
        while end < len(ordered) and ordered[end][0] == ordered[place][0]:
            end += 1
        count = end - place
        ties += count**3 - count
        rank_sum += (place + 1 + end) / 2 * sum(is_first for _, is_first in ordered[place:end])
        place = end
    n, m, total = len(first), len(second), len(ordered)
    u = rank_sum - n * (n + 1) / 2
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties / (total * (total - 1))))
    z = (u - n * m / 2) / deviation if deviation else 0.0
    return u / (n * m), z, math.erfc(abs(z) / math.sqrt(2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--cost", type=int, default=10)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise SystemExit(runner.run(measure(options.pairs, options.cost)))
