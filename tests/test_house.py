"""The layout of the library: which folder may import which, annotations included.

`docs/how_it_works.md` draws it.
"""

import ast
import graphlib
from pathlib import Path

import flax_sg

ROOT = Path(flax_sg.__file__).parent
JAX = {'_errors', '_compat.jax'}
MAY_IMPORT = {
    '_errors': set(),
    'data_structures': set(),
    '_compat': set(),
    '_filters': {'_errors'},
    '_jax': JAX,
    '_transforms': {'_filters', '_jax', *JAX},
    '_views': {'_transforms', '_filters', '_jax', *JAX},
    'nn': {'_views', '_transforms', '_filters', '_jax', '_compat.linen', *JAX},
    'nnx': {'_views', '_transforms', '_filters', '_jax', '_compat.nnx', *JAX},
    '_flow': {'_views', '_filters', '_jax', *JAX},
}
FILES = sorted(ROOT.rglob('*.py'))


def name_of(file):
    return '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(file):
    """Yield the modules that a file imports: those of flax_sg without its name in front."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file}: a relative import'
            for alias in node.names:
                path = ROOT.parent.joinpath(*node.module.split('.'), alias.name)
                is_module = path.is_dir() or path.with_suffix('.py').exists()
                yield f'{node.module}.{alias.name}' if is_module else node.module


def of_ours(file):
    return {
        module.removeprefix('flax_sg.') for module in imports(file) if module.startswith('flax_sg.')
    }


def test_imports_point_down():
    for file in FILES:
        check_imports(file)


def check_imports(file):
    if (folder := name_of(file).split('.')[0]) == '__init__':
        return
    allowed = {folder, *MAY_IMPORT[folder]}
    for module in of_ours(file):
        top, _, rest = module.partition('.')
        assert {top, f'{top}.{rest.split(".")[0]}'} & allowed, f'{name_of(file)} imports {module}'
    if name_of(file) == '_compat.jax':
        assert not of_ours(file)


def test_no_circle():
    graph = {name_of(file): of_ours(file) for file in FILES}
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) >= len(FILES)


def test_private_names_live_in_one_folder():
    for file in FILES:
        private = [
            module
            for module in imports(file)
            if module.split('.')[0] in ('jax', 'flax')
            and any(part.startswith('_') for part in module.split('.')[1:])
        ]
        assert not private or name_of(file).startswith('_compat'), (name_of(file), private)


def test_linen_is_known_in_nn_alone():
    for file in FILES:
        linen = [m for m in imports(file) if m.startswith(('flax.linen', 'flax_sg.nn.'))]
        of_linen = name_of(file).split('.')[0] == 'nn' or name_of(file) == '_compat.linen'
        assert not linen or of_linen, (name_of(file), linen)


def test_each_folder_says_what_lives_there():
    for folder in {file.parent for file in FILES}:
        assert ast.get_docstring(ast.parse((folder / '__init__.py').read_text()))
