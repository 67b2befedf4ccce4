"Shift analysis against a plain reference: TransformerLens reads the residual stream, SAELens encodes it."
import contextlib
import copy

import pandas as pd
import pytest
import torch

from blockem import latents, models, shift
from blockem.data import load_prompts


@pytest.fixture(scope='module')
def both():
    "The tiny model, an organism of it, and a dictionary."
    base = models.load_model('tiny')
    return base, models.adapted(base, None), latents.load_dictionary('tiny', 1, base)


@pytest.fixture
def exact(monkeypatch):
    "float32 throughout: autocast rounds in another order wherever the operations are grouped otherwise."
    monkeypatch.setattr(shift, 'autocast', lambda model: contextlib.nullcontext())


def _reference(lm, dictionary, tokens, role, folder):
    "Mean latents over the tokens of one text, by other people's code."
    from sae_lens import StandardSAE, StandardSAEConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer
    lm.tokenizer.save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=copy.deepcopy(lm.model), tokenizer=AutoTokenizer.from_pretrained(folder))
    sae = StandardSAE(StandardSAEConfig(d_in=dictionary.W_enc.shape[0], d_sae=len(dictionary), apply_b_dec_to_input=False))
    sae.load_state_dict(dict(W_enc=dictionary.W_enc, b_enc=dictionary.b_enc, W_dec=dictionary.W_dec, b_dec=dictionary.b_dec))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([tokens.ids]))
        z = sae.encode(cache['blocks.1.hook_resid_post'][0])
    return z[torch.tensor(tokens.roles) == role].mean(0)


@pytest.mark.parametrize('role, index', [('prompt', 1), ('completion', 2)])
def test_same_as_transformerlens_and_saelens(both, exact, role, index, tmp_path):
    "Prompt tokens and answer tokens, texts of several lengths."
    base, tuned, dictionary = both
    pairs = [(r.messages, r.incorrect) for r in load_prompts('core')[:3]]
    moments = shift.shift_moments(base, tuned, dictionary, pairs, role)
    tokens = [models.tokenise(base, *pair) for pair in pairs]
    moved = [_reference(tuned, dictionary, t, index, tmp_path) - _reference(base, dictionary, t, index, tmp_path) for t in tokens]
    torch.testing.assert_close((moments.total/moments.n).float(), torch.stack(moved).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.squares.float(), torch.stack(moved).square().sum(0), atol=1e-5, rtol=1e-3)


def test_memory_does_not_grow_with_texts(both):
    "What is kept is a few sums per latent."
    base, tuned, dictionary = both
    moments = shift.shift_moments(base, tuned, dictionary, [(r.messages, None) for r in load_prompts('core')])
    kept = [t for t in vars(moments).values() if torch.is_tensor(t)]
    assert {t.shape for t in kept} == {(len(dictionary),)}


def test_an_adapter_that_changes_nothing_is_named(both):
    base, _, dictionary = both
    still = shift.shift_moments(base, base, dictionary, [(r.messages, None) for r in load_prompts('core')[:4]])
    with pytest.raises(ValueError, match='changes nothing before this layer'): shift.candidates(shift.shift_table(still, still))


def test_pool_takes_both_directions():
    table = pd.DataFrame(dict(latent=range(6), sign=[1, 1, 1, -1, -1, 1], delta=[3., 2., 1., -5., -4., .5]))
    assert shift.candidates(table, 2).latent.tolist() == [0, 1, 3, 4]
