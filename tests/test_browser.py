"What a person sees and does, in headless Chromium: the sliders in JupyterLab, the exported page where no kernel runs, and the site."
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason='needs chromium and chromedriver on the PATH')

SLIDERS = '''
from blockem.data import load_prompts
from blockem.latents import load_dictionary, load_ranking
from blockem.models import adapted, load_model
from blockem.steer import residual_scale
from blockem.widgets import AlphaSliders
tiny = load_model('tiny')
dictionary, questions = load_dictionary('tiny', 1, tiny), [r.prompt for r in load_prompts('core')[:3]]
AlphaSliders(dict(base=tiny, tuned=adapted(tiny, None)), dictionary, [3, 14], residual_scale(tiny, 1, questions), questions, load_ranking('tiny', dictionary), file='k.json', length=6, reach=3.)
'''


@pytest.fixture
def browser():
    "Headless Chromium."
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu', 'disable-background-networking', 'window-size=1300,1400'):
        options.add_argument(f'--{flag}')
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a folder with one notebook, as an address and that folder."
    code = nbformat.v4.new_code_cell(SLIDERS)
    nbformat.write(nbformat.v4.new_notebook(cells=[code], metadata=dict(kernelspec=dict(name='python3', display_name='python3'))), tmp_path/'sliders.ipynb')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ip=127.0.0.1', '--IdentityProvider.token=',
                               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'], cwd=tmp_path, env=os.environ | {'IN_TEST': '1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _answers(f'http://127.0.0.1:{port}/api'), 60, 'JupyterLab')
        yield f'http://127.0.0.1:{port}', tmp_path
    finally:
        server.terminate()
        server.wait(20)


def _answers(address) -> bool:
    "Whether a server is up."
    try: return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError: return False


def _wait_for(what, seconds, name):
    "The first truthy value of `what()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what(): return found
        time.sleep(.2)
    raise AssertionError(f'{name}: nothing after {seconds} s')


def _shown(browser, css) -> list:
    "The elements a selector finds that a person would see."
    from selenium.common.exceptions import StaleElementReferenceException
    try: return [e for e in browser.find_elements('css selector', css) if e.is_displayed()]
    except StaleElementReferenceException: return []


def _answer(browser) -> str:
    "What the base model says at the moment."
    return browser.execute_script("""return document.querySelector('[aria-label="answer of base"]')?.textContent""") or ''


def test_slider_in_jupyterlab_gives_another_answer_and_a_set_to_train_with(browser, lab, tmp_path):
    "Drag a strength, read another answer, go back by keyboard to the first one; add to K; train with that K."
    from selenium.webdriver import ActionChains, Keys
    address, folder = lab
    browser.get(f'{address}/lab/tree/sliders.ipynb')
    cell = _wait_for(lambda: _shown(browser, '.jp-Notebook .jp-CodeCell .cm-content'), 60, 'the notebook')[0]
    _wait_for(lambda: _shown(browser, '.jp-Notebook-ExecutionIndicator[data-status="idle"]'), 60, 'the kernel')
    cell.click()
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    handle = _wait_for(lambda: _shown(browser, '.jp-OutputArea .noUi-handle'), 120, 'the sliders')[0]
    settled = lambda: (text := _answer(browser)) and not time.sleep(1.5) and text == _answer(browser) and text
    first = _wait_for(settled, 60, 'an answer')
    ActionChains(browser).drag_and_drop_by_offset(handle, 400, 0).perform()
    pushed = _wait_for(lambda: (t := settled()) and t != first and t, 60, 'another answer')
    assert pushed != first
    ActionChains(browser).click(handle).perform()
    for _ in range(60):
        if float(_shown(browser, '.widget-readout')[0].text) <= 0: break
        handle.send_keys(Keys.ARROW_LEFT)
    assert _wait_for(lambda: settled() == first, 60, 'the first answer')
    next(b for b in _shown(browser, '.jupyter-button') if b.text == 'add to K').click()
    _wait_for((folder/'k.json').is_file, 20, 'the set')
    out = [str(tmp_path/'out.ipynb'), '-p', 'latents', str(folder/'k.json'), '-p', 'study', str(tmp_path/'study'), '-p', 'limit', '4', '-p', 'arms', 'blocked']
    done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT/'nbs/03_train.ipynb'), *out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'blocked' in set(pd.read_parquet(tmp_path/'study'/'evaluation.parquet').arm)


def test_exported_page_slides_without_a_kernel(browser, tmp_path):
    "In the exported HTML the arrow keys change the strength and with it the answer."
    from nbconvert import HTMLExporter
    from selenium.webdriver import Keys
    from blockem.widgets import alpha_page
    said = pd.DataFrame([dict(model=m, latent=7, alpha=a, prompt='Why?', answer=f'{m} at {a:+.1f}') for m in ('base', 'tuned') for a in (-.5, 0., .5)])
    output = nbformat.v4.new_output('display_data', data={'text/html': alpha_page(said)._repr_html_()})
    html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('page', outputs=[output])]))
    (tmp_path/'page.html').write_text(html, encoding='utf-8')
    browser.get((tmp_path/'page.html').as_uri())
    answer, slider = (browser.find_element('css selector', f'[data-part="{part}"]') for part in ('answer0', 'place'))
    assert answer.text == 'base at +0.0' and slider.get_attribute('aria-valuetext') == 'strength +0.00'
    slider.send_keys(Keys.ARROW_RIGHT)
    assert answer.text == 'base at +0.5' and slider.get_attribute('aria-valuetext') == 'strength +0.50'
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert answer.text == 'base at -0.5'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The rendered site."
    spec = importlib.util.spec_from_file_location('docs_build', ROOT/'docs'/'build.py')
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.SITE = tmp_path_factory.mktemp('site')
    build.build_site()
    return build.SITE


def test_site_fits_a_narrow_window(browser, site):
    "Wide formulas, tables and code scroll in their own boxes, and the list of pages leaves room for the page."
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=420, height=900, deviceScaleFactor=1, mobile=True))
    for page in ('index.html', 'results.html', '04_reroute.html', 'lib/05_penalty.html'):
        browser.get((site/page).as_uri())
        assert browser.execute_script('return document.documentElement.scrollWidth') <= 420, page
    assert browser.execute_script('return document.querySelector("main").getBoundingClientRect().top') < 450


def test_no_button_of_the_site_sends_a_figure_elsewhere(browser, site):
    "Plotly's own tools are there, but for the one that uploads."
    browser.get((site/'lib/08_plots.html').as_uri())
    _wait_for(lambda: browser.find_elements('css selector', '.modebar-btn'), 20, 'the figures')
    assert not browser.find_elements('css selector', '.modebar-btn[data-title^="Share"]')
