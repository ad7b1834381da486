"""What the next step needs again stays with the process: freed memory, and compiled products."""

import platform
import subprocess
import sys

import pytest
import torch

CODE = """
import resource, torch
from stillroom.training.memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else True
# Until the heap has a place that fits.
for _ in range(20):
    torch.ones(6_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(6_000_000)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc hands memory back")
def test_the_same_tensor_costs_page_faults_once() -> None:
    """Of 24 MB each: without it every one is mapped, and faults page by page."""
    command = [sys.executable, "-c", CODE.format(keep=True)]
    environment = {"THP_MEM_ALLOC_ENABLE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    assert kept
    assert faults < 1000


PRODUCTS = """
import stillroom, torch
for _ in range(2):
    for tokens in range(17, 17 + 1100):
        torch.ones(tokens, 17, dtype=torch.bfloat16) @ torch.ones(17, 17, dtype=torch.bfloat16)
"""


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no such product goes to oneDNN")
def test_products_of_every_length_are_compiled_once() -> None:
    """More of them than oneDNN keeps by itself: each would be compiled again in every epoch."""
    environment = {"ONEDNN_VERBOSE": "profile_create", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("create:cache_miss") == 1100
