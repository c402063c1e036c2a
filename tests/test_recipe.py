"""The precision grammar: every word, every default, every refusal."""

import subprocess
import sys

import pytest

from qrun.errors import RecipeError
from qrun.recipe import BF16, ROLES, Recipe, WeightScheme


def spelled(recipe: Recipe) -> str:
    """Everything a recipe means, on one line."""
    roles = [str(scheme) for scheme in recipe.schemes().values()]
    return " | ".join([*roles, recipe.activations, recipe.k, recipe.v])


@pytest.mark.parametrize(
    ("quant", "meaning"),
    [
        ("bf16", "bf16 | bf16 | bf16 | bf16 | 16 | bf16 | bf16"),
        ("W16A16C16", "bf16 | bf16 | bf16 | bf16 | 16 | bf16 | bf16"),
        ("fp32", "fp32 | fp32 | fp32 | fp32 | 32 | fp32 | fp32"),
        ("W32A32C32", "fp32 | fp32 | fp32 | fp32 | 32 | fp32 | fp32"),
        ("wint8", "int8 channel | int8 channel | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W8", "int8 channel | int8 channel | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("WINT4", "int4 g64 | int4 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W4A16C16", "int4 g64 | int4 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("wint2", "int2 g32 | int2 g32 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("w3", "int3 g64 | int3 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W4g32", "int4 g32 | int4 g32 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W4g128sym", "int4 g128 sym | int4 g128 sym | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W8g64", "int8 g64 | int8 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W8g64asym", "int8 g64 asym | int8 g64 asym | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("W4@channel", "int4 channel | int4 channel | bf16 | bf16 | 16 | bf16 | bf16"),
        ("w8@channel", "int8 channel | int8 channel | bf16 | bf16 | 16 | bf16 | bf16"),
        ("w8a8", "int8 channel | int8 channel | int8 channel | int8 channel | int8 | bf16 | bf16"),
        ("W8A8C8", "int8 channel | int8 channel | int8 channel | int8 channel | int8 | int8 | int8"),
        ("fp8", "fp8 128x128 | fp8 128x128 | bf16 | bf16 | fp8 | bf16 | bf16"),
        ("block_wise_fp8", "fp8 128x128 | fp8 128x128 | bf16 | bf16 | fp8 | bf16 | bf16"),
        ("Wfp8", "fp8 128x128 | fp8 128x128 | bf16 | bf16 | 16 | bf16 | bf16"),
        ("Wfp8Afp8Cfp8", "fp8 128x128 | fp8 128x128 | bf16 | bf16 | fp8 | fp8 | fp8"),
        ("WNF4A8C8", "nf4 g64 | nf4 g64 | int8 channel | int8 channel | int8 | int8 | int8"),
        ("W4Afp8", "int4 g64 | int4 g64 | int8 channel | int8 channel | fp8 | bf16 | bf16"),
        ("nf4", "nf4 g64 | nf4 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("fp4", "fp4 g64 | fp4 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("mxfp4", "mxfp4 g32 | mxfp4 g32 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("nvfp4", "nvfp4 g16 | nvfp4 g16 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("trellis", "trellis g32 | trellis g32 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("C8", "bf16 | bf16 | bf16 | bf16 | 16 | int8 | int8"),
        ("W4A16Ck8v4", "int4 g64 | int4 g64 | int8 channel | int8 channel | 16 | int8 | int4"),
        ("mix:experts=w4,dense=w8", "int8 channel | int4 g64 | int8 channel | int8 channel | 16 | bf16 | bf16"),
        ("mix:experts=w4", "bf16 | int4 g64 | bf16 | bf16 | 16 | bf16 | bf16"),
        ("mix:w4,lm_head=bf16", "int4 g64 | int4 g64 | bf16 | int8 channel | 16 | bf16 | bf16"),
        ("mix: dense=W4g32, act=8, k=8, v=4", "int4 g32 | int4 g32 | int8 channel | int8 channel | int8 | int8 | int4"),
        ("mix:dense=wfp8,act=fp8,kv=fp8", "fp8 128x128 | fp8 128x128 | bf16 | bf16 | fp8 | fp8 | fp8"),
        ("mix:w4@channel,embedding=w8", "int4 channel | int4 channel | bf16 | int8 channel | 16 | bf16 | bf16"),
    ],
)  # fmt: skip
def test_words_mean(quant: str, meaning: str) -> None:
    assert spelled(Recipe.parse(quant)) == meaning


@pytest.mark.parametrize(
    ("kv", "k", "v"),
    [
        ("bf16", "bf16", "bf16"),
        ("int8", "int8", "int8"),
        ("INT4", "int4", "int4"),
        ("fp8", "fp8", "fp8"),
        ("fp32", "fp32", "fp32"),
        ("8", "int8", "int8"),
        ("k8v4", "int8", "int4"),
        ("kfp8v4", "fp8", "int4"),
        ("k16v4", "bf16", "int4"),
        ("kint8vbf16", "int8", "bf16"),
    ],
)
def test_cache_words(kv: str, k: str, v: str) -> None:
    recipe = Recipe.parse("W4A16C8", kv=kv)
    assert (recipe.k, recipe.v) == (k, v)
    assert recipe == Recipe.parse("w4").with_kv(kv)


@pytest.mark.parametrize(
    ("quant", "label"),
    [
        ("wint4", "W4A16C16"),
        ("bf16", "W16A16C16"),
        ("fp32", "W32A32C32"),
        ("fp8", "Wfp8Afp8C16"),
        ("nf4", "WNF4A16C16"),
        ("w8a8", "W8A8C16"),
        ("W8@channel", "W8@channelA16C16"),
        ("w4g32SYMc8", "W4g32symA16C8"),
        ("W4Ck8v4", "W4A16Ck8v4"),
        ("mix:w4", "W4A16C16"),
        ("mix:experts=w4,dense=w8", "mix:dense=w8,experts=w4"),
        ("mix:w4@channel,act=8,kv=fp8", "W4@channelA8Cfp8"),
        ("mix:w4,embedding=bf16,kv=k16v4,act=fp8", "mix:dense=w4,embedding=w16,act=fp8,kv=k16v4"),
    ],
)
def test_label_is_short_and_reads_back(quant: str, label: str) -> None:
    recipe = Recipe.parse(quant)
    assert recipe.label == label
    assert Recipe.parse(label) == recipe


def test_every_combination_reads_back() -> None:
    named = "fp8", "NF4", "fp4", "mxfp4", "nvfp4", "trellis", "4@channel"
    for weight in ("2", "3", "4", "5", "6", "7", "8", "16", "32", *named):
        for activation in ("16", "32", "8", "fp8"):
            for cache in ("16", "32", "8", "4", "fp8", "k8v4"):
                recipe = Recipe.parse(f"W{weight}A{activation}C{cache}")
                assert Recipe.parse(recipe.label) == recipe
                assert recipe.label.lower() == f"w{weight}a{activation}c{cache}".lower()


@pytest.mark.parametrize(
    ("quant", "named", "possible"),
    [
        ("", "''", "wint4"),
        ("w", "'w'", "wint4"),
        ("foo", "'foo'", "mix:"),
        ("wfoo", "'foo'", "nf4"),
        ("W4bogus", "'4bogus'", "@channel"),
        ("W1", "1-bit", "2 to 8"),
        ("W9", "9-bit", "2 to 8"),
        ("W4g63", "'63'", "g64"),
        ("W4g0", "'0'", "g64"),
        ("W4g", "''", "g64"),
        ("W4@tensor", "@tensor", "@channel"),
        ("W4@channelasym", "@channelasym", "@channel"),
        ("W8asym", "8asym", "8g64asym"),
        ("W4A5", "A5", "fp8"),
        ("W4A", "A ", "fp8"),
        ("W4C3", "C3", "int4"),
        ("W4C", "C ", "int4"),
        ("W4A16C8x", "C8x", "int4"),
        ("mix:", "''", "nf4"),
        ("mix:foo=w4", "'foo'", "experts"),
        ("mix:experts=w99", "99-bit", "2 to 8"),
        ("mix:experts=", "''", "nf4"),
        ("mix:w4,,dense=w8", "bare", "one of the two"),
        ("mix:dense=w4,dense=w8", "'dense'", "one of the two"),
        ("mix:dense=w4,act=3", "act=3", "fp8"),
        ("mix:kv=k8", "kv=k8", "k8v4"),
        ("mix:k=9", "k=9", "int8"),
    ],
)
def test_errors_name_the_part_and_what_is_possible(quant: str, named: str, possible: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(quant)
    message = str(caught.value)
    assert named in message
    assert possible in message
    assert "\n" not in message


@pytest.mark.parametrize("kv", ["", "int3", "k8", "v4", "k8v", "w4"])
def test_wrong_caches_are_refused(kv: str) -> None:
    with pytest.raises(RecipeError, match="int8, int4, fp8"):
        Recipe.parse("wint4", kv=kv)


def test_equal_when_the_meaning_is() -> None:
    assert Recipe.parse("wint4") == Recipe.parse("W4A16C16") == Recipe.parse("mix:w4")
    assert Recipe.parse("W8") != Recipe.parse("W8@channel")
    assert Recipe.parse(" WINT4 ").name == "wint4"
    assert len({Recipe.parse("fp8"), Recipe.parse("Wfp8Afp8C16")}) == 1


def test_schemes_and_words() -> None:
    recipe = Recipe.parse("mix:experts=w4,dense=w8,lm_head=bf16")
    assert tuple(recipe.schemes()) == ROLES
    assert recipe.lm_head == BF16
    assert recipe.experts == WeightScheme("int", 4, 64, symmetric=False)


def test_narrow_weights_come_with_a_note() -> None:
    assert Recipe.parse("wint4").notes == ()
    assert "int2 g32" in Recipe.parse("mix:w8,experts=w2").notes[0]


def test_torch_is_not_imported() -> None:
    code = "import sys, qrun.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
