"""How fast tiers move bytes, as a fraction of the bare way to do the same.

    python -m benchmarks.tiers --json benchmarks/results/tiers.json

Three tables: slots of the NVMe tier against a loop of pwrite and preadv with O_DIRECT on the same
disk, with as many blocks in flight; windows of host memory against a copy between tensors; and the
link to an accelerator against a bare copy from and to pinned memory, where there is one. The two
sides of a ratio take turns in one process; reported are medians over rounds, of rates and of the
ratios of neighbouring turns. Both sides write new files; removing them is not timed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asteria.runtime.transfer import DeviceLink
from asteria.store.array_files import page_aligned
from asteria.store.buffers import Buffers, host_memory
from asteria.store.nvme import NvmeTier
from asteria.store.tier import Slot, Tier
from benchmarks.measurement import describe_machine, progress_bar, summarize, write_json
from benchmarks.tiers_plot import plot

MIB = 1 << 20
GOAL = 0.7
"""Of the bare disk, for slots of 4 MiB and more."""
WAYS = ("write", "read")

Turn = Callable[[], None]
Rates = dict[str, list[float]]


class Blocks:
    """Buffers for as many blocks as are in flight: sources with content, and targets."""

    def __init__(self, nbytes: int, depth: int) -> None:
        self.nbytes, self.depth = nbytes, depth
        generator = torch.Generator().manual_seed(0)
        self.sources = [page_aligned(nbytes) for _ in range(depth)]
        for source in self.sources:
            source.random_(0, 256, generator=generator)
        self.targets = [page_aligned(nbytes).zero_() for _ in range(depth)]

    def check(self) -> None:
        """Whether the last blocks that were read are those that were written."""
        for source, target in zip(self.sources, self.targets, strict=True):
            if not torch.equal(source, target):
                raise RuntimeError("what was read is not what was written")
            target.zero_()


class BareDisk:
    """Files by pwrite and preadv with O_DIRECT, a thread for each block in flight."""

    def __init__(self, folder: Path, blocks: Blocks, count: int) -> None:
        self.blocks = blocks
        self.files = [folder / str(number) for number in range(count)]
        self.threads = ThreadPoolExecutor(blocks.depth)

    def each(self, work: Callable[[int], None]) -> None:
        """Do something for each file, some at a time."""
        for _ in self.threads.map(work, range(len(self.files))):
            pass

    def write(self) -> None:
        """Move all blocks out."""
        self.each(self._write)

    def read(self) -> None:
        """Move all blocks back."""
        self.each(self._read)

    def clear(self) -> None:
        """Check what came back, and undo the turn."""
        self.blocks.check()
        self.each(lambda number: self.files[number].unlink())

    def close(self) -> None:
        """Let go of everything."""
        self.threads.shutdown()

    def _write(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        buffer = self.blocks.sources[number % self.blocks.depth]
        self._move(number, flags, buffer, lambda file, rest, at: os.pwrite(file, rest, at))

    def _read(self, number: int) -> None:
        buffer = self.blocks.targets[number % self.blocks.depth]
        self._move(number, os.O_RDONLY, buffer, lambda file, rest, at: os.preadv(file, [rest], at))

    def _move(self, number: int, flags: int, buffer: Tensor, move: Callable[..., int]) -> None:
        file = os.open(self.files[number], flags | os.O_DIRECT, 0o600)
        try:
            view, done = memoryview(buffer.numpy()), 0
            while done < len(view):
                moved = move(file, view[done:], done)
                if not moved:
                    raise RuntimeError(f"{self.files[number]} ends after {done} bytes")
                done += moved
        finally:
            os.close(file)


class Windows:
    """Copies to and from memory that is taken from a pool and given back."""

    def __init__(self, blocks: Blocks, count: int) -> None:
        self.blocks, self.count = blocks, count
        self.pool = Buffers(host_memory)
        self.taken: list[Tensor] = []

    def write(self) -> None:
        """Move all blocks out."""
        for _ in range(self.count):
            window = self.pool.take(self.blocks.nbytes)
            self.taken.append(window.copy_(self.blocks.sources[0]))

    def read(self) -> None:
        """Move all blocks back."""
        for window in self.taken:
            self.blocks.targets[0].copy_(window)

    def clear(self) -> None:
        """Check what came back, and undo the turn."""
        self.blocks.check()
        for _ in range(len(self.taken)):
            self.pool.give(self.taken.pop())

    def close(self) -> None:
        """Let go of everything."""


class Slots:
    """The same through a tier."""

    def __init__(self, tier: Tier, blocks: Blocks, count: int) -> None:
        self.tier, self.blocks, self.count = tier, blocks, count
        self.slots: list[Slot] = []

    def write(self) -> None:
        """Move all blocks out."""
        depth = self.blocks.depth
        for number in range(self.count):
            if number >= depth:
                self.slots[number - depth].wait()  # its source is needed again
            self.slots.append(self.tier.put(self.blocks.sources[number % depth]))
        for slot in self.slots[-depth:]:
            slot.wait()

    def read(self) -> None:
        """Move all blocks back."""
        depth = self.blocks.depth
        moves: list[Any] = []
        for number, slot in enumerate(self.slots):
            if number >= depth:
                moves[number - depth].wait()
            moves.append(self.tier.get(slot, self.blocks.targets[number % depth]))
        for move in moves[-depth:]:
            move.wait()

    def clear(self) -> None:
        """Check what came back, and undo the turn."""
        self.blocks.check()
        for slot in self.slots:
            self.tier.drop(slot)
        self.slots = []
        if isinstance(self.tier, NvmeTier):
            self.tier.reserve(0)  # waits until the files are gone

    def close(self) -> None:
        """Let go of everything."""
        self.tier.close()


class BareCopies:
    """Copies between tensors that exist."""

    def __init__(self, blocks: Blocks, count: int) -> None:
        self.blocks, self.count = blocks, count

    def write(self) -> None:
        """Move all blocks out."""
        for number in range(self.count):
            place = number % self.blocks.depth
            self.blocks.targets[place].copy_(self.blocks.sources[place])

    read = write

    def clear(self) -> None:
        """Check what came back, and undo the turn."""
        self.blocks.check()

    def close(self) -> None:
        """Let go of everything."""


class Link:
    """To the host ("write") and back to the device ("read"), by the package's link or bare."""

    def __init__(self, nbytes: int, count: int, *, bare: bool) -> None:
        device = torch.accelerator.current_accelerator()
        if device is None:
            raise RuntimeError("no accelerator")
        self.count, self.bare, self.link = count, bare, DeviceLink(device)
        self.there = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self.here = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)

    def write(self) -> None:
        """Move all blocks out."""
        if self.bare:
            for _ in range(self.count):
                self.here.copy_(self.there, non_blocking=True)
        else:
            taken = [self.link.snapshot(self.there, copy=True) for _ in range(self.count)]
            for snapshot in taken:
                snapshot.on_host()
        torch.accelerator.synchronize()

    def read(self) -> None:
        """Move all blocks back."""
        for _ in range(self.count):
            if self.bare:
                self.there.copy_(self.here, non_blocking=True)
            else:
                self.link.arrived([self.link.stage(self.here)])
        torch.accelerator.synchronize()

    def clear(self) -> None:
        """Check what came back, and undo the turn."""
        torch.accelerator.synchronize()

    close = clear


def measure(sides: Mapping[str, Any], rounds: Iterable[int], total_bytes: int) -> dict[str, Rates]:
    """GB/s of each side, in turns; the first round only warms up."""
    rates: dict[str, Rates] = {side: {way: [] for way in WAYS} for side in sides}
    for number in rounds:
        order = list(sides.items())
        if number % 2:
            order.reverse()
        for way in WAYS:
            for side, contender in order:
                start = time.perf_counter()
                getattr(contender, way)()
                elapsed = time.perf_counter() - start
                if number:
                    rates[side][way].append(total_bytes / elapsed / 1e9)
        for _, contender in order:
            contender.clear()
    return rates


def conclude(rates: Mapping[str, Rates], ours: str, bare: str) -> dict[str, Any]:
    """Rates of both sides, and the ratio in each round, of each way."""
    result = {}
    for way in WAYS:
        pairs = zip(rates[ours][way], rates[bare][way], strict=True)
        result[way] = {
            "ours": summarize(rates[ours][way]),
            "bare": summarize(rates[bare][way]),
            "ratio": summarize([mine / other for mine, other in pairs]),
            "rates": {"ours": rates[ours][way], "bare": rates[bare][way]},
        }
    return result


def on_disk(folder: Path, mib: int, args: argparse.Namespace) -> dict[str, Any]:
    """Slots of the NVMe tier against the bare disk."""
    count = max(args.total_mib // mib, args.depth)
    tier = NvmeTier(folder, budget_bytes=None, label="benchmark")
    bare = BareDisk(tier.path.parent, Blocks(mib * MIB, args.depth), count)
    try:
        sides = {"ours": Slots(tier, Blocks(mib * MIB, args.depth), count), "bare": bare}
        rounds = progress_bar(range(args.rounds + 1), f"NVMe, {mib} MiB")
        return conclude(measure(sides, rounds, count * mib * MIB), "ours", "bare")
    finally:
        bare.close()
        tier.close()


def in_memory(mib: int, args: argparse.Namespace) -> dict[str, Any]:
    """Windows of host memory against copies."""
    count = max(min(args.total_mib, 256) // mib, 1)
    sides = {
        "ours": Windows(Blocks(mib * MIB, 1), count),
        "bare": BareCopies(Blocks(mib * MIB, 1), count),
    }
    rounds = progress_bar(range(args.rounds + 1), f"memory, {mib} MiB")
    return conclude(measure(sides, rounds, count * mib * MIB), "ours", "bare")


def on_link(mib: int, args: argparse.Namespace) -> dict[str, Any]:
    """The link to the accelerator against bare copies."""
    count = max(min(args.total_mib, 256) // mib, 1)
    sides = {name: Link(mib * MIB, count, bare=name == "bare") for name in ("ours", "bare")}
    rounds = progress_bar(range(args.rounds + 1), f"link, {mib} MiB")
    return conclude(measure(sides, rounds, count * mib * MIB), "ours", "bare")


def tables(report: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    machine, settings = report["machine"], report["settings"]
    load = " / ".join(str(value) for value in machine["load_average"])
    head = (
        f"{machine['cpu']}, {machine['cores']} cores, load before {load}; {settings['depth']} "
        f"blocks in flight, medians of {settings['rounds']} rounds, 10th to 90th percentile."
    )
    text = [head]
    for title, entries in report["tables"].items():
        text += ["", f"### {title}", ""]
        if not entries:
            text.append("not measured: no accelerator")
            continue
        text += ["| MiB | way | GB/s | bare | ratio |", "|--:|:--|--:|--:|--:|"]
        for mib, result in entries.items():
            for way in WAYS:
                cells = (_spread(result[way][side]) for side in ("ours", "bare", "ratio"))
                text.append(f"| {mib} | {way} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _spread(summary: Mapping[str, float]) -> str:
    return f"{summary['p50']:.2f} ({summary['p10']:.2f}-{summary['p90']:.2f})"


def verdict(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the disk's rate is used, and by which slots it is used least."""
    found = {
        f"{way}, {mib} MiB": result[way]["ratio"]["p50"]
        for mib, result in entries.items()
        for way in WAYS
        if int(mib) >= 4
    }
    worst = min(found, key=found.__getitem__, default=None)
    ratio = found[worst] if worst else None
    return {"goal": GOAL, "worst": worst, "ratio": ratio, "met": ratio is None or ratio >= GOAL}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiers",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--path", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk")
    add("--mib", type=int, nargs="+", default=[1, 4, 16, 64], help="sizes of blocks")
    add("--depth", type=int, default=4, help="blocks in flight")
    add("--total-mib", type=int, default=1024, help="written and read in a turn")
    add("--rounds", type=int, default=7, help="counted turns of each side")
    add("--json", type=Path, metavar="FILE", help="write the report here, and .md and .png beside")
    args = parser.parse_args(argv)
    for name in ("depth", "total_mib", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and write the report."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "path")}
    machine = describe_machine(["tensorstore"])
    with tempfile.TemporaryDirectory(dir=args.path, prefix="tiers-") as folder:
        disk = {str(mib): on_disk(Path(folder), mib, args) for mib in args.mib}
    memory = {str(mib): in_memory(mib, args) for mib in args.mib}
    link = {}
    if torch.accelerator.is_available():
        link = {str(mib): on_link(mib, args) for mib in args.mib}
    found = {
        "NVMe tier against O_DIRECT": disk,
        "Host memory against a copy": memory,
        "Link against a pinned copy": link,
    }
    report = {"benchmark": "tiers", "machine": machine, "settings": settings, "tables": found}
    report["verdict"] = verdict(disk)
    text, judged = tables(report), report["verdict"]
    print(text)
    if judged["worst"]:
        met = "met" if judged["met"] else "MISSED"
        print(f"least of the disk's rate: {judged['ratio']:.2f} ({judged['worst']}); {GOAL}: {met}")
    if args.json:
        write_json(args.json, report)
        args.json.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(report, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
