"""Assembles the seccomp filter that refuses system calls inside a sandbox. Standard library only.

Process 1 installs the filter once, for itself and for all processes that it starts, because installing it in each costs
more than a short test. The filter allows mount and umount2, which process 1 needs for /tmp and for which no other
process has the capability.

Numbers below 424 are a closed list on each machine; of these all calls are allowed except those in `_REFUSED` and those
that break a rule of `_RULES`. Linux adds new calls from 424 on; of these all are refused except `_ALLOWED_NEW`.
Classic BPF: an instruction is (code, jump if true, jump if false, operand) of 8 bytes (linux/filter.h).
"""

import ctypes
import errno
import os
import struct

# name: its numbers on x86_64 and on aarch64; None where a machine has no such call.
_REFUSED = {
    # Processes and limits of others
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Keys
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # Memory that no process is charged for
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "vmsplice": (278, 75),
    "remap_file_pages": (216, 234), "io_setup": (206, 0), "mbind": (237, 235), "set_mempolicy": (238, 237),
    # Marks and watches on the machine's own files
    "flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "lookup_dcookie": (212, 18),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # Disks of the machine
    "sync": (162, 81), "syncfs": (306, 267),
    # The kernel itself, and calls that no computation needs
    "unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41),
    "chroot": (161, 51), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "syslog": (103, 116), "personality": (135, 92), "quotactl": (179, 60), "acct": (163, 89), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "vhangup": (153, 58), "nfsservctl": (180, 42), "setsockopt": (54, 208),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
    "_sysctl": (156, None), "ustat": (136, None), "sysfs": (139, None),
}  # fmt: skip
# Refused with ENOSYS, as by a kernel that lacks the call, so that libraries do without it.
_MISSING = {"memfd_create": (319, 279)}
_ALLOWED_NEW = (436, 439)  # close_range, faccessat2
_OWN, _UNIX_STREAM = (0, ~0, True, (0,)), [(0, ~0, True, (1,)), (1, 0xF, True, (1, 5))]
# Commands of fcntl: locks and leases; who gets signals of a file, and which; larger pipes; hints kept with the file.
_FCNTL = (6, 7, 37, 38, 1024, 8, 10, 15, 1026, 1031, 1036, 1038)
# name: numbers, and for each condition the argument, its mask and which values it must have, or must not have.
_RULES = {
    # A handler of core files that the machine starts is kept away by a limit of 1, not 0 (core(5)).
    "prlimit64": ((302, 261), [_OWN, (1, ~0, False, (4,))]),
    "setrlimit": ((160, 164), [(0, ~0, False, (4,))]),
    "sched_setaffinity": ((203, 122), [_OWN]),
    "setpriority": ((141, 140), [_OWN, (1, ~0, True, (0,))]),
    "socket": ((41, 198), _UNIX_STREAM),  # a queue of datagrams is not bounded by the sockets that are open
    "socketpair": ((53, 199), _UNIX_STREAM),
    "clone": ((56, 220), [(0, 0x7E020000, True, (0,))]),  # no namespaces
    "mmap": ((9, 222), [(3, 0x21, False, (0x21,)), (3, 0x40000, True, (0,))]),  # shared without a file; huge pages
    "fcntl": ((72, 25), [(1, ~0, False, _FCNTL)]),
    "fadvise64": ((221, 223), [(3, ~0, False, (4,))]),  # to drop files of the machine from its memory
    "ioctl": ((16, 29), [(1, ~0, False, (0x5412, 0x541C, 0x8901, 0x8902))]),  # to type into a terminal; owners
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def assemble():
    """Returns the filter for this machine; raises OSError on a machine whose numbers are not known here."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"no list of system calls for {machine}")
    column, architecture = _MACHINES[machine]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    new = [line for number in _ALLOWED_NEW for line in _when(number, _ALLOW)] + [_error(errno.ENOSYS)]
    code += [(_AT_LEAST, 0, len(new), 424), *new]
    for numbers, conditions in _RULES.values():
        block = _rule(conditions)
        code += [(_EQUAL, 0, len(block), numbers[column]), *block]
    for table, error in ((_REFUSED, errno.EPERM), (_MISSING, errno.ENOSYS)):
        for numbers in table.values():
            if numbers[column] is not None:
                code += _when(numbers[column], _error(error)[3])
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def install(code):
    """Puts this process, which must have no_new_privs, and all its descendants under the filter."""
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def _rule(conditions):
    """Returns the instructions of a call with conditions; they end in an answer. Arguments are read as 32 bits."""
    code = []
    for argument, mask, wanted, values in conditions:
        code += [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, mask & 0xFFFFFFFF)]
        if wanted:  # past this condition's end where a value matches
            code += [(_EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)] + [_error(errno.EPERM)]
        else:
            code += [line for value in values for line in _when(value, _error(errno.EPERM)[3])]
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _when(number, answer):
    return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]


def _error(number):
    return _RETURN, 0, 0, 0x50000 | number
