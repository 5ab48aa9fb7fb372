"""Runs in the sandbox's process: takes the limits, then runs what it is given. See ``sandbox``.

``python -I -S sandboxed.py FD`` reads one JSON object from standard input and writes one word to
FD. It runs alone, so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import resource
import struct
import sys

FILE_BYTES = 1 << 20
OPEN_FILES = 64

# Numbers of the calls that computing, importing and reading take, for each architecture that the
# kernel names by this audit code (linux/audit.h, asm/unistd.h).
_CALLS: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9,
            "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
            "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "access": 21,
            "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
            "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89,
            "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
            "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
            "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
            "getdents64": 217, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
            "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
            "pselect6": 270, "ppoll": 271, "getrandom": 318, "statx": 332, "faccessat2": 439,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "getcwd": 17, "dup": 23, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62,
            "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72,
            "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93,
            "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113,
            "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
            "sched_yield": 124, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
            "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165,
            "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175,
            "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214,
            "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
            "getrandom": 278, "statx": 291, "faccessat2": 439,
        },
    ),
}  # fmt: skip
_OPENAT = {"x86_64": 257, "aarch64": 56}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE = 0x00050000 | 1  # the call fails with EPERM
# Classic BPF: load a word, jump if equal, jump if any bit is set, return (linux/bpf_common.h).
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
# Where struct seccomp_data has the call's number, the architecture and openat's flags.
_NUMBER_AT, _ARCH_AT, _FLAGS_AT = 0, 4, 32
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class UnsafeError(Exception):
    """What protects from the code is not there."""


def main() -> None:
    """See the module."""
    report = int(sys.argv[1])
    task = json.load(sys.stdin)
    try:
        take_limits(task["seconds"], task["memory_bytes"])
        filter_calls()
    except (UnsafeError, OSError, ValueError) as error:
        say(report, f"unsafe {error}")
        return
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for number, part in enumerate(task["parts"]):
            exec(compile(part, f"<part {number}>", "exec"), names)
    except BaseException as error:
        # The error is the code's own object, so even its text may misbehave.
        say(report, f"failed {type(error).__name__}")
        os._exit(1)
    say(report, task["word"])
    os._exit(0)


def take_limits(seconds: float, memory_bytes: int) -> None:
    """Limits of the kernel that a process can only lower."""
    whole = math.ceil(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: whole,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def filter_calls() -> None:
    """Refuse every system call but the listed ones, and files opened to be written.

    Raises ``UnsafeError`` where the kernel does not filter.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _CALLS:
        raise UnsafeError(f"it takes Linux on {' or '.join(_CALLS)}, this is {machine}")
    arch, calls = _CALLS[machine]
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number in sorted(calls.values()):
        program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program += [
        (_IF_EQUAL, 1, 0, _OPENAT[machine]),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _FLAGS_AT),
        (_IF_ANY_BIT, 0, 1, _WRITES),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the count, then the address at a pointer's alignment.
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise UnsafeError("the kernel has no no_new_privs")
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        raise UnsafeError(f"the kernel takes no seccomp filter (errno {ctypes.get_errno()})")


def say(report: int, text: str) -> None:
    """The one word of this run."""
    os.write(report, text.encode()[:1000])


if __name__ == "__main__":
    main()
