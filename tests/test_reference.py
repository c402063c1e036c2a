"""The reference kernels against torch's own operators and hand-worked values."""

import pytest
import torch
import torch.nn.functional as F

from qrun.kernels import reference


def test_rms_norm_is_torchs() -> None:
    x, weight = torch.randn(3, 17), torch.randn(17)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (17,), weight, 1e-5))


@pytest.mark.parametrize("piece", [3, 8, 1024])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 24), (5, 1, 8)])
def test_attention_in_pieces_is_torchs(heads: int, kv_heads: int, dim: int, piece: int) -> None:
    torch.manual_seed(0)
    start, tokens = 11, 7
    q = torch.randn(tokens, heads, dim)
    k, v = torch.randn(2, kv_heads, start + tokens, dim)
    mask = torch.arange(start + tokens)[None] <= torch.arange(start, start + tokens)[:, None]
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
    ours = reference.attend(q, lambda a, b: (k[:, a:b], v[:, a:b]), start, piece=piece)
    torch.testing.assert_close(ours, expected)

    window = 5
    mask &= torch.arange(start + tokens)[None] > torch.arange(start, start + tokens)[:, None] - window
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
    ours = reference.attend(q, lambda a, b: (k[:, a:b], v[:, a:b]), start, window=window, piece=piece)
    torch.testing.assert_close(ours, expected)


def test_activations_round_trip_within_half_a_step() -> None:
    x = torch.randn(5, 200) * torch.tensor([[1e-3], [1.0], [50.0], [1.0], [0.0]])
    for kind, step in (("int8", 1 / 127), ("fp8", 1 / 14)):
        error = (reference.round_activations(x, kind) - x).abs()
        assert (error <= x.abs().amax(-1, keepdim=True) * step / 2 * 1.001).all()
    assert reference.round_activations(x, "16") is x


def test_the_correction_bias_selects_and_does_not_weigh() -> None:
    x, router = torch.eye(3), torch.tensor([[3.0, 0, 0], [2.0, 0, 0], [0.0, 0, 0]])
    weights, chosen = reference.route(x[:1], router, torch.tensor([0.0, -1.0, 1.0]), 2, normalise=True, norm_min=1e-12)
    assert set(chosen[0].tolist()) == {0, 2}
    chances = torch.softmax(torch.tensor([3.0, 2.0, 0.0]), 0)
    expected = chances[chosen[0]] / chances[[0, 2]].sum()
    torch.testing.assert_close(weights[0], expected)
    plain, _ = reference.route(x[:1], router, None, 2, normalise=False, norm_min=1e-12)
    torch.testing.assert_close(plain[0], chances[:2])
