/* A layer between a process and its files, loaded with LD_PRELOAD: one call fails, or a signal comes there.

   It counts the calls that change files under one folder, and writes each as a line to a trace: name, path, new path or size.
   The call number `at` meets the action. `arm` starts the count; before that, nothing happens.
   glibc writes what stdio has buffered by internal calls, so fwrite and fclose count themselves. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <linux/fcntl.h> /* <fcntl.h> would declare open with "..." */
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { GO, FAIL, SHORT, BEFORE, AFTER };
enum kind { CLOSES, CHANGES, ALLOCATES }; /* a full disk refuses the last kind only, a read-only one the last two */

static char folder[PATH_MAX];
static int action, number, stays, reads, trace = -1;
static long at;
static atomic_long calls;
static int full; /* after a short write, the next call that allocates fails */

int fcntl(int, int, ...);
int dup2(int, int);

/* n: number of the call that meets `how`, from 1; 0: none. what: errno of FAIL; signal that comes BEFORE or AFTER it.
   lasting: all later calls fail, too. with_reads: opening a file to read it is a call. to: descriptor of the trace. */
void arm(const char *root, long n, int how, int what, int lasting, int with_reads, int to) {
    snprintf(folder, sizeof folder, "%s", root);
    at = n, action = how, number = what, stays = lasting, reads = with_reads, trace = to, full = 0;
    calls = 0;
}

static const char *name_of(char *path, int descriptor) {
    char link[64];
    snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
    return path;
}

static const char *absolute(char *buffer, int base, const char *path) {
    if (path[0] == '/')
        return path;
    size_t size = strlen(name_of(buffer, base));
    snprintf(buffer + size, PATH_MAX - size, "/%s", path);
    return buffer;
}

static const char *size_of(char *text, int descriptor) {
    struct stat found;
    snprintf(text, 32, "%lld", fstat(descriptor, &found) ? -1LL : (long long)found.st_size);
    return text;
}

static const char *size_at(char *text, const char *path) {
    struct stat found;
    snprintf(text, 32, "%lld", stat(path, &found) ? 0LL : (long long)found.st_size);
    return text;
}

static int watched(const char *path) {
    size_t size = strlen(folder);
    return size && !strncmp(path, folder, size) && (path[size] == '/' || !path[size]);
}

static enum action meet(const char *call, enum kind kind, const char *path, const char *other) {
    if (!watched(path) && !watched(other))
        return GO;
    long n = atomic_fetch_add(&calls, 1) + 1;
    if (trace >= 0)
        dprintf(trace, "%s\t%s\t%s\n", call, path, other);
    int is_full = kind == ALLOCATES && full;
    if (is_full)
        full = stays;
    int lasts = stays && at && n > at && kind >= (number == ENOSPC || number == EDQUOT ? ALLOCATES : CHANGES);
    if (is_full || (action == FAIL && (n == at || lasts))) {
        errno = is_full ? ENOSPC : number;
        return FAIL;
    }
    if (n == at && action == BEFORE)
        raise(number);
    return n == at ? action : GO;
}

static long end(enum action met, long result) {
    if (met == AFTER)
        raise(number);
    return result;
}

#define REAL(type, call, parameters)                                                                                   \
    static type(*real) parameters;                                                                                     \
    if (!real)                                                                                                         \
    real = (type(*) parameters)dlsym(RTLD_NEXT, #call)

/* A call named by paths, or by a descriptor. */
#define WRAP(call, kind, parameters, arguments, path, other)                                                           \
    int call parameters {                                                                                              \
        REAL(int, call, parameters);                                                                                   \
        char a[PATH_MAX], b[PATH_MAX] = "";                                                                            \
        (void)b;                                                                                                       \
        enum action met = meet(#call, kind, path, other);                                                              \
        return met == FAIL ? -1 : end(met, real arguments);                                                            \
    }
#define AT(base, path) absolute(a, base, path)
#define TO(base, path) absolute(b, base, path)
WRAP(rename, CHANGES, (const char *p, const char *q), (p, q), AT(AT_FDCWD, p), TO(AT_FDCWD, q))
WRAP(renameat, CHANGES, (int f, const char *p, int g, const char *q), (f, p, g, q), AT(f, p), TO(g, q))
WRAP(renameat2, CHANGES, (int f, const char *p, int g, const char *q, unsigned n), (f, p, g, q, n), AT(f, p), TO(g, q))
WRAP(mkdir, ALLOCATES, (const char *p, mode_t m), (p, m), AT(AT_FDCWD, p), "")
WRAP(mkdirat, ALLOCATES, (int f, const char *p, mode_t m), (f, p, m), AT(f, p), "")
WRAP(unlink, CHANGES, (const char *p), (p), AT(AT_FDCWD, p), "")
WRAP(unlinkat, CHANGES, (int f, const char *p, int n), (f, p, n), AT(f, p), "")
WRAP(rmdir, CHANGES, (const char *p), (p), AT(AT_FDCWD, p), "")
WRAP(ftruncate, ALLOCATES, (int f, off_t n), (f, n), name_of(a, f), "")
WRAP(ftruncate64, ALLOCATES, (int f, off_t n), (f, n), name_of(a, f), "")
WRAP(fsync, ALLOCATES, (int f), (f), name_of(a, f), size_of(b, f))
WRAP(fdatasync, ALLOCATES, (int f), (f), name_of(a, f), size_of(b, f))

#define OPEN(call, parameters, arguments, base)                                                                        \
    int call parameters {                                                                                              \
        REAL(int, call, parameters);                                                                                   \
        char a[PATH_MAX], b[PATH_MAX];                                                                                 \
        int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;                                                     \
        if (!writes && !reads)                                                                                         \
            return real arguments;                                                                                     \
        const char *name = flags & O_TRUNC ? "create" : flags & O_APPEND ? "append" : writes ? "open" : "read";        \
        const char *path = AT(base, p), *other = flags & O_APPEND ? size_at(b, path) : "";                             \
        enum action met = meet(name, writes ? ALLOCATES : CHANGES, path, other);                                       \
        return met == FAIL ? -1 : end(met, real arguments);                                                            \
    }
OPEN(open, (const char *p, int flags, mode_t m), (p, flags, m), AT_FDCWD)
OPEN(open64, (const char *p, int flags, mode_t m), (p, flags, m), AT_FDCWD)
OPEN(openat, (int f, const char *p, int flags, mode_t m), (f, p, flags, m), f)
OPEN(openat64, (int f, const char *p, int flags, mode_t m), (f, p, flags, m), f)

#define WRITE(call, parameters, arguments, half)                                                                       \
    ssize_t call parameters {                                                                                          \
        REAL(ssize_t, call, parameters);                                                                               \
        char a[PATH_MAX];                                                                                              \
        enum action met = meet(#call, ALLOCATES, name_of(a, f), "");                                                   \
        if (met == SHORT)                                                                                              \
            full = 1, half;                                                                                            \
        return met == FAIL ? -1 : end(met, real arguments);                                                            \
    }
WRITE(write, (int f, const void *p, size_t n), (f, p, n), n /= 2)
WRITE(pwrite, (int f, const void *p, size_t n, off_t o), (f, p, n, o), n /= 2)
WRITE(pwrite64, (int f, const void *p, size_t n, off_t o), (f, p, n, o), n /= 2)
WRITE(writev, (int f, const struct iovec *p, int n), (f, p, n), n = n > 1 ? n / 2 : n)

size_t fwrite(const void *p, size_t size, size_t n, FILE *f) {
    REAL(size_t, fwrite, (const void *, size_t, size_t, FILE *));
    char a[PATH_MAX];
    enum action met = meet("fwrite", ALLOCATES, name_of(a, fileno(f)), "");
    if (met == SHORT)
        full = 1, n /= 2;
    return met == FAIL ? 0 : end(met, real(p, size, n, f));
}

int fclose(FILE *f) {
    REAL(int, fclose, (FILE *));
    char a[PATH_MAX];
    enum action met = meet("fclose", ALLOCATES, name_of(a, fileno(f)), "");
    int none = met == FAIL ? open("/dev/full", O_WRONLY, 0) : -1; /* so that the last flush fails in the kernel */
    if (none >= 0)
        dup2(none, fileno(f)), close(none);
    return end(met, real(f));
}

int close(int f) {
    REAL(int, close, (int));
    char a[PATH_MAX];
    int flags = fcntl(f, F_GETFL);
    enum action met = flags >= 0 && flags & (O_WRONLY | O_RDWR) ? meet("close", CLOSES, name_of(a, f), "") : GO;
    int result = real(f);
    return met == FAIL ? errno = number, -1 : end(met, result);
}
