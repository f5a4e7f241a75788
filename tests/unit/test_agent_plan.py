"""Which engine gets which GPUs, and who must go for it."""

import pytest

from nodes.agent.plan import Device, Need, Seat, Sitter, devices_of, need_of, overfull, place


def gpus(*mib: int) -> tuple[Device, ...]:
    return tuple(Device(index, each, each) for index, each in enumerate(mib))


def sitter(name: str, *devices: int, mib: int = 60, busy: bool = False, used_s: float = 0.0) -> Sitter:
    return Sitter(name, Seat(devices, mib), busy, used_s)


def test_a_model_gets_all_of_an_empty_gpu() -> None:
    assert place(Need(50), [], gpus(100)).seat == Seat((0,), 100)


def test_one_whose_owner_said_how_much_gets_just_that_and_leaves_room() -> None:
    first = place(Need(40, exact=True), [], gpus(100))
    assert first.seat == Seat((0,), 40)
    second = place(Need(50), [Sitter("first", first.seat, is_busy=True, used_s=0)], gpus(100))
    assert (second.seat, second.leave) == (Seat((0,), 60), ())


def test_a_free_gpu_is_taken_before_anybody_must_leave() -> None:
    plan = place(Need(50), [sitter("here", 0, mib=100)], gpus(100, 100))
    assert (plan.seat, plan.leave) == (Seat((1,), 100), ())


def test_a_large_model_gets_as_few_gpus_as_hold_it_and_a_power_of_two() -> None:
    assert place(Need(150), [], gpus(100, 100, 100)).seat == Seat((0, 1), 100)
    assert (
        place(Need(250), [], gpus(100, 100, 100)).seat is None
    )  # two are too few, and three no power of two
    assert place(Need(350), [], gpus(100, 100, 100, 100)).seat == Seat((0, 1, 2, 3), 100)


@pytest.mark.parametrize(
    ("sitters", "leave"),
    [
        ([sitter("busy", 0, mib=100, busy=True), sitter("idle", 1, mib=100)], ("idle",)),
        ([sitter("late", 0, mib=100, used_s=9), sitter("early", 1, mib=100, used_s=3)], ("early",)),
        ([sitter("a", 0, mib=50), sitter("b", 0, mib=50), sitter("c", 1, mib=100, used_s=99)], ("c",)),
        ([sitter("small", 0, mib=20), sitter("large", 0, mib=80, used_s=5)], ("large",)),
    ],
)
def test_who_leaves_is_idle_before_busy_and_longest_without_a_turn_and_no_more_than_needed(
    sitters: list[Sitter], leave: tuple[str, ...]
) -> None:
    devices = gpus(100, 100) if len({s.seat.devices for s in sitters}) > 1 else gpus(100)
    assert place(Need(60), sitters, devices).leave == leave


def test_a_model_that_no_gpu_holds_is_told_so() -> None:
    plan = place(Need(500), [], gpus(100))
    assert plan.seat is None
    assert "500 MiB" in plan.reason
    assert "100 MiB" in plan.reason


def test_what_its_owner_keeps_of_a_gpu_is_not_given() -> None:
    (device,) = devices_of([81920], 0, cap_pct=100, reserve_gb=0)
    assert device.budget_mib == 73728  # vLLM's own 90 %
    assert devices_of([81920], 0, cap_pct=50)[0].budget_mib == 40960
    assert devices_of([81920], 0, cap_pct=100, reserve_gb=16)[0].budget_mib == 81920 - 16 * 1024
    assert devices_of([8192], 0, cap_pct=0)[0].budget_mib == 0
    assert devices_of([8192], 0, reserve_gb=16)[0].budget_mib == 0


def test_a_host_without_gpus_is_one_device() -> None:
    (device,) = devices_of([], 10_000)
    assert (device.index, device.budget_mib) == (0, 8000)


def test_a_model_needs_its_weights_and_room_for_a_cache() -> None:
    gib = 2**30
    assert need_of(0, 0.0, on_gpu=True).mib == 1024
    assert need_of(10 * gib, 0.0, on_gpu=True).mib == 12288
    assert need_of(10 * gib, 24.0, on_gpu=True) == Need(24 * 1024, exact=True)
    assert need_of(gib, 0.0, on_gpu=False) == Need(int(1024 * 1.2) + 3072, exact=True)


def test_engines_on_a_gpu_that_became_too_small_are_named() -> None:
    sitters = [sitter("a", 0, mib=60), sitter("b", 1, mib=60)]
    assert overfull(sitters, [Device(0, 100, 50), Device(1, 100, 80)]) == ("a",)
    assert overfull(sitters, gpus(100, 100)) == ()
