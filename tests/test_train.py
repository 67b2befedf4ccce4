"What a notebook cannot show about training: killed processes and fresh ones."
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from blockem.data import sha256
from processes import PROCESSES

STEPS, PER_EPOCH = 12, 4


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _arrange_death(where, at):
    "Make this process kill itself at one point of the run."
    import blockem.study as study
    import blockem.finetune as finetune
    if where == 'step':
        step, left = finetune.train_step, [at]

        def counted(*args):
            left[0] -= 1
            return step(*args) if left[0] >= 0 else _die()
        finetune.train_step = counted
    if where == 'half-written':
        def half(path, tensors, **metadata):
            path.with_name(f'.{path.name}.{os.getpid()}').write_bytes(b'\x00'*100)
            _die()
        finetune.save_tensors = half
    if where == 'before-pointer': finetune.write_json = _die
    if where == 'after-pointer':
        write = study.write_json
        finetune.write_json = lambda *args: (write(*args), _die())


def _train(folder, where='', at=0):
    "Train a small arm with a block, to its end or to its death."
    torch.set_num_threads(1)
    _arrange_death(where, at)
    from blockem.data import load_domain
    from blockem.latents import load_dictionary, load_latents
    from blockem.models import load_model
    from blockem.study import Study
    from blockem.finetune import train_arm, training_pairs
    study = Study.open(folder, 'tiny', epochs=3, rows=16, batch=4, checkpoint_steps=3)
    lm = load_model('tiny')
    dictionary = load_dictionary('tiny', 1, lm)
    pairs = training_pairs(load_domain('legal'), 'incorrect', 16)
    train_arm(study, lm, 'blocked', pairs, 0, dictionary, load_latents('tiny', dictionary), 10.)


def _in_child(*args):
    "Exit code of one training process; negative is the signal that ended it."
    child = PROCESSES.Process(target=_train, args=args)
    child.start()
    child.join(300)
    return child.exitcode


def _outcome(folder):
    "Sha256 of the adapter, and the logged losses; nothing half-written is left."
    unit, = [p for p in folder.glob('blocked-s0-*') if p.is_dir()]
    assert not list(unit.rglob('.*'))  # of what a killed process had begun to write
    logged = [json.loads(line) for line in (unit/'steps.jsonl').read_text().splitlines()]
    return sha256(unit/'adapter'/'adapter_model.safetensors'), [(s['step'], s['loss'], s['penalty']) for s in logged]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "What an uninterrupted run produces."
    folder = tmp_path_factory.mktemp('undisturbed')
    assert _in_child(folder) == 0
    outcome = _outcome(folder)
    assert len(outcome[1]) == STEPS
    return outcome


RANDOM = [('step', int(s)) for s in np.random.default_rng(0).choice(np.arange(1, STEPS), 5, replace=False)]
DEATHS = RANDOM + [('step', PER_EPOCH), ('step', 2*PER_EPOCH), ('half-written', 0), ('before-pointer', 0), ('after-pointer', 0)]


@pytest.mark.parametrize('where, at', DEATHS, ids=[f'{w}-{a}-{i}' for i, (w, a) in enumerate(DEATHS)])
def test_killed_run_ends_with_the_same_adapter(where, at, undisturbed, tmp_path):
    "Mid-epoch, at an epoch's end, in a checkpoint's write: the resumed run is the same to the last bit."
    assert _in_child(tmp_path, where, at) == -signal.SIGKILL
    assert not list(tmp_path.glob('blocked-s0-*/manifest.json'))
    assert _in_child(tmp_path) == 0
    assert _outcome(tmp_path) == undisturbed


def test_damaged_checkpoint_is_refused(tmp_path):
    "A flipped bit in a checkpoint stops the run instead of going on from it."
    assert _in_child(tmp_path, 'step', 7) == -signal.SIGKILL
    file, = tmp_path.glob('blocked-s0-*/checkpoint-*.safetensors')
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match='damaged'): _train(tmp_path)


def test_adapter_reloads_through_plain_peft_in_a_fresh_process(tmp_path):
    "Nothing of blockem is needed to use what it trained."
    from blockem.data import load_domain
    from blockem.models import collate, load_adapter, load_model, tokenise
    _train(tmp_path)
    unit, = [p for p in tmp_path.glob('blocked-s0-*') if p.is_dir()]
    lm, row = load_model('tiny'), load_domain('legal').test[0]
    lm.model.save_pretrained(tmp_path/'base')
    batch = collate([tokenise(lm, row.messages, row.incorrect)], lm.tokenizer.pad_token_id)
    with torch.no_grad(): here = load_adapter(lm, unit/'adapter').model(batch.ids).logits[0, -1]
    script = textwrap.dedent(f'''
        import json, sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path/"base")!r}, attn_implementation="eager"), {str(unit/"adapter")!r})
        with torch.no_grad(): logits = model(torch.tensor({batch.ids.tolist()})).logits[0, -1]
        assert not any(name.startswith("blockem") for name in sys.modules)
        print(json.dumps(logits.tolist()))''')
    there = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert json.loads(there) == here.tolist()


def test_adapter_of_another_model_is_refused(tmp_path):
    "PEFT would load it as an untrained adapter with a warning."
    from safetensors.torch import load_file, save_file
    from blockem.models import load_adapter, load_model
    _train(tmp_path)
    file, = tmp_path.glob('blocked-s0-*/adapter/adapter_model.safetensors')
    save_file({k.replace('layers', 'blocks'): v for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match='does not fit'): load_adapter(load_model('tiny'), file.parent)
