"""Runs code that a model wrote: this file is the child process, `python -I sandbox.py SECONDS MEGABYTES < CODE`.

It limits its own time, memory and files; gives up writing anywhere but in files of its working folder (Landlock); gives
up the network, new processes and threads, and calls that reach other processes or outlive this one (seccomp). Then it
says `ready` and runs what it reads; the exit code DONE says that the code ran to its end. It keeps to the standard
library. What it does not do: hide what the user may read.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

DONE, FAILED, NO_ISOLATION = 90, 91, 92  # not 0, with which code may end itself before its tests
READY = b"ready"
LARGEST_FILE = 1 << 20

# per machine: the kernel's name for it, and the numbers of the calls that are refused
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, {
        "socket": 41, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "setpgid": 109,
        "setsid": 112, "rt_sigqueueinfo": 129, "ptrace": 101, "tkill": 200, "tgkill": 234, "rt_tgsigqueueinfo": 297,
        "prlimit64": 302, "process_vm_readv": 310, "process_vm_writev": 311, "execveat": 322, "shmget": 29,
        "semget": 64, "msgget": 68, "mq_open": 240, "setpriority": 141, "sched_setaffinity": 203,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "socketpair": 199, "clone": 220, "execve": 221, "kill": 129, "setpgid": 154, "setsid": 157,
        "rt_sigqueueinfo": 138, "ptrace": 117, "tkill": 130, "tgkill": 131, "rt_tgsigqueueinfo": 240,
        "prlimit64": 261, "process_vm_readv": 270, "process_vm_writev": 271, "execveat": 281, "shmget": 194,
        "semget": 190, "msgget": 186, "mq_open": 180, "setpriority": 140, "sched_setaffinity": 122,
    }),
}  # fmt: skip
EVERYWHERE = {"pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, JUMP_IF_LARGER, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: EPERM
FOREIGN_CALLS = 0x40000000  # numbers from here on are x32's

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF, PATH_BENEATH = 444, 445, 446, 1
EXECUTE, WRITE_FILE, REMOVE_FILE, MAKE_FILE, TRUNCATE = 1 << 0, 1 << 1, 1 << 5, 1 << 8, 1 << 14
CHANGES = EXECUTE | WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # all that changes files or folders
TRUNCATE_FROM_VERSION = 3


def seccomp_filter(architecture: int, refused: list[int]) -> bytes:
    """A BPF program: another architecture ends the process, a refused call fails with EPERM, all else goes on."""
    ask_architecture = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    ask_number = [(LOAD, 0, 0, 0), (JUMP_IF_LARGER, len(refused) + 1, 0, FOREIGN_CALLS)]
    # each comparison jumps over those after it, and over ALLOW
    compare = [(JUMP_IF_EQUAL, len(refused) - i, 0, number) for i, number in enumerate(refused)]
    end = [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *step) for step in [*ask_architecture, *ask_number, *compare, *end])


def write_here_alone(libc: ctypes.CDLL) -> bool:
    """From here on only plain files of the working folder can be written. False where the kernel cannot do that."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    truncate = TRUNCATE if version >= TRUNCATE_FROM_VERSION else 0
    handled = struct.pack("Q", CHANGES | truncate)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    here = os.open(".", os.O_PATH)
    rule = struct.pack("=Qi", WRITE_FILE | REMOVE_FILE | MAKE_FILE | truncate, here)
    added = rules >= 0 and libc.syscall(LANDLOCK_ADD_RULE, rules, PATH_BENEATH, rule, 0) == 0
    return bool(added and libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0)


def reach_nothing(libc: ctypes.CDLL) -> bool:
    """From here on no network and no other process. False where the kernel cannot do that."""
    architecture, calls = SYSTEM_CALLS[platform.machine()]
    program = seccomp_filter(architecture, [*calls.values(), *EVERYWHERE.values()])
    steps = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(packed), 0, 0) == 0)


def limit(kind: int, most: int) -> None:
    """Both limits, or the hard one that there is if it is lower."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def isolate(seconds: int, megabytes: int) -> bool:
    """False where this machine cannot do all of it."""
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        return False
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_AS, megabytes << 20)
    limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
    limit(resource.RLIMIT_CORE, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and write_here_alone(libc) and reach_nothing(libc)


def main() -> None:
    source, nowhere = sys.stdin.read(), os.open(os.devnull, os.O_WRONLY)
    if not isolate(*map(int, sys.argv[1:])):
        os._exit(NO_ISOLATION)
    os.write(1, READY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        exec(compile(source, "answer", "exec"), {"__name__": "answer"})
    except BaseException:  # an answer that leaves with sys.exit(0) has not passed either
        os._exit(FAILED)
    os._exit(DONE)


if __name__ == "__main__":
    main()
