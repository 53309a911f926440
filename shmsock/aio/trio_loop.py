"""What a node needs of an event loop, on trio: the driver's Loop, one for each trio.run.

Callbacks run in one system task, and one more watches each descriptor. A node under trio behaves like this:

- It ends with the run: after the main task, also after an exception. What was sent before arrives.
- Its pump stays hot for at most eight turns without data, then it sleeps on one descriptor, so that
  wait_all_tasks_blocked() returns. But the heartbeat wakes it up to ten times a second: a cushion, or an
  autojump threshold, of 0.1 s or more is never reached.
- An autojump clock knows nothing of bytes that are on their way from another process: while all tasks wait
  for them, timeouts fire at once.
"""

from __future__ import annotations

import contextvars
import logging
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import trio
from trio import lowlevel

__all__ = ["TrioFuture", "TrioLoop", "current_loop"]

LEFT_OUT_NS = TURN_NS = 50_000


def _nothing() -> None:
    pass


def _turn() -> object:
    """Yield to trio, only to let other tasks run."""
    waits = lowlevel.cancel_shielded_checkpoint()  # noqa: ASYNC105
    try:
        return waits.send(None)
    finally:
        waits.close()


_TURN = _turn()
_loop: lowlevel.RunVar[TrioLoop] = lowlevel.RunVar("shmsock")
_logger = logging.getLogger("shmsock")


def current_loop() -> TrioLoop:
    """Return the loop of this trio.run. Raises RuntimeError outside of its tasks."""
    lowlevel.current_task()
    try:
        return _loop.get()
    except LookupError:
        loop = TrioLoop()
        _loop.set(loop)
        lowlevel.add_instrument(loop)
        return loop


class TrioFuture:
    """The part of asyncio.Future that is used here, for one task that waits; when that is cancelled, so is
    this."""

    __slots__ = ("_callbacks", "_cancelled", "_done", "_error", "_task", "_value")

    def __init__(self) -> None:
        self._done = self._cancelled = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._task: lowlevel.Task | None = None
        self._callbacks: list[Callable[[TrioFuture], object]] = []

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return self._cancelled

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def set_result(self, value: Any) -> None:
        self._value = value
        self._settle()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._settle()

    def cancel(self) -> None:
        self._cancelled = True
        self._settle()

    def _settle(self) -> None:
        self._done = True
        task, self._task = self._task, None
        if task is not None:
            lowlevel.reschedule(task)
        for callback in self._callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[[TrioFuture], object]) -> None:
        """Add a callback; it is called at once when this is done already."""
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if not self._done:
            self._task = lowlevel.current_task()
            await lowlevel.wait_task_rescheduled(self._abort)
        return self.result()

    def _abort(self, raise_cancel: object) -> lowlevel.Abort:
        self._task = None
        self.cancel()
        return lowlevel.Abort.SUCCEEDED


class TrioLoop(trio.abc.Instrument):
    """A loop's methods as asyncio's have them, for one thread, over trio. Of what a callback raises only
    SystemExit and KeyboardInterrupt end the run.

    A turn of trio takes longer than a round trip through a ring. So checkpoint() lets the loop turn only when
    it is time for another task: when one was scheduled, or 50 us after the last turn.

    A turn costs more the more tasks run in it. So in turns that follow a checkpoint() the task of the
    callbacks is left out, for up to 50 us on end: the task that called checkpoint() polls its ring itself. As
    an instrument, this class learns of turns and scheduled tasks at no cost to a task's steps.
    """

    hot_turns = 8
    checkpoint_if_cancelled = staticmethod(lowlevel.checkpoint_if_cancelled)

    def __init__(self) -> None:
        self._token = lowlevel.current_trio_token()
        self._due: deque[tuple[Any, ...]] = deque()  # context, callback, arguments
        self._readers: dict[int, Callable[[], object]] = {}
        self._parked = self._closed = False
        self._scheduled = self._scheduled_before = (
            0  # tasks, from the last wait for IO on, and from the one before
        )
        self._turn_end = 0  # ns: until then checkpoint() need not let the loop turn
        self._looks = 0  # 2: a task returns from checkpoint() in the next turn; 1: in this one
        self._left_out_until = 0  # ns: until then callbacks are left out; 0: they are not
        self._task = lowlevel.spawn_system_task(self._run, name="shmsock callbacks")

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> None:
        """Have a callback called in the next turn. After the end of the run it is forgotten: async generators
        may still clean up then."""
        self._due.append((context or contextvars.copy_context(), callback, *args))
        self._unpark()

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        """Have a callback called, from any thread. Raises RuntimeError (trio.RunFinishedError) when the run
        is over."""
        self._token.run_sync_soon(self.call_soon, callback, *args)

    @types.coroutine
    def checkpoint(self) -> Generator[Any, Any, None]:
        """Do as trio's checkpoint() does, for a task that polls its ring next."""
        alone = self._scheduled + self._scheduled_before == 1  # only the one that runs now
        if not alone or time.monotonic_ns() >= self._turn_end:
            self._looks = 2
            yield _TURN
            self._turn_end = time.monotonic_ns() + TURN_NS
        yield from lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC105

    def before_io_wait(self, timeout: float) -> None:
        """Note that a turn ends. (A method of trio's instruments.)"""
        self._scheduled_before, self._scheduled = self._scheduled, 0
        if self._looks == 2:
            self._looks = 1
            if not self._left_out_until or time.monotonic_ns() < self._left_out_until:
                return
        else:
            self._looks = 0
        if self._left_out_until:
            self._unpark()
            if timeout:
                self._token.run_sync_soon(_nothing)  # it was about to wait: there was no task that could run

    def task_scheduled(self, task: lowlevel.Task) -> None:
        """Count the tasks that are scheduled. (A method of trio's instruments.)"""
        if task is not self._task:
            self._scheduled += 1

    def _unpark(self) -> None:
        self._left_out_until = 0
        if self._parked:
            self._parked = False
            lowlevel.reschedule(self._task)

    async def _run(self) -> None:
        try:
            while True:
                for _ in range(len(self._due)):
                    self._call(*self._due.popleft())
                if self._due and not self._looks:
                    await lowlevel.checkpoint()
                else:
                    self._left_out_until = time.monotonic_ns() + LEFT_OUT_NS if self._due else 0
                    self._parked = True
                    await lowlevel.wait_task_rescheduled(self._abort)
        finally:
            self._closed = True

    def _abort(self, raise_cancel: object) -> lowlevel.Abort:
        self._parked, self._left_out_until = False, 0
        return lowlevel.Abort.SUCCEEDED

    def _call(self, context: contextvars.Context, callback: Callable[..., object], *args: Any) -> None:
        try:
            context.run(callback, *args)
        except Exception as error:
            self.call_exception_handler({"message": f"shmsock: {callback!r} failed", "exception": error})

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log the error to "shmsock": trio has no handler of its own."""
        _logger.error("%s", context["message"], exc_info=context.get("exception"))

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call back, in the context of the caller, when `fd` is readable."""
        self._readers[fd] = callback
        lowlevel.spawn_system_task(
            self._watch, fd, callback, contextvars.copy_context(), name=f"shmsock reader {fd}"
        )

    async def _watch(self, fd: int, callback: Callable[[], object], context: contextvars.Context) -> None:
        # remove_reader() may come at any time: before this starts, while it waits, and before it is woken.
        while self._readers.get(fd) is callback:
            try:
                await lowlevel.wait_readable(fd)
            except trio.ClosedResourceError:
                return
            if self._readers.get(fd) is callback:
                self._call(context, callback)

    def remove_reader(self, fd: int) -> None:
        """Watch `fd` no more; to be called before it is closed."""
        if self._readers.pop(fd, None) is not None:
            lowlevel.notify_closing(fd)

    def create_future(self) -> TrioFuture:
        if self._left_out_until:  # somebody is going to wait
            self._unpark()
        return TrioFuture()

    def create_task(self, work: Coroutine[Any, Any, Any]) -> TrioFuture:
        """Run a coroutine in a system task, which ends with the run. Returns a future with its outcome."""
        future = TrioFuture()
        try:
            lowlevel.spawn_system_task(self._drive, work, future)
        except BaseException:
            work.close()
            raise
        return future

    async def _drive(self, work: Coroutine[Any, Any, Any], future: TrioFuture) -> None:
        try:
            future.set_result(await work)
        except Exception as error:
            future.set_exception(error)
        except BaseException:
            future.cancel()
            raise

    def shield(self, task: TrioFuture) -> TrioFuture:
        """Wait for a task as one of several; cancelling this waiter takes nothing from the others."""
        mine = TrioFuture()

        def copy(task: TrioFuture) -> None:
            if mine.done() or task.cancelled():
                return
            if (error := task.exception()) is not None:
                mine.set_exception(error)
            else:
                mine.set_result(task.result())

        task.add_done_callback(copy)
        return mine

    async def sleep(self, seconds: float) -> None:
        """Sleep in real time, whatever trio's clock shows."""
        end = time.monotonic() + seconds
        await trio.sleep(seconds)
        if (left := end - time.monotonic()) > 0:
            await trio.to_thread.run_sync(time.sleep, left, abandon_on_cancel=True)

    def is_closed(self) -> bool:
        return self._closed

    def is_running(self) -> bool:
        return not self._closed
