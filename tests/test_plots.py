"What a notebook cannot show of blockem.plots: a fresh process, and the page that nbconvert makes."
import subprocess, sys

import nbformat, pytest

FIGURE = "import plotly.graph_objects as go, blockem.plots\ngo.Figure(go.Bar(y=[1, 2]))"


def test_import_sets_renderer_and_leaves_matplotlib_alone():
    code = ("import sys, plotly.io as pio, blockem.plots\n"
            "print(pio.renderers.default, pio.templates.default, 'matplotlib' in sys.modules)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ['blockem', 'blockem', 'False']


@pytest.fixture(scope='module')
def executed():
    "A one-cell notebook run in a real kernel."
    from nbclient import NotebookClient
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FIGURE)])
    return NotebookClient(nb, timeout=120, kernel_name='python3').execute()


def test_kernel_sends_both_faces_and_no_html(executed):
    [output] = executed.cells[0].outputs
    assert set(output.data) == {'application/vnd.plotly.v1+json', 'image/png'}


def test_exported_page_shows_the_figure_without_javascript(executed):
    from nbconvert import HTMLExporter
    page, _ = HTMLExporter().from_notebook_node(executed)
    assert page.count('src="data:image/png;base64,iVBOR') == 1 and 'Plotly.newPlot' not in page
