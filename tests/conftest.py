"""Settings for the whole suite: eight CPU devices, and a fixture that looks for leaked tracers."""

import collections
import os

# Before jax starts: eight devices on one host, for the sharding tests, and quick compilation. The
# flags leave XLA's own passes and its memory plan as they are, which the tests of cost look at.
os.environ.setdefault(
    'XLA_FLAGS',
    ' '.join(
        [
            '--xla_force_host_platform_device_count=8',
            '--xla_backend_optimization_level=0',
            '--xla_llvm_disable_expensive_passes=true',
        ]
    ),
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

pytest.register_assert_rewrite('flow_truth')


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='run the long tables of cases too')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what is marked as long, and most of a thinned table, unless it is asked for."""
    met = collections.Counter()
    for item in items:
        for mark in item.iter_markers('thinned'):
            case = met[item.path, item.originalname]
            met[item.path, item.originalname] += 1
            if case % mark.args[0]:
                item.add_marker('long')
    if not config.getoption('--long'):
        long = [item for item in items if item.get_closest_marker('long')]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def no_leaks():
    """Check for leaked tracers during the test."""
    with jax.checking_leaks():
        yield


@pytest.fixture(scope='module', autouse=True)
def _fresh_caches():
    """Forget a module's traces and programs, of which the whole suite makes gigabytes."""
    yield
    jax.clear_caches()
