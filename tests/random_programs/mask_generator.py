"""Transforms and filters of random programs, drawn from a source of randomness."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from random_programs.filters import Bool, Combine, Glob, Lambda, Regex
from random_programs.masks import KINDS, Mask
from random_programs.syntax import Class


class MaskGenerator:
    """Draw transforms from a source of randomness (`random.Random` or hypothesis's)."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def mask(self, cls: Class | None = None) -> Mask:
        """Draw a transform, most often one that selects some of what the class has."""
        collections = self.rng.choice(['params'] * 8 + [True, 'batch_stats'])
        kinds = ['stop_gradient'] * 6 + [*KINDS]
        # Statistics are updated from what is read, which must be what is stored.
        kind = self.rng.choice(
            [
                k
                for k in kinds
                if collections == 'params' or k != 'constant' and not k.startswith('map_values')
            ]
        )
        return dataclasses.replace(self.selection(cls, collections), kind=kind)

    def selection(self, cls: Class | None, collections: Any) -> Mask:
        if cls and self.chance(0.5):
            names = [*cls.params, *cls.params]
            for name, sub in cls.subs.items():
                keys = range(2) if isinstance(sub, list) else 'uv' * isinstance(sub, dict)
                names += [f'{name}_{k}' for k in keys] or [name]
            return Mask(
                Glob(
                    self.rng.choice(
                        [
                            *names,
                            *names,
                            '*/' + self.rng.choice('wvk'),
                            '**/' + self.rng.choice('wvk'),
                            '../' + self.rng.choice('wvkabc'),
                        ]
                    )
                ),
                collections,
            )
        return Mask(self.filter(2), collections)

    def filter(self, depth: int) -> Any:
        kind = self.rng.randint(0, 11 if depth else 7)
        if kind <= 3:
            return Glob(self.glob())
        if kind == 4:
            return Regex(
                self.rng.choice(
                    ['^a', 'w$', 'b|k', '(^|/)[ab]/', r'\.\.', '^[^/]*$', '^w', 'inner', '_0']
                )
            )
        if kind == 5:
            name = self.rng.choice(['a', 'b', 'w', 'k', '..', 'layers', 'M0'])
            return Lambda(
                self.rng.choice(
                    [
                        f'c.name.startswith({name!r})',
                        f'c.path[-1] == {name!r}',
                        'len(c.path) > 1',
                        f'{name!r} in c.absolute_path',
                        'len(c.absolute_path) % 2 == 0',
                        f'{name!r} not in c.path',
                    ]
                )
            )
        if kind <= 7:
            return Bool(self.chance(0.85))
        if kind == 8:
            return Combine('~', (self.filter(depth - 1),))
        return Combine(self.rng.choice('&|'), (self.filter(depth - 1), self.filter(depth - 1)))

    def glob(self) -> str:
        names = [
            'a',
            'b',
            'c',
            'w',
            'k',
            'v',
            'q',
            'inner',
            'layers_0',
            'table_*',
            'M0_0',
            'M*_*',
            '*',
            '*',
            '**',
            '?',
            '[ab]',
            '[!a]*',
            '*_[01]',
        ]
        parts = [self.rng.choice(names) for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3]))]
        lead = self.rng.choice([''] * 6 + ['/', '/', '../', '../', '../../'])
        return lead + '/'.join(parts)
