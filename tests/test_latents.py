"Dictionaries read without SAELens give what SAELens itself computes."
import warnings

import pytest
import torch

from blockem.latents import attribution, encode, load_dictionary, reconstruct, sparse
from blockem.models import load_model

WIDTH, LATENTS, HOOK = 32, 40, 'blocks.1.hook_resid_post'


@pytest.fixture(scope='module')
def lm():
    return load_model('tiny', device='cpu')


@pytest.fixture
def x():
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


def randomised(sae, seed=0):
    "The autoencoder with every weight drawn anew, so that no bias is zero and no decoder row is of unit norm."
    generator = torch.Generator().manual_seed(seed)
    for name, p in sae.named_parameters():
        p.data = torch.rand(p.shape, generator=generator)*.5 if name == 'threshold' else torch.randn(p.shape, generator=generator)*.5
    return sae


def about(**more):
    from sae_lens.saes.sae import SAEMetadata
    return dict(d_in=WIDTH, d_sae=LATENTS, metadata=SAEMetadata(hook_name=HOOK), **more)


def standard(**more):
    from sae_lens import StandardSAE, StandardSAEConfig
    return StandardSAE(StandardSAEConfig(**about(**more)))


def jumprelu(**more):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    return JumpReLUSAE(JumpReLUSAEConfig(**about(**more)))


def topk(**more):
    from sae_lens import TopKSAE, TopKSAEConfig
    return TopKSAE(TopKSAEConfig(**about(k=5, **more)))


CASES = [standard, jumprelu, topk]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('make', CASES)
def test_same_as_saelens(make, bias, lm, x, tmp_path):
    sae = randomised(make(apply_b_dec_to_input=bias))
    sae.save_model(tmp_path)
    dictionary = load_dictionary(str(tmp_path), 1, lm)
    torch.testing.assert_close(sparse(dictionary, x), sae.encode(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reconstruct(dictionary, x), sae(x), atol=1e-3, rtol=1e-4)


def test_decoder_norms_are_folded(lm, x, tmp_path):
    sae = randomised(topk(rescale_acts_by_decoder_norm=True))
    sae.save_model(tmp_path)
    dictionary = load_dictionary(str(tmp_path), 1, lm)
    torch.testing.assert_close(sparse(dictionary, x), sae.encode(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reconstruct(dictionary, x), sae(x), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(LATENTS))


@pytest.mark.parametrize('inference', [True, False])
def test_batchtopk(inference, lm, x, tmp_path):
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    sae = randomised(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**about(k=4))))
    sae.topk_threshold.fill_(1.5)
    sae.save_model(tmp_path/'training')
    sae.save_inference_model(tmp_path/'inference')
    theirs = SAE.load_from_disk(tmp_path/'inference')
    dictionary = load_dictionary(str(tmp_path/('inference' if inference else 'training')), 1, lm)
    torch.testing.assert_close(sparse(dictionary, x), theirs.encode(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reconstruct(dictionary, x), theirs(x), atol=1e-3, rtol=1e-4)


def test_dense_relu_for_all_kinds(lm, x, tmp_path):
    "z ignores the top k: it is the plain ReLU of the encoder."
    sae = randomised(topk())
    sae.save_model(tmp_path)
    dictionary = load_dictionary(str(tmp_path), 1, lm)
    dense = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    torch.testing.assert_close(encode(dictionary, x), dense.detach(), atol=1e-4, rtol=1e-4)
    assert (encode(dictionary, x) > 0).sum(1).min() > 5


def test_half_precision_is_read_as_float32(lm, tmp_path):
    randomised(jumprelu()).to(torch.float16).save_model(tmp_path)
    dictionary = load_dictionary(str(tmp_path), 1, lm)
    assert {t.dtype for t in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.threshold)} == {torch.float32}


def test_gated_is_refused(lm, tmp_path):
    from sae_lens import GatedSAE, GatedSAEConfig
    GatedSAE(GatedSAEConfig(**about())).save_model(tmp_path)
    with pytest.raises(ValueError, match="architecture 'gated'; blockem reads those with one linear encoder: standard"):
        load_dictionary(str(tmp_path), 1, lm)


def test_unfolded_normalisation_is_refused(lm, tmp_path):
    standard(normalize_activations='layer_norm').save_model(tmp_path)
    with pytest.raises(ValueError, match="normalize_activations 'layer_norm', expected 'none'"):
        load_dictionary(str(tmp_path), 1, lm)


def test_a_release_that_does_not_exist(lm):
    with pytest.raises(ValueError, match="not 'tiny', not a folder .* SAELens cannot load release 'sae', id 'nowhere'"):
        load_dictionary('sae/nowhere', 1, lm)


def test_a_release_goes_through_saelens(lm, x, monkeypatch):
    from sae_lens import SAE
    sae = randomised(jumprelu())
    asked = []
    monkeypatch.setattr(SAE, 'from_pretrained', lambda *names: asked.append(names) or sae)
    dictionary = load_dictionary('some-release/layer_1/width_40', 1, lm)
    assert asked == [('some-release', 'layer_1/width_40')]
    torch.testing.assert_close(sparse(dictionary, x), sae.encode(x), atol=1e-4, rtol=1e-4)


def test_attribution_leaves_no_trace(lm):
    from blockem.data import load_prompts
    from blockem.models import decoder_blocks
    hooks = len(decoder_blocks(lm.model)[1]._forward_hooks)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        effect = attribution(lm, load_dictionary('tiny', 1, lm), load_prompts('core')[:2])
    assert effect.shape == (2, 256) and effect.abs().sum() > 0
    assert len(decoder_blocks(lm.model)[1]._forward_hooks) == hooks
    assert all(p.grad is None for p in lm.model.parameters())
