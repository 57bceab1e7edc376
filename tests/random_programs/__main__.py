"""Check many random programs against their meaning."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import jax

from random_programs import (
    IllConditioned,
    check,
    check_views,
    draw,
    draw_views,
    report,
    same_failure,
    shrink,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0, help='of the first program')
    parser.add_argument('--views', action='store_true', help='gradient views of the programs')
    parser.add_argument('--stop', action='store_true', help='stop at the first failure, shrunk')
    options = parser.parse_args()
    start, counts = time.time(), Counter()
    for i in range(options.count):
        seed = options.seed + i
        program, how = (draw_views if options.views else draw)(seed)
        run = check_views if options.views else check
        try:
            counts['stopped a gradient'] += run(program, **how)
            counts['ok'] += 1
        except IllConditioned:
            counts['ill-conditioned'] += 1
        except Exception as error:
            counts['failed'] += 1
            print(f'seed {seed}: {type(error).__name__}: {str(error)[:200]}', flush=True)
            if options.stop:
                traceback.print_exc()
                print(report(shrink(program, same_failure(error, run, **how))), how)
                break
        if i % 50 == 49:
            print(f'{i + 1}/{options.count} {dict(counts)} {time.time() - start:.0f} s', flush=True)
            jax.clear_caches() if i % 500 == 499 else None
    print(f'{dict(counts)} in {time.time() - start:.0f} s, jax {jax.__version__}')
    sys.exit(bool(counts['failed']))


if __name__ == '__main__':
    main()
