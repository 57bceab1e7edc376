"""The check, before the first block, that NNX's reads pass where the library stands."""

import pytest

import flax_sg as sg
from flax_sg import nnx
from internals import pass_by, pass_by_value, self_check_of_nnx

HELD = sg.stop_gradient('held')


def test_it_passes():
    self_check_of_nnx(HELD)


def test_reads_that_pass_by_are_an_error(monkeypatch):
    pass_by_value(monkeypatch)
    with pytest.raises(
        sg.UnsupportedVersionError, match=r"\['copy'\]\['held'\] is held, and has a"
    ):
        self_check_of_nnx(HELD)


def test_copies_that_pass_by_are_an_error(monkeypatch):
    pass_by(monkeypatch, nnx.Variable, 'get_metadata')
    with pytest.raises(sg.UnsupportedVersionError, match='is held, and has a gradient'):
        self_check_of_nnx(HELD)


def test_what_is_live_must_have_a_gradient():
    with pytest.raises(sg.UnsupportedVersionError, match='is not held, and has no gradient'):
        self_check_of_nnx(sg.stop_gradient(True))
