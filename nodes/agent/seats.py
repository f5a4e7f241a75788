"""Which hardware each engine of ours has, and what a start in its seat is told. Who gets which is `plan`'s decision."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from nodes.agent.catalog import weights_bytes
from nodes.agent.command import Hardware, ModelSpec
from nodes.agent.plan import Device, Need, Plan, Seat, Sitter, need_of, overfull, place


class Seats:
    """By engine id. `devices` tells what engines may take now; `gpus` is empty on a host that serves on its CPU."""

    def __init__(self, devices: Callable[[], Sequence[Device]], gpus: Sequence[int]) -> None:
        self._devices = devices
        self._on_gpu = bool(gpus)
        self._hardware: dict[str, Hardware] = {}
        self._seats: dict[str, Seat] = {}

    def add(self, name: str, hardware: Hardware) -> None:
        """An engine that has no seat yet."""
        self._hardware[name] = hardware

    def forget(self, name: str) -> None:
        self._hardware.pop(name, None)
        self._seats.pop(name, None)

    def sit(self, name: str, seat: Seat) -> None:
        """Its next start is there."""
        self._seats[name] = seat
        if self._on_gpu:
            total_mib = min(device.total_mib for device in self._devices() if device.index in seat.devices)
            share = int(100 * seat.mib_each / max(1, total_mib)) / 100  # rounded down: shares add up
            self._hardware[name] = replace(self._hardware[name], gpus=seat.devices, gpu_share=share)

    def hardware(self, name: str) -> Hardware:
        return self._hardware[name]

    def taken(self) -> Mapping[str, Seat]:
        """Every seat, also of engines that rest: who does is not known here."""
        return self._seats

    def shared(self, model: ModelSpec, share: Hardware) -> Seat:
        """What models of the command line get, which are all started: on a CPU what they need, even if that is too much."""
        if not share.gpus:
            return Seat((0,), self._need(model).mib)
        budget_mib = min(device.budget_mib for device in self._devices() if device.index in share.gpus)
        return Seat(share.gpus, budget_mib // share.gpu_sharers)

    def plan(self, model: ModelSpec, sitters: Sequence[Sitter], asleep_in: Seat | None = None) -> Plan:
        """A seat for a model; an engine that sleeps wakes in the one where it fell asleep."""
        if asleep_in is None:
            return place(self._need(model), sitters, self._devices())
        mine = [device for device in self._devices() if device.index in asleep_in.devices]
        return place(Need(asleep_in.mib_each * len(mine), exact=True), sitters, mine)

    def shrink(self, sitters: Sequence[Sitter]) -> tuple[str, ...]:
        """Give engines on GPUs that are too full now less at their next start; which these are."""
        if not self._on_gpu:
            return ()
        names = overfull(sitters, self._devices())
        for name in names:
            seat = self._seats[name]
            budget_mib = min(device.budget_mib for device in self._devices() if device.index in seat.devices)
            sharers = sum(bool(set(each.seat.devices) & set(seat.devices)) for each in sitters)
            self.sit(name, replace(seat, mib_each=budget_mib // max(1, sharers)))
        return names

    def _need(self, model: ModelSpec) -> Need:
        return need_of(weights_bytes(model.folder), model.vram_gb, on_gpu=self._on_gpu)
