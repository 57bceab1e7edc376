"""Check many random programs of flax.nnx against their meaning."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import jax

from random_nnx import IllConditioned, Refused, check, draw, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0, help='of the first program')
    parser.add_argument('--stop', action='store_true', help='stop at the first failure')
    options = parser.parse_args()
    start, counts = time.time(), Counter()
    for seed in range(options.seed, options.seed + options.count):
        program, how = draw(seed)
        try:
            counts['changed a gradient'] += check(program, **how)
            counts['ok'] += 1
        except (IllConditioned, Refused) as error:
            counts[type(error).__name__] += 1
        except Exception as error:
            counts['failed'] += 1
            print(f'seed {seed}: {type(error).__name__}: {str(error)[:200]}', flush=True)
            if options.stop:
                traceback.print_exc()
                print(report(program), how)
                break
        done = seed - options.seed + 1
        if done % 50 == 0:
            print(f'{done}/{options.count} {dict(counts)} {time.time() - start:.0f} s', flush=True)
            jax.clear_caches() if done % 500 == 0 else None
    print(f'{dict(counts)} in {time.time() - start:.0f} s, jax {jax.__version__}')
    sys.exit(bool(counts['failed']))


if __name__ == '__main__':
    main()
