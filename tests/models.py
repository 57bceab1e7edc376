"""Models that several files of tests use."""

from flax_sg import nn


class Scale(nn.Module):
    """w x, with w = 1 at first."""

    @nn.compact
    def __call__(self, x):
        return self.param('w', nn.initializers.ones, ()) * x
