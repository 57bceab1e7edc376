"""The library's errors: each says where, what was expected, what was got, and the way out."""

from flax.errors import ModifyScopeVariableError

__all__ = [
    'FrozenVariableError',
    'LabelError',
    'PredicateError',
    'UnknownRecordError',
    'UnmatchedPathError',
    'UnreadBlockWarning',
    'UnsupportedVersionError',
    'UsageError',
]


class PredicateError(ValueError, TypeError):
    """A predicate is not one: a wrong type, an empty pattern, a glob or regex that does not parse.

    See :func:`flax_sg.path` for what a string may hold, and the guide's section on filters for
    every kind of predicate.
    """


class UnmatchedPathError(ValueError):
    """A glob, a regex or a callable selects no variable.

    Nothing is more silent than a mask that masks nothing: a typo trains what should be held. So
    each glob, regex and callable of a predicate, also under ``~`` and inside ``&`` and ``|``, must
    select a variable that exists by the end of the block, whether or not the block read it.
    ``allow_unmatched=True`` says that a pattern may be idle, as in a block shared by several
    architectures. Bools, ``flax_sg.everything`` and ``flax_sg.nothing`` are never unmatched. While
    a module is being initialised its blocks do not check, since a variable may be created after the
    block.
    """


class UnreadBlockWarning(UserWarning):
    """A block outside of all modules has ended, and no model was read in it: it did nothing.

    Blocks act on reads of variables of Flax. Around plain functions of parameters, the models
    of other libraries, and a step that was compiled before, there is none. An equal block in which
    a model was read before may find its traces in JAX's caches, and does not warn; nor does one
    with ``allow_unmatched=True``.
    """


class LabelError(ValueError):
    """Predicates that should divide a tree overlap, or leave some of it out; it lists the paths."""


class UsageError(ValueError, TypeError):
    """A transform was given something that it cannot take, or was used where it cannot work."""


class UnknownRecordError(ValueError, KeyError):
    """A :class:`flax_sg.Flow` has no record of that loss and parameter; it lists close names."""

    __str__ = Exception.__str__  # KeyError would show the message's repr


class FrozenVariableError(ModifyScopeVariableError):
    """A variable was to be written in a block in which :func:`flax_sg.constant` holds it.

    Nothing has been changed by the attempt. Creating a variable is not changing one.
    """

    def __init__(self, message: str):
        Exception.__init__(self, message)  # Flax's own words are about immutable collections

    def __reduce__(self) -> tuple:
        return type(self), (str(self),)


class UnsupportedVersionError(ValueError, RuntimeError):
    """This flax or jax does not do what the library builds on: a mask would mask nothing."""
