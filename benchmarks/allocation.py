"""Time what a step pays to allocate the gradient of a word-embedding table, by allocator setting.

    python benchmarks/allocation.py

Prints one JSON object: median milliseconds and page faults of a zeroed 30522 x 384 float32 tensor that is
freed and asked for anew, in a fresh process for each setting.
"""

import json
import os
import statistics
import subprocess
import sys

from toys import machine

SETTINGS = {
    "default": {"THP_MEM_ALLOC_ENABLE": "0"},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "glibc without mmap": {"THP_MEM_ALLOC_ENABLE": "0", "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"},
}

PROBE = """
import json, resource, time, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for _ in range(30):
    before, start = faults(), time.perf_counter()
    table = torch.zeros(30522, 384)
    found.append((1000 * (time.perf_counter() - start), faults() - before))
    del table
print(json.dumps(found[5:]))
"""


def main() -> None:
    results = {}
    for name, variables in SETTINGS.items():
        command = [sys.executable, "-c", PROBE]
        output = subprocess.run(command, env=os.environ | variables, capture_output=True, check=True)
        found = json.loads(output.stdout)
        results[name] = {
            "milliseconds": round(statistics.median(ms for ms, _ in found), 2),
            "page_faults": statistics.median(faults for _, faults in found),
        }
    print(json.dumps({"machine": machine(), **results}, indent=2))


if __name__ == "__main__":
    main()
