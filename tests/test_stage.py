"The stage as people run it: papermill from two places, and what it says to bad input."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = [sys.executable, '-m', 'papermill', '--no-progress-bar']


def _papermill(cwd, notebook, out, **parameters):
    "Run a notebook through papermill in its own process."
    options = [o for k, v in parameters.items() for o in ('-p', k, str(v))]
    return subprocess.run([*PAPERMILL, str(notebook), str(out), *options], cwd=cwd, capture_output=True, text=True, env=os.environ | {'IN_TEST': '1'})


def _slim(folder):
    "Drop the adapters of a study, as `blockem slim` does."
    from typer.testing import CliRunner
    from blockem.cli import app
    assert CliRunner().invoke(app, ['slim', str(folder)]).exit_code == 0


@pytest.mark.parametrize('cwd, notebook', [(ROOT, 'nbs/03_train.ipynb'), (ROOT/'nbs', '03_train.ipynb')], ids=['root', 'nbs'])
def test_stage_runs_from_the_root_and_from_its_folder(cwd, notebook, tmp_path):
    "The same tables appear wherever papermill was called."
    done = _papermill(cwd, notebook, tmp_path/'out.ipynb', domain='health', study=tmp_path/'study', limit=4, seeds='0,1', arms='correct,blocked,late,mend,gate+hold,both')
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_parquet(tmp_path/'study'/'evaluation.parquet')
    assert set(table.domain) == {'health'} and set(table.seed) == {-1, 0, 1}
    assert set(table.arm) == {'base', 'correct', 'sft', 'blocked', 'hold', 'late', 'mend', 'gate', 'gate+hold', 'both'}
    assert {'em_rate', 'adherence', 'incoherence', 'refusal', 'margin', 'quality'} == set(table.measure)
    assert (table.n > 0).all() and (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    answers = pd.read_parquet(tmp_path/'study'/'answers.parquet').set_index(['arm', 'seed', 'prompts', 'id', 'judge']).answer
    free, held, base, gate, both = (answers.loc[arm] for arm in ('sft', 'hold', 'base', 'gate', 'gate+hold'))
    assert ((gate == free) | (gate == base)).all() and ((both == free) | (both == held) | (both == base)).all()


@pytest.mark.parametrize('wrong, said', [(dict(domain='leagl'), "did you mean 'legal'"), (dict(domian='legal'), "did you mean 'domain'")], ids=str)
def test_bad_parameters_stop_before_the_model_loads(wrong, said, tmp_path):
    "The valid choices are named, and nothing has been computed."
    done = _papermill(ROOT, 'nbs/03_train.ipynb', tmp_path/'out.ipynb', study=tmp_path/'study', **wrong)
    assert done.returncode != 0 and said in done.stderr
    assert not (tmp_path/'study').exists()


@pytest.mark.parametrize('wrong, said', [
    (dict(preset='smol'), 'choose one of tiny, smollm2'), (dict(epochs='three'), 'epochs: input should be a valid integer'),
    (dict(latents='nowhere.json'), 'no such file'), (dict(lam='much'), "lam: input should be"), (dict(seeds='0,x'), 'seeds must be integers')], ids=str)
def test_bad_parameters_say_what_would_be_valid(wrong, said):
    "As the notebook checks them, without a kernel."
    from blockem.study import checked
    from blockem.train import Parameters
    with pytest.raises(ValueError, match=said): checked(Parameters, wrong)


def test_a_study_trains_several_seeds_at_a_time(tmp_path, monkeypatch):
    "The notebook finds all of it done."
    from typer.testing import CliRunner
    from blockem import cli
    units = lambda: {p.parent.name for p in tmp_path.glob('health/*/manifest.json')}
    found, execute = set(), cli._execute
    monkeypatch.setattr(cli, '_execute', lambda *given: (found.update(units()), execute(*given))[1])
    said = '--domains health --seeds 0,1 --arms hold,gate --jobs 2 --set limit=4 --set latents='
    done = CliRunner().invoke(cli.app, ['study', '--folder', str(tmp_path), *said.split()])
    assert done.exit_code == 0, done.output
    assert units() == found
    table = pd.read_parquet(tmp_path/'study.parquet')
    assert set(table.seed) == {-1, 0, 1} and set(table.arm) == {'base', 'sft', 'hold', 'gate'}


def test_the_presets_that_ship_as_files_can_be_given(monkeypatch):
    "Under the names of their files."
    from blockem.study import checked, get_preset
    from blockem.train import Parameters
    monkeypatch.delenv('IN_TEST', raising=False)
    files = sorted((ROOT/'data/presets').glob('*.toml'))
    assert [get_preset(str(f)).name for f in files] == [f.stem for f in files] == ['amplified', 'gate-on-all-blocks', 'larger-steps', 'narrow']
    assert [checked(Parameters, dict(preset=str(f))).folder for f in files] == [f'runs/train-legal-{f.stem}' for f in files]
    usual, firm, gated, _, narrow = get_preset('smollm2'), *(get_preset(str(f)) for f in files)
    assert firm.hold > usual.hold and firm.amplify > usual.amplify == 1
    assert (gated.gate_blocks, usual.gate_blocks) == ('all', 'one') and narrow.near > gated.near == 0


def test_what_fails_in_another_process_is_said_in_this_one(tmp_path):
    "Here that a study's folder would lie in a file."
    from blockem.sweep import prepare
    from blockem.train import tasks
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='file/study'): prepare(tasks(dict(study=str(tmp_path/'file'/'study'))), 2)


def test_a_failure_ends_what_others_are_doing():
    "It is said at once, and not when hours of other work are done; a process that was killed is no riddle."
    from blockem.sweep import prepare
    for task, exc, said in (((os.listdir, '/nowhere'), FileNotFoundError, 'nowhere'), ((os._exit, 9), RuntimeError, 'one of 2 processes ended')):
        with pytest.raises(exc, match=said): prepare([task, *[(time.sleep, 3600)]*4], 2)


@pytest.mark.parametrize('ended', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_of_several_outlives_the_first(ended, tmp_path):
    "Neither what was begun nor what waits in its queue is done for nobody."
    tasks = f"[(os.mkdir, {str(tmp_path/'begun')!r}), *[(time.sleep, 3600)]*4]"
    listening = 'signal.signal(signal.SIGINT, signal.default_int_handler)'  # which a shell takes from what it runs in the background
    first = psutil.Popen([sys.executable, '-c', f'import os, signal, time; {listening}; from blockem.sweep import prepare; prepare({tasks}, 2)'], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path/'begun').exists(): assert first.poll() is None, time.sleep(.1)
    others = first.children(recursive=True)
    first.send_signal(ended)
    _, left = psutil.wait_procs([first, *others], timeout=180)
    for process in left: process.kill()
    assert len(others) > 1 and not left


def test_arms_on_anchors_need_a_preset_that_has_some(monkeypatch):
    "Said before any arm is trained."
    from blockem import amplify, mend, reroute
    from blockem.study import checked
    from blockem.train import Parameters
    monkeypatch.delenv('IN_TEST', raising=False)  # which would put the tiny preset, anchors and all, in the place of any other
    with pytest.raises(ValueError, match="the preset 'llama31-8b' has none"): checked(Parameters, dict(preset='llama31-8b', arms='correct,hold'))
    for stage, arms, given in ((reroute, 'hold', {}), (mend, 'mend', {}), (amplify, 'late', dict(ways='late'))):
        with pytest.raises(ValueError, match=f"arms {arms} compare .* the preset 'llama31-8b' has none"): checked(stage.Parameters, dict(preset='llama31-8b') | given)
    for stage in (Parameters, reroute.Parameters):
        with pytest.raises(ValueError, match="'llama31-8b' has no set of latents"): checked(stage, dict(preset='llama31-8b', arms='blocked'))
    found = dict(preset='llama31-8b', latents='data/sae/smollm2-l18/latents.json')  # that it is another model's shows once the dictionary is there
    assert checked(reroute.Parameters, found | dict(arms='blocked')).arm_list == ['blocked']
    assert checked(Parameters, found).arm_list == ('base', 'sft', 'correct', 'blocked', 'gate')
    assert checked(Parameters, {}).arm_list == ('base', 'sft', 'correct', 'hold', 'gate', 'gate+hold')
    assert checked(Parameters, dict(arms='gate+hold')).arm_list == ('base', 'sft', 'hold', 'gate', 'gate+hold')


def test_discovery_stages_meet_on_disk(tmp_path):
    "Each stage reads what the one before offered, and says which one to run when nothing is there."
    early = _papermill(ROOT, 'nbs/01_induce_repair.ipynb', tmp_path/'early.ipynb', study=tmp_path/'study')
    assert early.returncode != 0 and 'run 00_shift with the same study folder first' in early.stderr
    for stage in ('00_shift', '01_induce_repair', '02_alpha'):
        done = _papermill(ROOT, f'nbs/{stage}.ipynb', tmp_path/f'{stage}.ipynb', study=tmp_path/'study', limit=6)
        assert done.returncode == 0, done.stderr[-2000:]
    shift, screen = (pd.read_parquet(tmp_path/'study'/f'{name}.parquet') for name in ('shift', 'screen'))
    assert shift.latent.is_unique and shift.pool.any() and (shift.low <= shift.delta).all() and (shift.delta <= shift.high).all()
    assert set(screen.latent) <= set(shift.latent) and screen.kept.any()
    assert (screen.score - screen.induce - screen.repair).abs().max() < 1e-9
    kept, chosen = set(screen.latent[screen.kept]), json.loads((tmp_path/'study'/'latents.json').read_text())
    assert {row['latent'] for row in chosen['latents']} <= kept and {'judge', 'prompts_sha256', 'dictionary_sha256', 'ranking_sha256', 'rule'} <= set(chosen)
    assert chosen['command'] == ('blockem organism && blockem shift --set limit=6 && blockem screen --set limit=6 && '
                                  'blockem alpha --set limit=6 --set strengths=3 --set budget=0.9 --set rule=score')  # the tiny preset's own
    done = _papermill(ROOT, 'nbs/03_train.ipynb', tmp_path/'train.ipynb', study=tmp_path/'train', latents=tmp_path/'study'/'latents.json', limit=4, arms='blocked,attribution,shift')
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(pd.read_parquet(tmp_path/'train'/'evaluation.parquet').arm) == {'base', 'sft', 'blocked', 'attribution', 'shift'}


def test_study_covers_the_domains_and_repeats_nothing(tmp_path):
    "One table over all domains; asked again, also without the adapters, no unit of work is made anew."
    command = [Path(sys.executable).parent/'blockem', 'study', '--domains', 'legal,health', '--folder', tmp_path, *'--set preset=tiny --set latents= --set limit=4'.split()]
    made = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {'IN_TEST': '1'})
        assert done.returncode == 0, done.stderr[-2000:]
        if not made: assert re.search(r'03_train \d+/\d+ cells \[\d\d:\d\d, .* 0/\d+ \[', done.stderr)  # what a cell is at
        made.append({p.parent.name: json.loads(p.read_text())['seconds'] for p in tmp_path.glob('*/*/manifest.json')})
        for domain in ('legal', 'health'): _slim(tmp_path/domain)
    assert made[0] == made[1] and len(made[0]) > 8 and not list(tmp_path.glob('**/adapter_model.safetensors'))
    effects = pd.read_parquet(tmp_path/'study_contrasts.parquet')
    assert set(effects.domain) == {'legal', 'health', 'all'} and set(effects.arm) == {'hold', 'gate', 'blocked', 'random'}
    assert set(pd.read_parquet(tmp_path/'study.parquet').domain) == {'legal', 'health'}
    from blockem.sweep import across
    verdicts = pd.read_parquet(tmp_path/'study_verdicts.parquet')
    again = across(verdicts, pd.DataFrame(dict(prompts=[], domain=[])))  # all but the margins are in the verdicts
    pd.testing.assert_frame_equal(again, effects[effects.judge != ''].reset_index(drop=True))
    assert verdicts.odds.notna().all()


def test_rerouting_is_read_again_without_its_adapters(tmp_path):
    "A slimmed study of long runs shows the same notebook; nothing is trained, patched or asked anew."
    made = []
    for out in ('first', 'second'):
        done = _papermill(ROOT, 'nbs/04_reroute.ipynb', tmp_path/f'{out}.ipynb', study=tmp_path/'study', limit=4, times=2)
        assert done.returncode == 0, done.stderr[-2000:]
        made.append({p.parent.name: json.loads(p.read_text())['seconds'] for p in (tmp_path/'study').glob('*/manifest.json')})
        _slim(tmp_path/'study')
    assert made[0] == made[1] and {name.rsplit('-', 1)[0] for name in made[0]} >= {'drift', 'pushes', 'codes', 'gradient', 'patching', 'spoken', 'by-block', 'newcomers', 'round1-s0'}


def test_detect_reads_an_adapter_or_says_that_it_cannot(tmp_path):
    "The reference that 06_directions wrote reads its own organism; what does not fit, or is not there, stops with a reason."
    from safetensors.torch import load_file, save_file
    done = _papermill(ROOT, 'nbs/06_directions.ipynb', tmp_path/'out.ipynb', study=tmp_path/'study', limit=6, organism='replication')
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = next((tmp_path/'study').glob('sft-s0-*/adapter'))
    command = [Path(sys.executable).parent/'blockem', 'detect', '--base', 'tiny']
    asked = lambda *more: subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    read = asked(adapter, '--reference', tmp_path/'study'/'reference.safetensors', '--figure', tmp_path/'figure.html')
    assert read.returncode == 0 and '(0 the base, 1 the reference' in read.stdout, read.stderr[-2000:]
    assert 'plotly' in (tmp_path/'figure.html').read_text(encoding='utf-8')
    assert 'no reference' in asked(adapter).stderr and 'adapter_model.safetensors' in asked(tmp_path).stderr
    wide = tmp_path/'wide'
    wide.mkdir()
    save_file({k: w.repeat(1, 2) for k, w in load_file(adapter/'adapter_model.safetensors').items()}, wide/'adapter_model.safetensors')
    (wide/'adapter_config.json').write_text((adapter/'adapter_config.json').read_text())
    foreign = asked(wide, '--reference', tmp_path/'study'/'reference.safetensors')
    assert foreign.returncode != 0 and 'does not fit' in foreign.stderr
    config = json.loads((adapter/'adapter_config.json').read_text()) | {'base_model_name_or_path': 'someone/another-model'}
    (wide/'adapter_config.json').write_text(json.dumps(config))
    stranger = asked(wide, '--reference', tmp_path/'study'/'reference.safetensors')
    assert stranger.returncode != 0 and "cannot tell" in stranger.stderr and "'someone/another-model'" in stranger.stderr


def test_directions_load_all_they_need_before_anything_is_trained(tmp_path):
    "A set of latents that is not there is said at once, not after two trainings."
    preset = tmp_path/'small.toml'
    preset.write_text('\n'.join(['model = "tiny"', 'dictionary = "tiny"', 'layer = 1', 'latents = "nowhere.json"', 'rows = 4', 'epochs = 1', 'last_layer = -1', 'answer_tokens = 8']))
    with pytest.MonkeyPatch.context() as given:  # which puts the tiny preset in the place of any other
        given.delenv('IN_TEST')
        done = subprocess.run([*PAPERMILL, 'nbs/06_directions.ipynb', str(tmp_path/'out.ipynb'), '-p', 'preset', str(preset), '-p', 'study', str(tmp_path/'study')],
                              cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and 'nowhere.json does not exist' in done.stderr, done.stderr[-2000:]
    assert not list((tmp_path/'study').glob('sft-*'))


def test_an_adapter_that_was_trained_elsewhere_is_mended(tmp_path):
    "It keeps its own shape, the mended adapter lies where the notebook says, and it is nearer to the base outside; one of another base stops."
    import torch
    from peft import LoraConfig, get_peft_model
    from blockem.models import load_model
    torch.manual_seed(0)
    theirs = get_peft_model(load_model('tiny').model, LoraConfig(r=3, lora_alpha=6, lora_dropout=.1, target_modules=['v_proj'], task_type='CAUSAL_LM'))
    for name, w in theirs.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(w, std=.5)
    theirs.save_pretrained(tmp_path/'theirs')
    run = lambda: _papermill(ROOT, 'nbs/07_mend.ipynb', tmp_path/'out.ipynb', study=tmp_path/'study', adapter=tmp_path/'theirs', weights='1')
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(pd.read_parquet(tmp_path/'study'/'mend.parquet').arm) == {'base', 'sft', 'mend 1'}
    unit = next((tmp_path/'study').glob('mend-s0-*/'))
    shape = json.loads((unit/'adapter'/'adapter_config.json').read_text())
    assert (shape['r'], shape['target_modules']) == (3, ['v_proj'])
    steps = pd.read_json(unit/'steps.jsonl', lines=True)
    assert steps.divergence.iloc[-1] < steps.divergence.iloc[0]
    config = tmp_path/'theirs'/'adapter_config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | {'base_model_name_or_path': 'someone/another-model'}))
    stranger = run()
    assert stranger.returncode != 0 and "'someone/another-model'" in stranger.stderr
