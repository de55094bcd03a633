"""Runs code that a model wrote: this file is the child process, `python -I sandbox.py SECONDS MEGABYTES < CODE`.

It limits its own time, memory and files, gives up the network (seccomp: the kernel refuses sockets, new processes and
threads, and what could end other processes or outlive this one), then runs what it reads; DONE says that the code ran
to its end. It keeps to the standard library. What it does not do: hide the files that the user may read and write.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

DONE, FAILED, NO_ISOLATION = 90, 91, 92  # not 0, with which code may end itself before its tests
LARGEST_FILE = 1 << 20
# per machine: the kernel's name for it, and the numbers of the calls that are refused
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, {"socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "clone": 56, "clone3": 435,
                            "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234, "ptrace": 101,
                            "setsid": 112, "setpgid": 109, "io_uring_setup": 425, "pidfd_send_signal": 424}),
    "aarch64": (0xC00000B7, {"socket": 198, "socketpair": 199, "clone": 220, "clone3": 435, "execve": 221,
                             "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131, "ptrace": 117, "setsid": 157,
                             "setpgid": 154, "io_uring_setup": 425, "pidfd_send_signal": 424}),
}  # fmt: skip
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, JUMP_IF_LARGER, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: EPERM
FOREIGN_CALLS = 0x40000000  # numbers from here on are x32's


def seccomp_filter(architecture: int, refused: list[int]) -> bytes:
    """A BPF program: another architecture ends the process, a refused call fails with EPERM, all else goes on."""
    ask_architecture = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    ask_number = [(LOAD, 0, 0, 0), (JUMP_IF_LARGER, len(refused) + 1, 0, FOREIGN_CALLS)]
    # each comparison jumps over those after it, and over ALLOW
    compare = [(JUMP_IF_EQUAL, len(refused) - i, 0, number) for i, number in enumerate(refused)]
    end = [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *step) for step in [*ask_architecture, *ask_number, *compare, *end])


def give_up_the_network() -> bool:
    """For good. False where the kernel cannot do that."""
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        return False
    architecture, calls = SYSTEM_CALLS[platform.machine()]
    program = seccomp_filter(architecture, list(calls.values()))
    steps = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return bool(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(packed), 0, 0) == 0)


def limit(seconds: int, megabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    seconds, megabytes = map(int, sys.argv[1:])
    code = compile(sys.stdin.read(), "answer", "exec")
    limit(seconds, megabytes)
    if not give_up_the_network():
        os._exit(NO_ISOLATION)
    try:
        exec(code, {"__name__": "answer"})
    except BaseException:  # an answer that leaves with sys.exit(0) has not passed either
        os._exit(FAILED)
    os._exit(DONE)


if __name__ == "__main__":
    main()
