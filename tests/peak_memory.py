"""How much memory of its own a piece of code takes at most; mapped files are not a process's own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading, time

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)

{prepare}
done, peak = [], [0]
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    {measured}
finally:
    done.append(True)
    watcher.join()
print((peak[0] - before) / 1024)
"""


def peak_memory(prepare: str, measured: str) -> float:
    """MiB (RssAnon) that the statement `measured` takes at most beyond what is held after `prepare`.

    Both are lines of Python, which a fresh process runs. Linux only.
    """
    program = PROGRAM.format(prepare=prepare, measured=measured)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.splitlines()[-1])
