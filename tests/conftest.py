"""Settings for the whole suite: eight CPU devices, and a fixture that looks for leaked tracers."""

import os

# Before jax starts: eight devices on one host, for the sharding tests, and quick compilation. The
# flags leave XLA's own passes and its memory plan as they are, which the tests of cost look at.
os.environ.setdefault('XLA_FLAGS', ' '.join([
    '--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true']))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest


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
