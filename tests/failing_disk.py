"""Commands whose writes fail, or are killed, one after the other: below Python, where the disk is.

A preloaded library makes every kind of write (open, write, fsync, rename, mkdir) of every file
below a folder fail once; what has failed stands in a list, and a process has one failure at most.
So a command that is run until nothing fails any more has had all of its writes fail. `serve`, in a
process of its own, forks the commands, so that the libraries are imported once.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("torch", "transformers.trainer", "peft", "datasets", "lm_eval.tasks", "scipy.stats")
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int failed; /* this process has had its failure */

static int fails(const char *what, const char *path) {
    const char *root = getenv("FAIL_IN"), *list = getenv("FAIL_LIST"), *with = getenv("FAIL_WITH");
    if (failed || !root || !list || !with || !path || strncmp(path, root, strlen(root))) return 0;
    char key[5000], line[5000];
    snprintf(key, sizeof key, "%s %s\n", what, path + strlen(root));
    char *end = strstr(key, ".partial"); /* 8 random digits are before it */
    if (end && end - key > 8) memset(end - 8, 'x', 8);
    char *start = strstr(key, "/.tmp"); /* and of safetensors 6 after this */
    if (start && strlen(start) > 11) memset(start + 5, 'x', 6);
    unsigned long hash = 5381, every = strtoul(getenv("FAIL_EVERY"), 0, 10);
    for (char *c = key; *c; c++) hash = hash * 33 + *c;
    if (hash / 7 % every) return 0;
    FILE *file = REAL(fopen)(list, "a+");
    if (!file) return 0;
    rewind(file);
    while (fgets(line, sizeof line, file))
        if (!strcmp(line, key)) { fclose(file); return 0; }
    failed = 1; /* before the list is written, with a call that is looked at, too */
    fputs(key, file);
    fclose(file);
    if (!strcmp(with, "kill")) raise(SIGKILL);
    errno = atoi(with);
    return 1;
}

static int fails_at(const char *what, int fd) {
    char link[64], path[4096];
    if (failed || !getenv("FAIL_IN")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(what, path);
}

#define WRITES (O_WRONLY | O_RDWR | O_CREAT)
#define MODE va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest)
#define OPEN(name) int name(const char *path, int flags, ...) { MODE; \
    return flags & WRITES && fails("open", path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { MODE; \
    return flags & WRITES && fails("open", path) ? -1 : REAL(name)(at, path, flags, mode); }
#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    return strpbrk(mode, "wa+") && fails("open", path) ? 0 : REAL(name)(path, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    return fails_at("write", fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fails_at("write", fd) ? -1 : REAL(writev)(fd, parts, count);
}
int fsync(int fd) { return fails_at("fsync", fd) ? -1 : REAL(fsync)(fd); }
int rename(const char *from, const char *to) {
    return fails("rename", to) ? -1 : REAL(rename)(from, to);
}
int mkdir(const char *path, mode_t mode) {
    return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}
"""


class FailingDisk:
    """The server of commands; `run` starts some side by side and returns their exit codes."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError or CalledProcessError without a C compiler."""
        source, library = folder / "failing.c", folder / "failing.so"
        source.write_text(SOURCE)
        build = ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True, capture_output=True)
        self.folder, self.list = folder, folder / "failed"
        root = Path(__file__).resolve().parent.parent
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *commands: list[str], **environment: str) -> tuple[list[int], str]:
        """The exit codes of commands, [module, argument, ...], and what they printed."""
        logs = [self.folder / f"log-{i}" for i in range(len(commands))]
        jobs = [[command, environment, str(log)] for command, log in zip(commands, logs)]
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        codes = json.loads(self.server.stdout.readline())
        return codes, "\n".join(log.read_text(errors="replace") for log in logs)

    def failures(self) -> list[str]:
        """What has failed since the list was last removed."""
        return self.list.read_text().splitlines() if self.list.is_file() else []


def serve() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        children = [_start(*job) for job in json.loads(line)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)


def _start(command: list[str], environment: dict[str, str], log: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.environ.update(environment)
        try:
            code = importlib.import_module(command[0]).main(command[1:])
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
