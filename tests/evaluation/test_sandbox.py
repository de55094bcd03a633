"""The filter of system calls: asked of this kernel, compared with its tables, and run step by step for each machine."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle.evaluation import sandbox
from upcycle.evaluation.code import passes


@pytest.mark.usefixtures("isolation")
def test_every_call_that_is_not_on_the_list_is_refused() -> None:
    """Asked of the kernel: each number there may be, also as one of x32's."""
    column = sandbox.ARCHITECTURES[platform.machine()][1]
    allowed = {of[column] for of in sandbox.CALLS.values()}
    allowed |= {335, 336}  # the kernel's own for probes, past every filter; they end whoever else calls them
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def refused(number):
    return libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() in (1, 38)
went = [n for n in range(1024) if n not in {allowed} and not refused(n)]
went += [n for n in range(1024) if not refused(n | 1 << 30)]
"""
    assert passes(program, "", ["assert went == []"])


def outcome(machine: str, number: int, arguments: tuple[int, ...] = (), architecture: int | None = None) -> int:
    """What a filter returns for a call: BPF as `man 2 bpf` and linux/filter.h define it."""
    words = [number, architecture or sandbox.ARCHITECTURES[machine][0], 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32]
    value, at, program = 0, 0, sandbox.seccomp_filter(machine)
    while True:
        operation, yes, no, operand = program[at]
        assert max(yes, no) < 256
        if operation == sandbox.RETURN:
            return operand
        if operation == sandbox.LOAD:
            value = words[operand // 4]
        else:
            holds = value == operand if operation == sandbox.JUMP_IF_EQUAL else value > operand
            at += yes if holds else no
        at += 1


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_lets_the_list_through_and_nothing_else(machine: str, column: int) -> None:
    numbers = {name: of[column] for name, of in sandbox.CALLS.items()}
    free = {number for name, number in numbers.items() if name not in sandbox.MAY_BE}
    judged = {number: outcome(machine, number, (7, 7, 7)) for number in [*range(600), 1 << 30, 1 << 31]}
    assert {number for number, end in judged.items() if end == sandbox.ALLOW} == free - {None}
    assert {end for number, end in judged.items() if number > sandbox.NEWEST} == {sandbox.UNKNOWN}
    assert {outcome(machine, n or 0, architecture=0x40000003) for n in numbers.values()} == {sandbox.KILL}  # 32 bits
    for name, arguments, allowed in (
        ("fcntl", (5, 3), True),
        ("fcntl", (5, 1030), True),
        ("fcntl", (5, 4), False),
        ("fcntl", (5, 8), False),
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),
        ("ioctl", (0, 0x5452), False),
        ("futex", (9, 128), True),
        ("futex", (9, 0), False),  # of other processes too
        ("futex", (9, 6 | 128), False),  # inherits a priority
        ("prlimit64", (0, 7, 0), True),
        ("prlimit64", (1, 7, 0), False),
        ("prlimit64", (0, 7, 1 << 40), False),
    ):
        end = outcome(machine, numbers[name] or 0, arguments)
        assert end == (sandbox.ALLOW if allowed else sandbox.REFUSE), (name, arguments)


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_numbers_of_calls_are_the_kernel_s(header: str, column: int) -> None:
    if not Path(header).is_file():
        pytest.skip(f"no {header}: the kernel's headers for C are not installed")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", Path(header).read_text(), re.M)
    theirs = {{"fstatat": "newfstatat"}.get(name, name): int(number) for name, number in found}
    ours = {name: of[column] for name, of in sandbox.CALLS.items() if of[column] is not None}
    assert ours == {name: theirs[name] for name in ours}
    # what a machine has not is not refused by mistake
    assert [name for name, of in sandbox.CALLS.items() if of[column] is None and name in theirs] == []


@pytest.mark.usefixtures("isolation")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
def test_calls_of_32_bits_end_the_process() -> None:
    getpid = "b814000000cd80c3"  # mov eax, 20; int 0x80; ret
    program = f"""
import ctypes, mmap
place = mmap.mmap(-1, 4096, prot=7)
place.write(bytes.fromhex({getpid!r}))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(place)))()
"""
    if subprocess.run([sys.executable, "-c", program], check=False).returncode:
        pytest.skip("this kernel has no calls of 32 bits")
    assert passes(program.replace("cd80c3", "c39090"), "", [])  # without the call
    assert not passes(program, "", [])
