"""Work that Ctrl-C and SIGTERM end in order."""

import asyncio
import signal
from typing import Any


def run_until_stopped(work: Any) -> Any:
    """`work` in an event loop that SIGINT and SIGTERM cancel, so that everything is closed in order."""

    async def main() -> Any:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError as error:  # SIGTERM; SIGINT arrives as KeyboardInterrupt already
        raise KeyboardInterrupt from error
