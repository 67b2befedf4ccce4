"Renders the notebooks as they are saved, without running them: `readme` writes README.md, `site` writes _docs/."
import argparse, os, posixpath, re, shutil
from pathlib import Path
from string import Template

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from plotly import io, offline
from pygments.formatters import HtmlFormatter

from blockem.cli import formulas_offline

ROOT = Path(__file__).resolve().parent.parent
NBS, SITE, IMAGES = ROOT/'nbs', ROOT/'_docs', ROOT/'docs'/'images'
PLOTLY = 'application/vnd.plotly.v1+json'
DIRECTIVE = re.compile(r'^[ \t]*#[ \t]*\|[ \t]*(.+?)[ \t]*(?:\n|\Z)', re.M)
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|[/#])([^)\s"#]+)')

formulas_offline()


def relink(text, change):
    "`text` (Markdown or HTML) with `change` applied to the path of every relative link, code left alone."
    parts = re.split(r'(```.*?```|`[^`\n]+`)', text, flags=re.S)
    parts[::2] = [LINK.sub(lambda m: m[1] + change(m[2]), p) for p in parts[::2]]
    return ''.join(parts)


def visible(cell):
    "Whether a reader should see a cell: `#| hide`, `#| include: false` and cells of directives alone are for machines."
    if cell.cell_type != 'code': return cell.cell_type == 'markdown'
    if {'hide', 'include: false'} & set(DIRECTIVE.findall(cell.source)): return False
    return bool(DIRECTIVE.sub('', cell.source).strip() or cell.outputs)


def prepare(path, data, change):
    "A notebook ready to render: hidden cells and directives gone, each output reduced by `data`, links changed."
    nb = nbformat.read(path, 4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if visible(c)]
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = relink(cell.source, change)
        else: _prepare_code(cell, data)
    return nb


def _prepare_code(cell, data):
    "Strip directives (`#| echo: false` drops the source) and keep the outputs worth reading."
    echo = 'echo: false' not in DIRECTIVE.findall(cell.source)
    cell.source = DIRECTIVE.sub('', cell.source).strip('\n') if echo else ''
    if not echo: cell.metadata['transient'] = dict(remove_source=True)  # nbconvert's name for it; an empty source alone leaves an empty box
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    for out in cell.outputs:
        if 'data' in out: out.data = data(out.data)
    cell.outputs = [o for o in cell.outputs if o.get('data', True)]


def title(nb, path):
    "A notebook's H1, or its name."
    found = next((re.search(r'^# +(.+)$', c.source, re.M) for c in nb.cells if c.cell_type == 'markdown'), None)
    return found[1].replace('`', '') if found else path.stem


# ---- README ----
def readme_data(data):
    "The first form that GitHub shows; it would print the text of a style block, and drops scripts."
    html = re.sub(r'<style.*?</style>', '', data.get('text/html', ''), flags=re.S)
    forms = {**data, 'text/html': '' if '<script' in html else html}
    kind = next((k for k in ('text/markdown', 'image/png', 'image/svg+xml', 'text/html') if forms.get(k)), 'text/plain')
    if kind == 'text/plain' and PLOTLY in data:
        raise SystemExit('nbs/index.ipynb: README.md cannot show a plotly figure without an image/png beside it')
    return nbformat.NotebookNode({kind: forms[kind]} if kind in forms else {})


def build_readme():
    "README.md from nbs/index.ipynb; pictures go to docs/images/."
    nb = prepare(NBS/'index.ipynb', readme_data, lambda link: posixpath.normpath('nbs/' + link))
    text, res = MarkdownExporter().from_notebook_node(nb, {'unique_key': 'readme', 'output_files_dir': 'docs/images'})
    for old in IMAGES.glob('readme_*'): old.unlink()
    for name, content in res['outputs'].items():
        IMAGES.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(content)
    text = re.sub(r'```\n\s*```\n|[ \t]+$', '', re.sub(r'```python\s*```\n', '', text), flags=re.M)
    titles = iter(o.data[PLOTLY]['layout']['title']['text'] for c in nbformat.read(NBS/'index.ipynb', 4).cells for o in c.get('outputs', []) if PLOTLY in o.get('data', {}))
    text = re.sub(r'!\[png\]', lambda _: f'![{next(titles)}]', text)  # for readers who cannot see it
    (ROOT/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', encoding='utf-8')


# ---- site ----
def site_data(data):
    "A figure that plotly.js draws in the page where there is one, else what the notebook saved for a static page."
    if PLOTLY in data:
        fig = io.to_html(data[PLOTLY], include_plotlyjs=False, full_html=False, auto_play=False, validate=False,
                         config={'responsive': True, 'showSendToCloud': False, 'displaylogo': False}, default_height='450px')
        return nbformat.NotebookNode({'text/html': fig})
    live = {k: v for k, v in data.items() if 'widget' not in k}
    return nbformat.NotebookNode({k: v for k, v in live.items() if 'image/png' not in live or k == 'image/png'})


def navigation(pages, here):
    "Links to every page, grouped; `pages` maps notebook path to title."
    up = lambda p: posixpath.relpath(p.relative_to(NBS).with_suffix('.html').as_posix(),
                                     posixpath.dirname(here.relative_to(NBS).as_posix()) or '.')
    item = lambda p: f'<li{" class=here" if p == here else ""}><a href="{up(p)}">{pages[p]}</a></li>'
    home = [p for p in pages if p.name == 'index.ipynb']
    groups = {'': home, 'Stages': [p for p in pages if p.parent == NBS and p not in home],
              'Library': [p for p in pages if p.parent != NBS]}
    return '\n'.join(f'{g and f"<h2>{g}</h2>"}<ul>{"".join(map(item, ps))}</ul>' for g, ps in groups.items() if ps)


def build_page(nb, path, pages, template):
    "One notebook's page under _docs/, in the place the notebook has under nbs/."
    exporter = HTMLExporter(template_name='basic', embed_images=True,
                            exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(nb, {'metadata': {'path': str(path.parent)}})
    target = SITE/path.relative_to(NBS).with_suffix('.html')
    root = os.path.relpath(SITE, target.parent).replace(os.sep, '/')
    script = f'<script src="{root}/plotly.min.js"></script>' if 'plotly-graph-div' in body else ''
    target.parent.mkdir(parents=True, exist_ok=True)
    page = template.substitute(title=pages[path], nav=navigation(pages, path), root=root, script=script, body=body)
    target.write_text(page, encoding='utf-8')


def build_site():
    "Every notebook as a page, with one style sheet and one copy of plotly.js; nothing is fetched when it is read."
    paths = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    html = lambda link: re.sub(r'\.ipynb$', '.html', link)
    books = {p: prepare(p, site_data, html) for p in paths}
    pages = {p: title(nb, p) for p, nb in books.items()}
    shutil.rmtree(SITE, ignore_errors=True)
    template = Template((ROOT/'docs'/'page.html').read_text(encoding='utf-8'))
    for path, nb in books.items(): build_page(nb, path, pages, template)
    (SITE/'plotly.min.js').write_text(offline.get_plotlyjs(), encoding='utf-8')
    style = (ROOT/'docs'/'style.css').read_text(encoding='utf-8')
    (SITE/'style.css').write_text(style + HtmlFormatter().get_style_defs('.highlight'), encoding='utf-8')
    print(f'{len(pages)} pages: open {SITE/"index.html"}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=['readme', 'site'])
    {'readme': build_readme, 'site': build_site}[parser.parse_args().what]()
