"""Calibrated rounding of single weights: grids, GPTQ, foldable scales, and what the formats become on disk."""

from typing import Any

import pytest
import torch

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat, Format, PlainFormat
from qrun.kernels.reference import round_activations
from qrun.quantize import export
from qrun.quantize.fold import best_scale
from qrun.quantize.gptq import Hessian, gptq, inverse_root, nearest
from qrun.quantize.grid import find_grid
from qrun.quantize.rounding import Rounder, written_format
from qrun.recipe import WeightScheme


def problem(n: int = 48, k: int = 128, samples: int = 512) -> tuple[torch.Tensor, torch.Tensor, Hessian]:
    """Weights, correlated inputs of uneven size, and their Hessian."""
    torch.manual_seed(n + k)
    w = torch.randn(n, k) * 0.05
    x = torch.randn(samples, 24) @ torch.randn(24, k) + 0.3 * torch.randn(samples, k)
    x *= torch.rand(k) * 2 + 0.05
    hessian = Hessian.zeros(k)
    hessian.add(x[:200])
    hessian.add(x[200:])
    return w, x, hessian


def off(x: torch.Tensor, w: torch.Tensor, other: torch.Tensor) -> float:
    return float(((x @ (other - w).t()).square().sum() / (x @ w.t()).square().sum()).sqrt())


@pytest.mark.parametrize("form", [AffineFormat(b, g, True) for b in (2, 3, 4, 8) for g in (32, 64, 0)])
def test_gptq_beats_weighted_rounding_beats_plain(form: AffineFormat) -> None:
    w, x, hessian = problem()
    plain = nearest(w, torch.ones(w.shape[1]), form)
    weighted = nearest(w, hessian.importance, form)
    for act_order in (False, True):
        best = gptq(w, hessian, form, act_order=act_order)
        assert off(x, w, best.values()) < 0.8 * off(x, w, weighted.values())
        assert torch.equal(best.packed().dequantize(), best.values())
    assert off(x, w, weighted.values()) <= off(x, w, plain.values())
    assert hessian.error(plain.values() - w) == pytest.approx(
        float((x @ (plain.values() - w).t()).square().sum()), rel=1e-3
    )


def test_what_was_observed_is_left_as_it_was() -> None:
    w, _, hessian = problem()
    before = hessian.sum.clone()
    root = inverse_root(hessian.sum)
    gptq(w, hessian, AffineFormat(4, 64, True), act_order=True)
    gptq(w, hessian, AffineFormat(2, 32, True))
    assert torch.equal(hessian.sum, before)
    damped = before + 0.01 * before.diagonal().mean() * torch.eye(len(before))
    torch.testing.assert_close(root.t() @ root @ damped, torch.eye(len(before)), atol=5e-3, rtol=0)


def test_zero_points_are_supported_too() -> None:
    w, x, hessian = problem()
    w += 0.1
    form = AffineFormat(3, 32, False)
    codes = gptq(w, hessian, form)
    assert torch.equal(codes.packed().dequantize(), codes.values())
    assert off(x, w, codes.values()) < off(x, w, form.quantize(w).dequantize())


def test_the_grid_minimises_what_it_is_asked_to() -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 32)
    importance = torch.rand(32) ** 4

    def cost(weight: torch.Tensor, by: torch.Tensor) -> float:
        grid = find_grid(w, weight, 3, True)
        return float(((grid.values(grid.codes(w)) - w).square() * by).sum())

    assert cost(importance, importance) < cost(torch.ones(32), importance)
    assert cost(torch.ones(32), torch.ones(32)) < cost(importance, torch.ones(32))
    grid = find_grid(w, importance, 3, True)
    assert torch.equal(grid.scale, grid.scale.bfloat16().float())
    assert bool((grid.scale < 0).any()), "the lowest code serves whichever side is larger"
    zeros = find_grid(torch.zeros(3, 32), importance, 4, True)
    assert not zeros.values(zeros.codes(torch.zeros(3, 32))).any()


def test_what_was_never_seen_is_rounded_by_itself() -> None:
    w, _, _ = problem()
    form = AffineFormat(4, 32, True)
    unseen = Hessian.zeros(w.shape[1])
    assert torch.equal(gptq(w, unseen, form).values(), nearest(w, torch.ones(w.shape[1]), form).values())
    dead = Hessian.zeros(w.shape[1])
    dead.add(torch.randn(4, w.shape[1]) * (torch.arange(w.shape[1]) < 5))
    assert bool(gptq(w, dead, form).values().isfinite().all())
    broken = Hessian.zeros(w.shape[1])
    broken.add(torch.full((2, w.shape[1]), torch.inf))
    with pytest.raises(CheckpointError, match="not finite"):
        gptq(w, broken, form)


def test_folding_takes_outliers_out_of_8_bit_activations() -> None:
    w, x, _ = problem()
    x[:, 7] *= 60
    form = AffineFormat(8, 0, True)

    def error(scale: torch.Tensor) -> float:
        values = form.quantize(w * scale).dequantize()
        return float((round_activations(x / scale, "int8") @ values.t() - x @ w.t()).square().mean().sqrt())

    scale = best_scale(x, [(w, form)], "int8")
    assert scale is not None
    assert error(scale) < 0.5 * error(torch.ones(len(scale)))
    exact = best_scale(x, [(w, form)], "int8", exact=True)
    assert exact is not None and torch.equal(exact.log2(), exact.log2().round())
    shared = best_scale(x, [(w, form)], "int8", repeat=2, parts=2)
    assert shared is not None and torch.equal(*shared.view(2, 2, -1).unbind(1))


def test_folding_helps_few_bits_where_inputs_are_uneven_and_else_stays_away() -> None:
    w, x, _ = problem()
    x *= torch.where(torch.arange(128) % 16 == 0, 8.0, 1.0)
    form = AffineFormat(3, 64, True)
    scale = best_scale(x, [(w, form)], "16")
    assert scale is not None
    importance = x.square().mean(0)
    folded = nearest(w * scale, importance / scale**2, form).values() / scale
    assert off(x, w, folded) < off(x, w, nearest(w, importance, form).values())
    assert best_scale(x, [(w, PlainFormat())], "16") is None


def test_formats_become_what_engines_read() -> None:
    int4 = WeightScheme("int", 4, 128, False)
    assert written_format(int4, 256) == AffineFormat(4, 128, True)
    assert written_format(int4, 320) == AffineFormat(4, 64, True)
    assert written_format(int4, 96) == AffineFormat(4, 32, True)
    assert written_format(int4, 100) == AffineFormat(8, 0, True)
    assert written_format(WeightScheme("mxfp4", 4), 100) == AffineFormat(8, 0, True)
    assert written_format(WeightScheme("int", 8, 0), 100) == AffineFormat(8, 0, True)


def test_parts_of_one_matrix_round_as_they_would_alone() -> None:
    w, _, hessian = problem()
    for form in (AffineFormat(4, 32, True), written_format(WeightScheme("fp8", 8), 128)):
        formats: dict[str, Format] = {"q": form, "k": form, "v": PlainFormat()}
        rounder = Rounder(formats, "gptq", torch.float32)
        together = rounder.round({"q": w[:30], "k": w[30:], "v": w}, hessian)
        alone = rounder.round({"k": w[30:]}, hessian)
        torch.testing.assert_close(together["k"].values, alone["k"].values, rtol=0, atol=2e-2 * float(w.abs().max()))
        assert together["v"].stored is None and torch.equal(together["v"].values, w)
        assert together["k"].report.scheme == str(form)
        assert 0 < together["q"].report.weight_error < 0.3


def test_targets_name_exactly_the_modules_of_a_scheme() -> None:
    import re

    def layers(kind: str, among: range = range(3)) -> list[str]:
        return [f"model.layers.{i}.{kind}" for i in among]

    four, eight = AffineFormat(4, 32, True), AffineFormat(8, 0, True)
    formats: dict[str, Format] = {}
    for i, module in enumerate(layers("self_attn.q_proj")):
        formats[module] = four if i < 2 else eight
    formats |= dict.fromkeys(layers("mlp.down_proj"), four)
    for e in range(3):
        formats |= dict.fromkeys(layers(f"mlp.experts.{e}.up_proj", range(2)), four)
        formats |= dict.fromkeys(layers(f"mlp.experts.{e}.up_proj", range(2, 3)), eight)
    formats["model.layers.0.self_attn.o_proj"] = PlainFormat()
    formats["lm_head"] = PlainFormat()
    config = export.quantization_config(formats, "16", kv_fp8=True, routers=True)
    groups = list(config["config_groups"].values())

    def scheme(module: str) -> list[int]:
        def hit(target: str) -> bool:
            return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module

        found = [g["weights"]["num_bits"] for g in groups for target in g["targets"] if hit(target)]
        return [16 for target in config["ignore"] if hit(target)] + found

    for module, form in formats.items():
        assert scheme(module) == [form.bits if isinstance(form, AffineFormat) else 16], module
    assert scheme("model.layers.1.mlp.gate") == [16]
    assert sum(len(g["targets"]) for g in groups) < len(formats) - 2
    uniform: dict[str, Any] = export.quantization_config(
        {"a.b": four, "lm_head": PlainFormat()}, "int8", kv_fp8=False, routers=False
    )
    (group,) = uniform["config_groups"].values()
    assert (group["targets"], uniform["ignore"], uniform["format"]) == (["Linear"], ["lm_head"], "pack-quantized")
    assert group["input_activations"]["strategy"] == "token"
