"""What a heartbeat says of GPUs: read where it makes sense, and not known where it does not."""

import math

import pytest

from nodes.telemetry import Telemetry, telemetry_of, vram_gb
from tests.fakes.provider_client import GPU


def test_the_contracts_fields_are_those_of_one_gpu() -> None:
    assert telemetry_of(GPU) == Telemetry(
        gpu_name="NVIDIA RTX 4090", gpu_count=1, vram_mib=24564, compute_capability="8.9", cuda_version="12.4",
        driver_version="550.54", util_pct=41, vram_used_mib=12112, vram_free_mib=12452, temp_c=68, power_w=310.5,
    )  # fmt: skip


def test_of_several_gpus_sizes_add_up_and_the_hottest_counts() -> None:
    each = {"vram_mib": 81920, "free_vram_mib": 80000, "power_w": 100}
    cards = [each | {"util_pct": 10, "temp_c": 50}, each | {"util_pct": 90, "temp_c": 80}, "odd"]
    read = telemetry_of({"gpu_name": "H100", "gpu_vram_mib": 81920, "gpu_count": 2, "all_gpus": cards})
    assert (read.gpu_count, read.vram_mib, read.vram_used_mib, read.vram_free_mib) == (2, 81920, 3840, 160000)
    assert (read.util_pct, read.temp_c, read.power_w) == (50, 80, 200)


def test_the_zeros_of_a_host_without_a_gpu_are_no_readings() -> None:
    zeros = {"gpu_util_pct": 0, "temp_c": 0, "power_w": 0, "gpu_vram_mib": 0, "gpu_count": 0, "all_gpus": []}
    assert telemetry_of(zeros) == Telemetry()


@pytest.mark.parametrize("odd", ["x", True, None, -1, math.nan, math.inf, 10**30, [], {}])
def test_an_odd_value_is_not_known(odd: object) -> None:
    read = telemetry_of({"gpu_name": "A", "gpu_vram_mib": odd, "temp_c": odd, "free_vram_mib": odd})
    assert (read.gpu_count, read.vram_mib, read.temp_c, read.vram_used_mib) == (1, 0, None, None)


def test_no_text_has_a_nul() -> None:
    assert telemetry_of({"gpu_name": "A\x00B" + "x" * 1000}).gpu_name == ("AB" + "x" * 510)


@pytest.mark.parametrize(("mib", "gb"), [(24564, 24), (24576, 24), (81559, 80), (0, 0)])
def test_cards_are_sold_by_whole_gigabytes(mib: int, gb: int) -> None:
    assert vram_gb(mib) == gb
