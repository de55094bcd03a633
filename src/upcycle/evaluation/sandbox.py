"""Runs code that a model wrote: this file is the child process, `python -I sandbox.py SECONDS MEGABYTES`.

First it gives up, for good: time, memory and open files beyond a bound; reading of anything but the libraries of Python
and of the system, and all writing (Landlock); every system call outside of CALLS (seccomp), so the network, threads,
and all that reaches other processes or changes modes, owners, times and attributes of files. Then it says `ready`, runs
the programs that its parent sends, one after the other in the same namespace, and says after each how it ended.

It says so with one of two random words, which it reads from the pipe when the program has ended. Among the programs are
assertions that must raise (`code.passes`). So code passes no test by ending the process, by writing whatever it likes,
by reading all that it can reach, or by taking assertions away. But answer and tests share one interpreter, and that
leaves: code written against this very file can speak its protocol or rewrite its frames and raise where it must; a
function can read or skip the test that calls it; an object can be equal to everything. A pass is a measurement, not a
proof against an adversary.

What a program can still learn: names, sizes and times of files whose paths it guesses, and the machine's name.
The standard library alone is used, and little of it, since each answer waits for it. On aarch64 none of this was run:
its numbers are those of the kernel's table, and its filter was run by an interpreter of BPF (tests).
"""

import ctypes
import os
import resource
import stat
import struct
import sys

NO_ISOLATION = 92  # the exit code
READY = b"ready"
WORD = 32
OPEN_FILES = 64

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # the kernel's name; the column in CALLS
# all that the interpreter, numpy and their libraries were seen to need, on x86_64 and on aarch64 (as far as it has it)
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "lseek": (8, 62),
    "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "fcntl": (72, 25),
    "ioctl": (16, 29), "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents64": (217, 61), "getcwd": (79, 17), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "brk": (12, 214), "madvise": (28, 233), "futex": (202, 98), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278), "prlimit64": (302, 261), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
NEWEST = 450  # of a number above it a library is told that there is no such call, and takes an older one
ARGUMENTS = 16  # where they begin in the kernel's `seccomp_data`, 8 bytes each, the low half first
MAY_BE: dict[str, dict[int, tuple[int, ...]]] = {
    "fcntl": {ARGUMENTS + 8: (0, 1, 2, 3, 1030)},  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: no owner
    "ioctl": {ARGUMENTS + 8: (0x5401, 0x802C542A, 0x5413, 0x5450, 0x5451)},  # TCGETS(2), TIOCGWINSZ, FIO(N)CLEX
    # waiting and waking within this process, with either clock; none that inherits priorities
    "futex": {ARGUMENTS + 8: tuple(call | clock | 128 for call in (0, 1, 3, 4, 5, 9, 10) for clock in (0, 256))},
    "prlimit64": {ARGUMENTS: (0,), ARGUMENTS + 16: (0,), ARGUMENTS + 20: (0,)},  # reads limits of this process
}
"""Call -> where in `seccomp_data` -> the values that are let through."""
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER, SIGKILL = 1, 22, 38, 2, 9
LOAD, JUMP_IF_EQUAL, JUMP_IF_LARGER, RETURN = 0x20, 0x15, 0x25, 0x06  # BPF
ALLOW, REFUSE, UNKNOWN, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS
READS_ALL = 1 << 2  # CAP_DAC_READ_SEARCH: root may need it where libraries belong to somebody else

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF, PATH_BENEATH = 444, 445, 446, 1
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
NETWORK, SCOPES = 0b11, 0b11  # TCP; abstract sockets and signals: seccomp refuses both already
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/dev/urandom")

Step = tuple[int, int, int, int]


def seccomp_filter(machine: str) -> list[Step]:
    """A BPF program. Another architecture ends the process; calls outside of CALLS fail, and so do others' arguments.

    Returns:
        Steps of (operation, steps to skip if true, steps to skip if false, operand).
    """
    architecture, column = ARCHITECTURES[machine]
    numbers = {name: number for name, of in CALLS.items() if (number := of[column]) is not None}
    steps = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for name, rules in MAY_BE.items():
        inner = [step for where, values in rules.items() for step in _value_check(where, values)]
        steps += [(JUMP_IF_EQUAL, 0, len(inner) + 1, numbers.pop(name)), *inner, (RETURN, 0, 0, ALLOW)]
    steps += [(JUMP_IF_EQUAL, len(numbers) - i + 2, 0, number) for i, number in enumerate(numbers.values())]
    return [*steps, (JUMP_IF_LARGER, 1, 0, NEWEST), *((RETURN, 0, 0, end) for end in (REFUSE, UNKNOWN, ALLOW))]


def _value_check(where: int, values: tuple[int, ...]) -> list[Step]:
    """Goes on behind these steps if the half argument is one of the values."""
    compare = [(JUMP_IF_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(LOAD, 0, 0, where), *compare, (RETURN, 0, 0, REFUSE)]


def openable() -> dict[str, int]:
    """What can be opened, and how: files of the interpreter, its packages and the system's libraries; and /dev/null."""
    homes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    own = [f"{home}/{name}" for home in homes for name in ("lib", "lib64")]
    return dict.fromkeys((*own, *LIBRARIES, *FILES), READ_FILE | READ_DIR) | {os.devnull: READ_FILE | WRITE_FILE}


def read_libraries_alone(libc: ctypes.CDLL) -> bool:
    """From here on no other file can be opened, and none written but /dev/null. False where the kernel cannot do that.

    Its versions know more and more rights; each is taken that there is.
    """
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << 13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("QQQ", rights, NETWORK, SCOPES)[:size], size, 0)
    for path, right in openable().items():
        try:
            place = os.open(path, os.O_PATH)
        except OSError:
            continue
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            right &= ~READ_DIR
        if libc.syscall(LANDLOCK_ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", right, place), 0) != 0:
            return False
        os.close(place)
    return bool(libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0)


def call_nothing_else(libc: ctypes.CDLL) -> bool:
    """From here on the calls of CALLS alone. False where the kernel cannot do that."""
    program = b"".join(struct.pack("HBBI", *step) for step in seccomp_filter(os.uname().machine))
    steps = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(packed), 0, 0) == 0)


def drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Root keeps the right to read libraries, and nothing else of what makes it root."""
    header, held = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    libc.capget(header, held)
    kept = [word & READS_ALL for word in struct.unpack("6I", held)[:3]]  # effective, permitted, inheritable
    return bool(libc.capset(header, struct.pack("6I", *kept, 0, 0, 0)) == 0)


def limit(kind: int, most: int) -> None:
    """Both limits, or the hard one that there is if it is lower."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def isolate(seconds: int, megabytes: int) -> bool:
    """False where this machine cannot do all of it."""
    if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES:
        return False
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_AS, megabytes << 20)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK):
        limit(nothing, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    alone = libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0 and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    return alone and drop_capabilities(libc) and read_libraries_alone(libc) and call_nothing_else(libc)


def serve(requests: int, replies: int) -> None:
    """Runs programs until the pipe ends: a size of 4 bytes, the program, and two words, for its end and for a raise."""
    names, as_number = {"__name__": "answer"}, int.from_bytes
    # a program may put others in their places
    read, write, run, translate, trace = os.read, os.write, exec, compile, sys.settrace

    def take(size: int) -> bytes:
        """So many bytes and none beyond them, which stay in the pipe; fewer if it ends."""
        taken = b""
        while (left := size - taken.__len__()) and (part := read(requests, left)):
            taken += part
        return taken

    while size := take(4):
        trace(None)  # a trace function of an earlier program could skip lines of this one
        source, ended = take(as_number(size, "big")), False
        try:
            run(translate(source.decode(), "answer", "exec"), names)
            ended = True
        except BaseException:  # an answer that leaves with sys.exit(0) has not passed either
            pass
        words = take(2 * WORD)
        write(replies, words[:WORD] if ended else words[WORD:])


def main() -> None:
    requests, replies, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    if not isolate(*map(int, sys.argv[1:])):
        os._exit(NO_ISOLATION)
    os.write(replies, READY)
    for usual in (0, 1, 2):
        os.dup2(nowhere, usual)
    serve(requests, replies)
    os._exit(0)


if __name__ == "__main__":
    main()
