"What must hold of the repository itself: tags, pins, saved outputs, and what the library may not do."
import ast, json, re, shutil, socket, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
STAGES = [p for p in NOTEBOOKS if p.parent.name == 'nbs' and re.match(r'\d\d_', p.name)]
MODULES = sorted((ROOT/'blockem').rglob('*.py'))


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def pins():
    "Package name -> pinned version, from requirements.lock."
    lines = (ROOT/'requirements.lock').read_text().splitlines()
    return [tuple(line.split(';')[0].strip().split('==')) for line in lines if line and not line.startswith('#')]


def test_each_stage_has_one_parameters_cell():
    "Without the tag papermill runs a stage on its defaults and reports success."
    assert STAGES, 'no stage notebook nbs/NN_*.ipynb found'
    tagged = {p.name: sum('parameters' in c['metadata'].get('tags', []) for c in cells(p)) for p in STAGES}
    assert tagged == dict.fromkeys(tagged, 1)


def test_cleaning_keeps_tags():
    assert 'tags' in settings()['allowed_cell_metadata_keys'].split()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_saved_errors(path):
    errors = [o['ename'] for c in cells(path) for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_kernel_is_python3(path):
    "nbdev_test and papermill look the kernel up by this name."
    assert json.loads(path.read_text(encoding='utf-8'))['metadata'].get('kernelspec', {}).get('name') == 'python3'


def test_lock_pins_exactly():
    lines = [l for l in (ROOT/'requirements.lock').read_text().splitlines() if not l.startswith('#')]
    loose = [l for l in lines if not re.fullmatch(r'[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*(; [a-z_]+ == "[a-z]+")?', l)]
    assert not loose
    names = [canonicalize_name(n) for n, _ in pins()]
    assert len(names) == len(set(names))


def test_lock_satisfies_settings():
    locked = {canonicalize_name(n): v for n, v in pins()}
    wanted = [Requirement(r) for key in ('requirements', 'dev_requirements') for r in settings()[key].split()]
    missing = [str(r) for r in wanted if not r.specifier.contains(locked.get(canonicalize_name(r.name), '0'))]
    assert not missing


UNPICKLERS = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}
LOADERS = {'torch.load', 'pd.read_pickle', 'pandas.read_pickle'}


def dangers(source):
    "Line and reason of everything in a module that could run code from a file or a hub."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name.split('.')[0] for a in node.names} | {(getattr(node, 'module', '') or '').split('.')[0]}
            if names & UNPICKLERS: yield node.lineno, 'imports an unpickler'
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg in ('trust_remote_code', 'allow_pickle'):
            if getattr(node.value, 'value', None) is not False: yield node.value.lineno, node.arg


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_library_runs_no_code_from_files(path):
    assert not list(dangers(path.read_text(encoding='utf-8')))


@pytest.mark.parametrize('source', ['import pickle', 'from joblib import load', 'import torch\ntorch.load(f)',
                                    'f(trust_remote_code=True)', 'np.load(f, allow_pickle=yes)'])
def test_dangers_are_seen(source):
    assert list(dangers(source))


def test_import_is_light():
    "Importing blockem alone must not load torch or anything that does."
    code = 'import sys, blockem; print({"torch", "transformers", "sae_lens", "pandas", "plotly"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == 'set()'


def test_readme_links_exist():
    prose = re.sub(r'```.*?```|`[^`\n]+`', '', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.S)
    links = re.findall(r'(?:\]\(|(?:src|href)=")(?![a-z]+:|#)([^)\s"#]+)', prose)
    assert not [link for link in links if not (ROOT/link).exists()]


def test_links_between_notebooks_lead_to_a_heading():
    "JupyterLab and the site keep a heading's capitals in its address."
    cells = {p: nbformat.read(p, 4).cells for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    places = {p: {h.strip().replace(' ', '-') for c in some if c.cell_type == 'markdown' for h in re.findall(r'^#+ (.*)$', c.source, flags=re.M)} for p, some in cells.items()}
    links = [(p, file, place) for p, some in cells.items() for c in some for file, place in re.findall(r'\]\(([\w/.-]*\.ipynb)?#([^)\s]+)\)', c.source)]
    assert len(links) > 5
    assert not [link for link in links if link[2] not in places[(link[0].parent/link[1]).resolve() if link[1] else link[0]]]


@pytest.mark.skipif(not shutil.which('make'), reason='needs make on the PATH')
def test_cleaning_takes_caches_alone(tmp_path):
    "Also where a folder's name has a space in it, which must not make two names of it."
    kept, gone = [tmp_path/'runs'/name for name in ('my', 'my study')], tmp_path/'runs'/'my study'/'__pycache__'
    for folder in (*kept, gone): folder.mkdir(parents=True)
    subprocess.run(['make', '-f', ROOT/'Makefile', 'clean'], cwd=tmp_path, capture_output=True, check=True)
    assert [f.is_dir() for f in (*kept, gone)] == [True, True, False]


@pytest.mark.parametrize('method', ['connect', 'connect_ex'])
def test_other_machines_are_out_of_reach(method):
    with socket.socket() as s, pytest.raises(RuntimeError, match='loopback only'):
        getattr(s, method)(('192.0.2.1', 80))


def test_names_and_datagrams_are_out_of_reach():
    with pytest.raises(RuntimeError, match="not 'example.com'"):
        socket.create_connection(('example.com', 443), timeout=1)
    with socket.socket(type=socket.SOCK_DGRAM) as s, pytest.raises(RuntimeError, match='loopback only'):
        s.sendto(b'hello', ('192.0.2.1', 53))


def test_loopback_is_open():
    with socket.create_server(('127.0.0.1', 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            server.accept()[0].sendall(b'ok')
            assert client.recv(2) == b'ok'
