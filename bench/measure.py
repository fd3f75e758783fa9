"""Two measurements: time, interleaved, and peak memory, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

# Between two timed calls the threads of the first one's pool may still be spinning. torch and a
# compiled kernel can have pools of their own: without a pause one provider is billed for another.
PAUSE_SECONDS = 0.01
FEWEST_ROUNDS = 5


def interleaved(
    runners: dict[str, Callable[[int], float]],
    *,
    rounds: int,
    seconds: float,
    warm_up: int = 2,
    pause: float = PAUSE_SECONDS,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of each runner, one call of each a round, in an order that changes with the round.

    A runner gets the number of the call, by which it rotates its buffers, and returns the seconds
    that it took. Rounds stop early, but not before `FEWEST_ROUNDS`, once `seconds` have passed.
    """
    order, shuffle = list(runners), random.Random(0).shuffle
    calls = 0
    for name in order * warm_up:
        runners[name](calls)
        calls += 1
    times: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for done in range(1, rounds + 1):
            shuffle(order)
            for name in order:
                time.sleep(pause)
                times[name].append(runners[name](calls))
                calls += 1
            on_round(done)
            if done >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
                break
    finally:
        gc.enable()
    return times


def seconds_of(call: Callable[[], object], device: str) -> tuple[float, object]:
    """Seconds of one call, and its result.

    On a GPU the work between two events, queued behind a kernel that does nothing for some
    milliseconds: the launches are prepared meanwhile, so that the host's time is not in it.
    """
    if device == "cpu":
        begin = time.perf_counter()
        result = call()
        return time.perf_counter() - begin, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(8_000_000)
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000, result


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _memory_child(connection: Connection, make: Callable, arguments: tuple) -> None:
    call, gradient_bytes = make(*arguments)
    # Give back what the warm-up has left in malloc's pools: else the call would reuse it unseen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")  # puts the high-water mark back to what is resident now
    result = call()
    connection.send(_resident("VmHWM") - before - gradient_bytes)
    del result


def peak_memory(make: Callable, *arguments: object, device: str = "cpu") -> int:
    """Bytes that one call needs beyond its inputs and its gradient, at most, in a fresh process.

    `make(*arguments)` runs there; it allocates the inputs, warms up and returns the call and the
    bytes of a fresh gradient (0 when it is written in place). What is measured is the rise of the
    resident set's high-water mark, so a page counts once it is touched, and not before. On a GPU it
    is the mark of torch's allocator, in this process.

    Raises RuntimeError when the process dies, most often for want of memory.
    """
    if device != "cpu":
        call, gradient_bytes = make(*arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), call()
        del result
        return torch.cuda.max_memory_allocated() - before - gradient_bytes
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_memory_child, args=(sender, make, arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the memory probe ended with exit code {child.exitcode}") from None
    finally:
        child.join()


def timed_calls(
    calls: dict[str, Callable[[], object]], device: str, products: int = 1
) -> dict[str, Callable[[int], float]]:
    """Runners where each provider is a call without arguments, which computes so many products: the
    seconds of one."""

    def runner(call: Callable[[], object]) -> Callable[[int], float]:
        return lambda _: seconds_of(call, device)[0] / products

    return {name: runner(call) for name, call in calls.items()}
