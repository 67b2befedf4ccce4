"What a person at a kernel may do with the stages: run any cell again, after all others."
import ast
import json
from pathlib import Path

import pytest

STAGES = sorted((Path(__file__).resolve().parent.parent/'nbs').glob('0*.ipynb'))


def _cells(notebook) -> list: # of (source, whether it holds the parameters)
    "The code cells of a notebook."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [(''.join(c['source']), 'parameters' in c['metadata'].get('tags', [])) for c in cells if c['cell_type'] == 'code']


def _bound(nodes) -> set:
    "Names that statements at the top of a cell bind, but for functions and classes; loops count, comprehensions have names of their own."
    inner = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, inner): continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): found.add(node.id)
        todo += ast.iter_child_nodes(node)
    return found


def _defined(nodes) -> set:
    "Names of the functions and classes of a cell."
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize('notebook', STAGES, ids=lambda path: path.stem)
def test_no_cell_takes_the_name_of_a_parameter_or_of_what_is_exported(notebook):
    "The cells that read them could not be run again."
    parsed = [(ast.parse(source).body, source, parameters) for source, parameters in _cells(notebook)]
    parameters = set().union(*[_bound(body) for body, _, those in parsed if those])
    exported = set().union(*[_defined(body) for body, source, _ in parsed if source.startswith('#| export')])
    taken = {name for body, _, those in parsed if not those for name in _bound(body) & (parameters | exported)}
    assert parameters and exported and not taken
