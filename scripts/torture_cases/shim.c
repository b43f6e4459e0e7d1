/* LD_PRELOAD: counts every call that changes files below one directory, over all processes of an operation; at the
 * n-th it kills or fails; or it logs each with its data, in the order in which they happened.
 *
 * TORTURE_SHIM names a file that is mapped by everybody (struct control, see shim.py). Not thread-safe by cleverness:
 * one mutex, shared by all processes, is held around each call while logging, and around the count otherwise.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, KILL_ALL, FAIL, LOG };
enum { WRITE = 1, TRUNCATE, SYNC, DATASYNC, CREATE, RENAME, LINK, UNLINK, MKDIR, RMDIR, SYMLINK, ZERO, NAMELESS };

struct control {
    uint64_t counter;  /* calls so far */
    uint64_t at;       /* the call that is hit; 0: none */
    int32_t action, error, sticky, leader, hits, armed;
    int32_t syncs_only;
    char prefix[256], log[256], what[64];
    pthread_mutex_t mutex;
};

static struct control *shared;
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static void ready(void) {
    const char *path = getenv("TORTURE_SHIM");
    if (shared || !path) return;
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) abort();
    void *at = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (at == MAP_FAILED) abort();
    shared = at;
}

__attribute__((constructor)) static void loaded(void) { ready(); }

static int armed(void) { return shared && __atomic_load_n(&shared->armed, __ATOMIC_SEQ_CST); }

static int below(const char *path) {
    size_t n = strlen(shared->prefix);
    return !strncmp(path, shared->prefix, n) && (path[n] == '/' || !path[n]);
}

static int path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && below(path);
}

static int path_at(int dir, const char *name, char *path) {
    char base[PATH_MAX];
    if (!strncmp(name, "/proc/self/fd/", 14)) return path_of_fd(atoi(name + 14), path);
    if (*name == '/') snprintf(path, PATH_MAX, "%s", name);
    else {
        if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else path_of_fd(dir, base);
        if (strlen(base) + strlen(name) + 2 > PATH_MAX) return 0;
        strcpy(path, base); strcat(path, "/"); strcat(path, name);
    }
    return below(path);
}

static void lock(void) { if (pthread_mutex_lock(&shared->mutex) == EOWNERDEAD) pthread_mutex_consistent(&shared->mutex); }
static void unlock(void) { pthread_mutex_unlock(&shared->mutex); }

/* Count a call. Returns 1 when it must fail (errno is set); does not return when it kills. */
static int hit(const char *what, int is_sync) {
    if (shared->syncs_only && !is_sync) return 0;
    lock();
    uint64_t n = ++shared->counter;
    if (!shared->leader) shared->leader = getpid(); /* the first to write anything is diskchain itself */
    int now = shared->at && (n == shared->at || (shared->sticky && n > shared->at));
    if (now && !shared->hits++) snprintf(shared->what, sizeof shared->what, "%s %s", getpid() == shared->leader ? "own" : "child", what);
    int leader = shared->leader, action = shared->action;
    unlock();
    if (!now) return 0;
    if (action == KILL_ALL && leader != getpid()) kill(leader, SIGKILL);
    if (action == KILL || action == KILL_ALL)
        for (;;) kill(getpid(), SIGKILL);
    if (action != FAIL) return 0;
    errno = shared->error;
    return 1;
}

struct record { uint32_t size, kind; uint64_t inode; int64_t offset, length, mtime; uint32_t path, other; };

static void note(int kind, uint64_t inode, int64_t offset, int64_t length, int64_t mtime, const char *path, const char *other,
                 const struct iovec *data, int count) {
    if (log_fd < 0) log_fd = syscall(SYS_openat, AT_FDCWD, shared->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    struct record r = {0, kind, inode, offset, length, mtime, path ? strlen(path) : 0, other ? strlen(other) : 0};
    struct iovec all[IOV_MAX] = {{&r, sizeof r}, {(void *)path, r.path}, {(void *)other, r.other}};
    int used = 3;
    for (int i = 0; i < count; i++) all[used++] = data[i];
    size_t size = 0;
    for (int i = 0; i < used; i++) size += all[i].iov_len;
    r.size = size;
    if (syscall(SYS_writev, log_fd, all, used) != (ssize_t)size) abort();
}

static void note_fd(int kind, int fd, int64_t offset, int64_t length, const struct iovec *data, int count) {
    struct stat s;
    if (fstat(fd, &s)) return;
    note(kind, s.st_ino, offset, length, s.st_mtim.tv_sec * 1000000000LL + s.st_mtim.tv_nsec, NULL, NULL, data, count);
}

/* What really was written, read back: the data may lie in many pieces, or have been copied by the kernel. */
static void note_written(int fd, int64_t offset, int64_t length) {
    char link[64], *data = malloc(length ? length : 1);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int in = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
    if (in < 0 || !data) abort();
    for (int64_t done = 0; done < length;) {
        ssize_t n = syscall(SYS_pread64, in, data + done, length - done, offset + done);
        if (n <= 0) abort();
        done += n;
    }
    syscall(SYS_close, in);
    struct iovec v = {data, length};
    note_fd(WRITE, fd, offset, length, &v, 1);
    free(data);
}

#define GATE(fd, what, sync, fail, call) \
    char path_[PATH_MAX]; \
    if (!armed() || !path_of_fd(fd, path_)) return call; \
    if (shared->action != LOG) return hit(what, sync) ? fail : call; \
    lock(); \
    __typeof__(call) got_ = call; \
    int saved_ = errno

#define DONE unlock(); errno = saved_; return got_

#define WRITES(name, where, params, args) \
    ssize_t name params { \
        GATE(fd, #name, 0, -1, REAL(name) args); \
        if (got_ > 0) note_written(fd, where, got_); \
        DONE; \
    }
#define HERE (lseek(fd, 0, SEEK_CUR) - got_)

WRITES(write, HERE, (int fd, const void *b, size_t n), (fd, b, n))
WRITES(writev, HERE, (int fd, const struct iovec *v, int c), (fd, v, c))
WRITES(pwrite, o, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
WRITES(pwrite64, o, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
WRITES(pwritev, o, (int fd, const struct iovec *v, int c, off_t o), (fd, v, c, o))
WRITES(pwritev64, o, (int fd, const struct iovec *v, int c, off64_t o), (fd, v, c, o))
WRITES(pwritev2, o, (int fd, const struct iovec *v, int c, off_t o, int f), (fd, v, c, o, f))
WRITES(pwritev64v2, o, (int fd, const struct iovec *v, int c, off64_t o, int f), (fd, v, c, o, f))
WRITES(sendfile, HERE, (int fd, int in, off_t *o, size_t n), (fd, in, o, n))
WRITES(sendfile64, HERE, (int fd, int in, off64_t *o, size_t n), (fd, in, o, n))

ssize_t copy_file_range(int in, off64_t *from, int fd, off64_t *to, size_t n, unsigned flags) {
    int64_t where = to ? *to : lseek(fd, 0, SEEK_CUR);
    GATE(fd, "copy_file_range", 0, -1, REAL(copy_file_range)(in, from, fd, to, n, flags));
    if (got_ > 0) note_written(fd, where, got_);
    DONE;
}

#define SYNCS(name, kind) \
    int name(int fd) { \
        GATE(fd, #name, 1, -1, REAL(name)(fd)); \
        if (!got_) note_fd(kind, fd, 0, 0, NULL, 0); \
        DONE; \
    }
SYNCS(fsync, SYNC)
SYNCS(fdatasync, DATASYNC)

int sync_file_range(int fd, off64_t o, off64_t n, unsigned f) { /* promises nothing: not logged */
    GATE(fd, "sync_file_range", 1, -1, REAL(sync_file_range)(fd, o, n, f));
    DONE;
}

#define TRUNCATES(name, type) \
    int name(int fd, type n) { \
        GATE(fd, #name, 0, -1, REAL(name)(fd, n)); \
        if (!got_) note_fd(TRUNCATE, fd, 0, n, NULL, 0); \
        DONE; \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

static void note_allocated(int fd, int mode, int64_t o, int64_t n) {
    struct stat s;
    if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) note_fd(ZERO, fd, o, n, NULL, 0);
    if (!(mode & FALLOC_FL_KEEP_SIZE) && !fstat(fd, &s)) note_fd(TRUNCATE, fd, 0, s.st_size, NULL, 0);
}
#define ALLOCATES(name, type) \
    int name(int fd, int mode, type o, type n) { \
        GATE(fd, #name, 0, -1, REAL(name)(fd, mode, o, n)); \
        if (!got_) note_allocated(fd, mode, o, n); \
        DONE; \
    }
ALLOCATES(fallocate, off_t)
ALLOCATES(fallocate64, off64_t)
#define RESERVES(name, type) \
    int name(int fd, type o, type n) { \
        GATE(fd, #name, 0, errno, REAL(name)(fd, o, n)); \
        if (!got_) note_allocated(fd, 0, o, n); \
        DONE; \
    }
RESERVES(posix_fallocate, off_t)
RESERVES(posix_fallocate64, off64_t)

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *arg = va_arg(list, void *);
    va_end(list);
    if (request != FICLONE && request != FICLONERANGE) return REAL(ioctl)(fd, request, arg);
    struct stat s;
    GATE(fd, "clone", 0, -1, REAL(ioctl)(fd, request, arg));
    if (!got_ && !fstat(fd, &s)) note_written(fd, 0, s.st_size);
    DONE;
}

/* -- names */

static int64_t inode_of(const char *path) {
    struct stat s;
    return lstat(path, &s) ? 0 : (int64_t)s.st_ino;
}

static int opened(const char *symbol, int dir, const char *name, int flags, mode_t mode) {
    typedef int (*plain)(const char *, int, ...);
    typedef int (*at)(int, const char *, int, ...);
    int is_at = strstr(symbol, "at") != NULL;
#define CALL (is_at ? ((at)real(symbol))(dir, name, flags, mode) : ((plain)real(symbol))(name, flags, mode))
    char path[PATH_MAX];
    int nameless = (flags & O_TMPFILE) == O_TMPFILE;
    if (!armed() || !(nameless || flags & (O_CREAT | O_TRUNC)) || !path_at(dir, name, path)) return CALL;
    if (nameless) {
        int got = CALL;
        if (got >= 0 && shared->action == LOG) {
            lock();
            note_fd(NAMELESS, got, 0, 0, NULL, 0);
            unlock();
        }
        return got;
    }
    int64_t before = inode_of(path);
    if (!before ? !(flags & O_CREAT) : !(flags & O_TRUNC)) return CALL;
    if (shared->action != LOG) return hit("open", 0) ? -1 : CALL;
    lock();
    before = inode_of(path);
    int got = CALL, saved = errno;
    if (got >= 0 && !before) note(CREATE, inode_of(path), 0, mode & 07777, 0, path, NULL, NULL, 0);
    else if (got >= 0) note_fd(TRUNCATE, got, 0, 0, NULL, 0);
    unlock();
    errno = saved;
    return got;
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); }
int open(const char *name, int flags, ...) { MODE return opened("open", AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return opened("open64", AT_FDCWD, name, flags, mode); }
int openat(int dir, const char *name, int flags, ...) { MODE return opened("openat", dir, name, flags, mode); }
int openat64(int dir, const char *name, int flags, ...) { MODE return opened("openat64", dir, name, flags, mode); }
int creat(const char *name, mode_t mode) { return opened("open", AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return opened("open64", AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define NAMES(what, kind, dir, name, dir2, name2, before, call) \
    char path_[PATH_MAX], other_[PATH_MAX] = ""; \
    if (!armed() || !path_at(dir, name, path_)) return call; \
    if (name2) path_at(dir2, name2, other_); \
    if (shared->action != LOG) return hit(what, 0) ? -1 : call; \
    lock(); \
    int64_t inode_ = before ? inode_of(path_) : 0; \
    int got_ = call, saved_ = errno; \
    if (!got_) note(kind, before ? inode_ : inode_of(path_), 0, 0, 0, path_, other_, NULL, 0); \
    DONE

static const char *const none;
int rename(const char *a, const char *b) { NAMES("rename", RENAME, AT_FDCWD, a, AT_FDCWD, b, 1, REAL(rename)(a, b)); }
int renameat(int d, const char *a, int e, const char *b) { NAMES("rename", RENAME, d, a, e, b, 1, REAL(renameat)(d, a, e, b)); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    NAMES("rename", RENAME, d, a, e, b, 1, REAL(renameat2)(d, a, e, b, f));
}
int link(const char *a, const char *b) { NAMES("link", LINK, AT_FDCWD, a, AT_FDCWD, b, 1, REAL(link)(a, b)); }
int linkat(int d, const char *a, int e, const char *b, int f) { NAMES("link", LINK, d, a, e, b, 1, REAL(linkat)(d, a, e, b, f)); }
int unlink(const char *a) { NAMES("unlink", UNLINK, AT_FDCWD, a, AT_FDCWD, none, 1, REAL(unlink)(a)); }
int unlinkat(int d, const char *a, int f) {
    NAMES("unlink", f & AT_REMOVEDIR ? RMDIR : UNLINK, d, a, AT_FDCWD, none, 1, REAL(unlinkat)(d, a, f));
}
int rmdir(const char *a) { NAMES("rmdir", RMDIR, AT_FDCWD, a, AT_FDCWD, none, 1, REAL(rmdir)(a)); }
int mkdir(const char *a, mode_t m) { NAMES("mkdir", MKDIR, AT_FDCWD, a, AT_FDCWD, none, 0, REAL(mkdir)(a, m)); }
int mkdirat(int d, const char *a, mode_t m) { NAMES("mkdir", MKDIR, d, a, AT_FDCWD, none, 0, REAL(mkdirat)(d, a, m)); }
int symlink(const char *a, const char *b) { NAMES("symlink", SYMLINK, AT_FDCWD, b, AT_FDCWD, a, 0, REAL(symlink)(a, b)); }

/* Whoever maps the file first makes the mutex. */
void torture_prepare(const char *path) {
    setenv("TORTURE_SHIM", path, 1);
    shared = NULL;
    ready();
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&shared->mutex, &a);
}
