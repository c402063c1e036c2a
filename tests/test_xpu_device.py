"""Finding an Intel GPU: what follows from a device's properties, every reason why there is none to be used, and what
memory it has; all with a torch.xpu that stands in for one."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from xpu_doubles import card, without_triton

from qrun import bandwidth, doctor_kernels, resident
from qrun.aliases import ALIASES
from qrun.backends import Found, allocation_limit, describe_gpu, find_gpu, xpu_device
from qrun.backends.base import Backend
from qrun.backends.xpu_device import MOST_BYTES, card_of, find_xpu, is_there, summary
from qrun.cache import KVCache
from qrun.doctor_tiers import tiers
from qrun.errors import BackendError, DoesNotFitError
from qrun.fit import Place, find_place, fit
from qrun.formats import format_of, kv_format
from qrun.free import available, device_memory
from qrun.memory import GPU_OVERHEAD, XPU_CHUNK, XPU_WORK, check_fits, forecast
from qrun.models import describe
from qrun.models.plan import plan
from qrun.outline import Outline
from qrun.recipe import Recipe
from qrun.sampler import Sampler, Sampling

NO_DEVICES = RuntimeError("No XPU devices are available.\nmore")
LLAMA = describe(ALIASES["llama3.1:8b"].config)


def properties(name: str, number: int, sizes: tuple[int, ...], memory: float, **others: Any) -> SimpleNamespace:
    """As torch 2.11 gives them: none says whether it is integrated."""
    return SimpleNamespace(
        name=name, device_id=number, sub_group_sizes=list(sizes), total_memory=int(memory),
        driver_version="1.6.33578+51", has_subgroup_matrix_multiply_accumulate=False, **others,
    )  # fmt: skip


A770 = properties("Intel(R) Arc(TM) A770 Graphics", 0x56A0, (8, 16, 32), 16e9)
B580 = properties("Intel(R) Arc(TM) B580 Graphics", 0xE20B, (16, 32), 12e9)
MAX = properties("Intel(R) Data Center GPU Max 1100", 0x0BDA, (16, 32), 48e9)
FLEX = properties("Intel(R) Data Center GPU Flex 170", 0x56C0, (8, 16, 32), 14e9)
METEOR = properties("Intel(R) Arc(TM) Graphics", 0x7D55, (8, 16, 32), 15e9)
LUNAR = properties("Intel(R) Graphics [0x64a0]", 0x64A0, (16, 32), 16.5e9)
PANTHER = properties("Intel(R) Arc(TM) B390 GPU", 0xB080, (16, 32), 30e9, is_integrated_gpu=True)
LATER = properties("Intel(R) Crescent", 0x674C, (16, 32), 160e9, is_integrated_gpu=False)
STRANGE = properties("Intel(R) Something", 0, (), 8e9)


@dataclass
class Driver:
    """What torch.xpu answers, as a machine with one B580 would; each test breaks one thing."""

    found: SimpleNamespace = field(default_factory=lambda: B580)
    available: bool = True
    counts: Exception | None = None
    answers: Exception | None = None
    allocation: Exception | None = None
    free: int | Exception = 11_000_000_000
    reserved: int = 0
    allocated: int = 0
    emptied: int = 0

    def is_available(self) -> bool:
        warnings.warn("Can't initialize Level Zero Sysman", UserWarning, stacklevel=2)
        if self.counts is not None:
            raise self.counts
        return self.available

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        if self.answers is not None:
            raise self.answers
        return self.found

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        if isinstance(self.free, Exception):
            raise self.free
        return self.free, self.found.total_memory

    def zeros(self, size: int, *, device: torch.device) -> None:
        assert device.type == "xpu" and size == 1

    def synchronize(self) -> None:
        """Where what was launched fails."""
        if self.allocation is not None:
            raise self.allocation

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    for name in (*xpu_device.SOURCED, *xpu_device.CHOOSERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "xpu", "20260000")
    for name in ("is_available", "get_device_properties", "mem_get_info", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.xpu, name, getattr(made, name))
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 0)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda: made.reserved)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda: made.allocated)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: made.found.name)
    monkeypatch.setattr(torch, "zeros", made.zeros)
    return made


def refusal(root: Path = Path("/nowhere")) -> str:
    with pytest.raises(BackendError) as caught:
        find_xpu(root)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(", or use --device cpu")
    return text


def test_the_card(driver: Driver) -> None:
    found = find_xpu()
    assert found.device == torch.device("xpu", 0) and found.real
    assert found.description == "Intel(R) Arc(TM) B580 Graphics, 12 GB, driver 1.6.33578+51"
    assert summary() == ("Intel(R) Arc(TM) B580 Graphics, 11.0 GB free of 12 GB, driver 1.6.33578+51, SYCL 20260000")


@pytest.mark.parametrize(
    ("found", "half", "integrated"),
    [
        (A770, torch.float16, False), (FLEX, torch.float16, False), (METEOR, torch.float16, True),
        (B580, torch.bfloat16, False), (MAX, torch.bfloat16, False), (LUNAR, torch.bfloat16, True),
        (PANTHER, torch.bfloat16, True), (LATER, torch.bfloat16, False), (STRANGE, torch.float16, True),
    ],
)  # fmt: skip
def test_what_follows_from_the_architecture(found: SimpleNamespace, half: torch.dtype, integrated: bool) -> None:
    """The matrix engines' own flag is off on every one of these, as it is where ocloc is not installed."""
    made = card_of(torch.device("xpu", 0), found)
    assert (made.half, made.integrated) == (half, integrated)
    assert made.dots == (half == torch.bfloat16)
    assert made.most_bytes == (None if made.dots else MOST_BYTES)
    assert MOST_BYTES < 4 << 30


def test_torch_without_xpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "xpu", None)
    assert "built without Intel GPUs: pip install torch --index-url https://download.pytorch.org/whl/xpu" in refusal()


def test_no_kernel_driver_no_rights_no_user_driver(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.available = False
    assert "its kernel driver (i915 or xe) is not loaded" in refusal(tmp_path)
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    assert "driver is missing or too old: install libze-intel-gpu1" in refusal(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "/dev/dri/renderD128 may not be opened: sudo usermod -aG render $USER" in refusal(tmp_path)


def test_under_wsl_and_windows(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.available = False
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert "install Intel's graphics driver in Windows" in refusal(tmp_path)
    monkeypatch.setattr(xpu_device.sys, "platform", "win32")
    assert "install Intel's Arc graphics driver" in refusal(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("ONEAPI_DEVICE_SELECTOR", "opencl:cpu"), ("ZE_AFFINITY_MASK", "7")])
def test_hidden_by_the_environment(driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    driver.available = False
    monkeypatch.setenv(name, value)
    assert f"{name}={value!r} leaves no Intel GPU: unset it" in refusal()


@pytest.mark.parametrize("late", [False, True])
def test_another_runtime_in_the_way(driver: Driver, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Said before every other reason, for it may be the cause of them all."""
    driver.available, driver.allocation = late, RuntimeError("UR error")
    monkeypatch.setenv("SETVARS_COMPLETED", "1")
    monkeypatch.setenv("ZE_AFFINITY_MASK", "0")
    text = refusal()
    assert "setvars.sh was sourced (SETVARS_COMPLETED is set)" in text and "start a shell without it" in text
    assert ("(UR error)" in text) == late
    driver.available, driver.allocation = True, None
    assert find_xpu().name == B580.name, "where it does no harm nothing is said"


def test_devices_that_are_counted_but_do_not_come_up(driver: Driver) -> None:
    driver.answers = NO_DEVICES
    assert "there is no /dev/dri/renderD*" in refusal()
    driver.answers = None
    driver.counts = RuntimeError("Native API failed. Native API returns: 38 (UR_RESULT_ERROR_UNINITIALIZED)")
    assert "the Intel GPU cannot be used now (Native API failed." in refusal()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("XPU out of memory. Tried to allocate"), "has no room for qrun"),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), "no room"),
        (RuntimeError("UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"), "no room"),
        (RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"), "restart the machine"),
        (RuntimeError("UR_RESULT_ERROR_UNSUPPORTED_VERSION\nmore"), "too old for torch"),
        (RuntimeError("The program was built for 1 devices: UR_RESULT_ERROR_PROGRAM_BUILD_FAILURE"), "too old for"),
        (RuntimeError("UR error"), "cannot be used now (UR error): update Intel's graphics driver, see qrun doctor"),
    ],
)  # fmt: skip
def test_a_first_allocation_that_fails(driver: Driver, error: Exception, says: str) -> None:
    driver.allocation = error
    text = refusal()
    assert says in text and B580.name in text


def test_whether_one_is_there(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert is_there(tmp_path), "torch sees it, wherever it stands"
    driver.available = False
    place = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    place.mkdir(parents=True)
    assert not is_there(tmp_path)
    for name, text in (("class", "0x030000\n"), ("vendor", "0x8086\n"), ("device", "0x4680\n")):
        (place / name).write_text(text)
    assert not is_there(tmp_path), "a UHD 770 is in every other machine"
    for number in ("0x56a5", "0xe20b", "0x7d55", "0x64a0", "0xb080"):
        (place / "device").write_text(number)
        assert is_there(tmp_path)
    monkeypatch.setenv("ONEAPI_DEVICE_SELECTOR", "opencl:cpu")
    assert not is_there(tmp_path), "hidden on purpose"
    monkeypatch.delenv("ONEAPI_DEVICE_SELECTOR")
    monkeypatch.setattr(torch.version, "xpu", None)
    driver.counts = AssertionError("a torch without Intel GPUs is not asked")
    assert is_there(tmp_path)
    (place / "vendor").write_text("0x10de")
    assert not is_there(tmp_path)


def test_the_border_gives_either_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_gpu("xpu") == Found(there=True, usable=True, about=summary())
    assert not find_gpu().usable or torch.version.cuda is not None
    if torch.version.cuda is None:
        assert describe_gpu() == summary()
    driver.available = False
    monkeypatch.setenv("ZE_AFFINITY_MASK", "7")
    found = find_gpu("xpu")
    assert not (found.there or found.usable) and found.about.endswith("leaves no Intel GPU: unset it")


# Memory


def test_what_is_free_of_a_card(driver: Driver) -> None:
    driver.reserved, driver.allocated = 700_000_000, 500_000_000
    assert available("xpu") == 11_000_000_000 + 200_000_000
    driver.free = B580.total_memory  # some drivers never count what is taken
    assert device_memory("xpu") == (12_000_000_000 - 700_000_000, 12_000_000_000)


@pytest.mark.parametrize("found", [METEOR, PANTHER])
def test_what_is_free_where_memory_is_the_hosts(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, found: SimpleNamespace
) -> None:
    """Meteor Lake's driver raises; Panther Lake's says too little, and is not asked."""
    driver.found, driver.reserved, driver.allocated = found, 2_000_000_000, 1_500_000_000
    driver.free = 5 if found is PANTHER else RuntimeError("The device doesn't support querying the available free")
    host = SimpleNamespace(available=90_000_000_000)
    monkeypatch.setattr("qrun.free.psutil.virtual_memory", lambda: host)
    monkeypatch.setattr("qrun.free._cgroup_free", lambda root, proc: iter(()))
    assert available("xpu") == found.total_memory - 1_500_000_000
    host.available = 3_000_000_000
    assert available("xpu") == 3_000_000_000 + 500_000_000
    assert "3.5 GB free of" in summary() and "shared with the CPU" in summary()


def test_what_runs_out_and_what_is_let_go(driver: Driver) -> None:
    for text in ("XPU out of memory. Tried", "error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"):
        assert resident.ran_out(RuntimeError(text)) == "the GPU's memory"
    assert resident.ran_out(RuntimeError("20 (UR_RESULT_ERROR_DEVICE_LOST)")) is None
    resident.let_go(RuntimeError("x"))
    assert driver.emptied == 1


def test_bandwidth_is_measured_in_what_there_is(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(bandwidth, "_device_bandwidth", lambda device, size, repeats: sizes.append(size) or 1.0)
    bandwidth.read_bandwidth(device="xpu")
    driver.free = 4_000_000_000
    bandwidth.read_bandwidth(device="xpu")
    assert sizes == [bandwidth.GPU_SIZE, 1_000_000_000] and bandwidth.GPU_SIZE < MOST_BYTES


@pytest.mark.parametrize("quant", ["bf16", "wint8", "wint4", "W3", "W4@channel", "fp8", "nf4", "nvfp4"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_an_intel_gpus_weights_are_exact(quant: str, half: torch.dtype) -> None:
    """What its kernels read was really made; a table that is the head too may be there twice."""
    from qrun.backends.xpu_matrix import place

    config = describe(
        {
            "model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1,
            "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 77, "max_position_embeddings": 512,
        }
    )  # fmt: skip
    recipe = Recipe.parse(quant)
    made = {"dense": 0, "lm_head": 0}
    for weight in plan(config, tied=False):
        if weight.role in made:
            held = format_of(recipe.schemes()[weight.role]).quantize(torch.randn(weight.shape).bfloat16())
            found = place(held, half)
            parts = [found.codes, found.scale, found.zero, found.offset, found.table]
            if quant == "nvfp4":  # others have a factor where float16 cannot hold their scales
                parts.append(found.factor)
            made[weight.role] += sum(part.nbytes for part in parts if part is not None)
    need = forecast(config, recipe, tied=False, device="xpu")
    assert {role: need.roles[role] for role in made} == made
    tied = forecast(config, recipe, tied=True, device="xpu")
    assert tied.roles["lm_head"] == made["lm_head"] + forecast(config, recipe, tied=True).roles["lm_head"]


def test_what_an_intel_gpu_needs_beside() -> None:
    from qrun.backends import xpu_sdpa
    from qrun.backends.xpu import XPUBackend

    recipe = Recipe.parse("wint4")
    need = forecast(LLAMA, recipe, 4096, device="xpu")
    assert need.peak_load == need.weights + 3 * need.largest + GPU_OVERHEAD
    assert need.expanded_per_token == 0, "the cache is attended in pieces"
    assert GPU_OVERHEAD + XPU_WORK < need.running < GPU_OVERHEAD + XPU_WORK + 3e8
    assert forecast(LLAMA, recipe, 8192, device="xpu").total - need.total == 4096 * need.kv_per_token
    assert XPU_WORK >= xpu_sdpa.MOST_BYTES
    assert XPUBackend.chunk == XPU_CHUNK


def test_a_weight_that_is_too_large_at_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.found = A770
    assert allocation_limit("xpu") == MOST_BYTES and allocation_limit("cpu") is None
    assert check_fits(LLAMA, Recipe.parse("wint4"), context=64, memory=16 << 30, name="X", device="xpu").block < 2e9
    monkeypatch.setattr(xpu_device, "MOST_BYTES", 1_200_000_000)
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(LLAMA, Recipe.parse("fp32"), context=64, memory=1 << 40, name="X", device="xpu")
    assert str(caught.value) == (
        "X at fp32 has a weight of 2.1 GB, and this GPU allocates 1.2 GB at most: use --quant wint8, or --device cpu"
    )
    monkeypatch.setattr(xpu_device, "MOST_BYTES", 1_000_000_000)  # less than what is read of the head
    with pytest.raises(DoesNotFitError, match=r"at most: use --device cpu$"):
        check_fits(LLAMA, Recipe.parse("wint4"), context=64, memory=1 << 40, name="X", device="xpu")
    driver.found = B580
    assert check_fits(LLAMA, Recipe.parse("fp32"), context=64, memory=1 << 40, name="X", device="xpu")


def test_a_full_intel_gpu_is_described(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.found, driver.free = METEOR, RuntimeError("The device doesn't support querying the available free memory")
    monkeypatch.setattr("qrun.free.available", lambda device="cpu": 3_000_000_000)
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(LLAMA, Recipe.parse("wint4"), context=64, memory=3_000_000_000, name="X", device="xpu")
    assert "on the Intel(R) Arc(TM) Graphics, 3.0 GB are free of 15.0 GB; other programs hold 12.0 GB: " in str(
        caught.value
    )


# What fits


def test_where_a_model_would_run(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.found = A770
    found = find_place("xpu", 2)
    assert (found.device, found.free, found.about) == ("xpu", 11_000_000_000, f"of the {A770.name}")
    assert found.most == MOST_BYTES
    other = find_place("xpu", 2, 24)
    assert (other.device, other.free, other.about, other.most) == ("xpu", 24, "of a GPU", None)
    gpus = {"cuda": Found(True, False, "torch has no CUDA: install it"), "xpu": Found(True, True, "B580, 11 GB free")}
    monkeypatch.setattr("qrun.fit.find_gpu", lambda kind: gpus[kind])
    assert find_place("auto", 2).about == "of the B580"
    gpus["cuda"] = Found(True, True, "H200, 100 GB free")
    monkeypatch.setattr("qrun.fit.available", lambda kind: 7)
    assert find_place("auto", 2).device == "cuda", "NVIDIA's comes first"
    gpus["xpu"] = Found(False, False, "torch sees none: install the driver")
    with pytest.raises(BackendError, match="install the driver, or use --device cpu"):
        find_place("xpu", 2)
    gpus["cuda"] = gpus["xpu"]
    assert find_place("auto", 2).device == "cpu"


def test_rows_know_the_largest_allocation() -> None:
    outline = Outline(name="llama3.1:8b", config=LLAMA, tied=False)
    recipes = [Recipe.parse("fp32"), Recipe.parse("wint4")]
    place = Place(device="xpu", free=1 << 40, resident=0, threads=2, about="", most=1_500_000_000)
    rows = fit(outline, recipes, [4096], place)
    assert [(row.fits, row.recommended, row.most_context > 0) for row in rows] == [(False,) * 3, (True,) * 3]


# 64-bit floats


class NoDoubles(TorchDispatchMode):
    """A device that has none: whatever makes a float64 raises, as on Arc A-series."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        parts = made if isinstance(made, tuple | list) else [made]
        if any(isinstance(part, torch.Tensor) and part.dtype == torch.float64 for part in parts):
            raise RuntimeError("Required aspect fp64 is not supported on the device")
        return made


def test_the_check_itself() -> None:
    with NoDoubles(), pytest.raises(RuntimeError, match="fp64"):
        torch.ones(2).double()


@pytest.mark.parametrize(
    "quant", ["bf16", "wint8", "wint4", "W4g64sym", "W4@channel", "W3", "fp8", "nf4", "fp4", "mxfp4", "nvfp4"]
)
def test_weights_need_no_doubles(quant: str) -> None:
    form = format_of(Recipe.parse(quant).dense)
    with NoDoubles():
        held = form.quantize(torch.randn(96, 256).bfloat16())
        assert held.dequantize().isfinite().all()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_a_cache_needs_no_doubles(kv: Any) -> None:
    form = kv_format(kv)
    cache = KVCache(layers=1, kv_heads=2, head_dim=64, capacity=32, k=form, v=form, device="cpu")
    layer = cache.layers[0]
    with NoDoubles():
        layer.write(torch.arange(3), torch.randn(3, 2, 64), torch.randn(3, 2, 64))
        assert all(part.isfinite().all() for part in layer.read(0, 3))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5, "min_p": 0.1}, {"repeat_penalty": 1.2}]
)
def test_sampling_needs_no_doubles(settings: dict[str, Any]) -> None:
    logits = torch.randn(1, 50)
    with NoDoubles():
        sampler = Sampler(Sampling(**({"seed": 1, "presence_penalty": 0.5} | settings)), [1, 2], 50, "cpu")
        assert 0 <= int(sampler(sampler(logits)[None] * 0 + logits)) < 50


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_models_blocks_need_no_doubles(half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `qrun doctor` tries them, and it finds them right; what was tried for it is there to be listed."""
    from qrun.backends.xpu import XPUBackend

    without_triton(monkeypatch)  # interpreted kernels are slow, and see no dispatch
    monkeypatch.setattr(doctor_kernels, "SHAPE", (256, 512))
    backend = XPUBackend(card(half))
    with NoDoubles():
        checks = [
            doctor_kernels.product(backend, "W4"), doctor_kernels.attention(backend, Backend(), "int8"),
            doctor_kernels.ffn(backend, Backend(), "W8"), doctor_kernels.experts(backend, Backend(), "W4"),
        ]  # fmt: skip
    assert [check.status for check in checks] == ["ok"] * 4, [check.detail for check in checks]
    assert {check.name for check in tiers(backend.trials)} >= {"native"}
