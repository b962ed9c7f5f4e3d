// Preloaded into a process, it logs what changes the files under $SHIM_ROOT into $SHIM_LOG, in order, or makes it fail.
//
// A record: a letter, three int64, two lengths (int64) and as many bytes.
//   C ino 0 0 path            a file was created          D ino 0 0 path      a folder was
//   W ino offset 0 data       written                     T ino size 0        truncated
//   S ino 0 0                 synced (file or folder)     L ino 0 0 path      a name was linked to it
//   R 0 0 0 old new           renamed                     U 0 0 0 path        a name was removed
//   M 0 0 0 text              the program opened "/mark/<text>"
// Calls are logged when they are done, except that S is when it begins: nothing later is taken to be synced by it.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FDS 65536

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char ours[FDS];  // descriptors of what lies under the root
static int fault_number;
static long fault_after = -1, fault_count;

// From the `after`-th call on, `count` of them that would change a file fail with `number`. After < 0: none.
void shim_fault(int number, long after, long count) {
  pthread_mutex_lock(&mutex);
  fault_number = number, fault_after = after, fault_count = count;
  pthread_mutex_unlock(&mutex);
}

static int fails(void) {
  int failing = 0;
  pthread_mutex_lock(&mutex);
  if (fault_after == 0 && fault_count > 0) failing = 1, --fault_count;
  if (fault_after > 0) --fault_after;
  pthread_mutex_unlock(&mutex);
  if (failing) errno = fault_number;
  return failing;
}

static int under(const char* path) {
  const char* root = getenv("SHIM_ROOT");
  const size_t size = root ? strlen(root) : 0;
  return size && !strncmp(path, root, size) && (path[size] == '/' || !path[size]);
}

static void resolve(int folder, const char* path, char* out) {
  char link[64];
  ssize_t size = 0;
  if (path[0] != '/') {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    size = folder == AT_FDCWD ? (getcwd(out, PATH_MAX) ? (ssize_t)strlen(out) : 0) : readlink(link, out, PATH_MAX);
    if (size < 0) size = 0;
    out[size++] = '/';
  }
  snprintf(out + size, PATH_MAX - size, "%s", path);
}

static void record(char letter, int64_t a, int64_t b, const void* first, int64_t n, const void* second, int64_t m) {
  static int file = -1;
  const int64_t head[5] = {a, b, 0, n, m};
  const int error = errno;
  if (file < 0 && getenv("SHIM_LOG")) {
    file = REAL(open)(getenv("SHIM_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  }
  if (file >= 0) {
    __typeof__(&write) out = REAL(write);
    if (out(file, &letter, 1) + out(file, head, sizeof head) + out(file, first, n) + out(file, second, m) < 0) abort();
  }
  errno = error;
}

static int64_t inode(int file) {
  struct stat of;
  return fstat(file, &of) ? -1 : (int64_t)of.st_ino;
}

static int opened(int folder, const char* path, int flags, mode_t mode) {
  char full[PATH_MAX];
  resolve(folder, path, full);
  if (!strncmp(full, "/mark/", 6)) {
    pthread_mutex_lock(&mutex);
    record('M', 0, 0, full + 6, strlen(full + 6), "", 0);
    pthread_mutex_unlock(&mutex);
    errno = ENOENT;
    return -1;
  }
  const int mine = under(full);
  if (mine && (flags & O_CREAT) && fails()) return -1;
  if (mine) pthread_mutex_lock(&mutex);
  struct stat of;
  const int created = mine && (flags & O_CREAT) && lstat(full, &of);
  const int file = REAL(openat)(folder, path, flags, mode);
  if (file >= 0 && file < FDS) ours[file] = mine;
  if (mine) {
    if (file >= 0 && created) record('C', inode(file), 0, full, strlen(full), "", 0);
    if (file >= 0 && !created && (flags & O_TRUNC)) record('T', inode(file), 0, "", 0, "", 0);
    pthread_mutex_unlock(&mutex);
  }
  return file;
}

#define MODE                            \
  mode_t mode = 0;                      \
  if (flags & O_CREAT) {                \
    va_list list;                       \
    va_start(list, flags);              \
    mode = va_arg(list, mode_t);        \
    va_end(list);                       \
  }
int open(const char* path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char* path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char* path, int flags, ...) { MODE return opened(folder, path, flags, mode); }

#define CHANGE(file, call, letter, a, data, size)                                        \
  if (file < 0 || file >= FDS || !ours[file]) return call;                               \
  if (fails()) return -1;                                                                \
  pthread_mutex_lock(&mutex);                                                            \
  const ssize_t done = call;                                                             \
  if (done >= 0) record(letter, inode(file), a, data, size, "", 0);                      \
  pthread_mutex_unlock(&mutex);                                                          \
  return done;

ssize_t write(int file, const void* data, size_t size) {
  CHANGE(file, REAL(write)(file, data, size), 'W', lseek(file, 0, SEEK_CUR) - done, data, done)
}
ssize_t pwrite(int file, const void* data, size_t size, off_t at) {
  CHANGE(file, REAL(pwrite)(file, data, size, at), 'W', at, data, done)
}
ssize_t pwrite64(int file, const void* data, size_t size, off_t at) { return pwrite(file, data, size, at); }
int ftruncate(int file, off_t size) { CHANGE(file, REAL(ftruncate)(file, size), 'T', size, "", 0) }
int ftruncate64(int file, off_t size) { return ftruncate(file, size); }

// Refused: those who call them then write.
ssize_t sendfile(int out, int in, off_t* at, size_t size) { errno = ENOTSOCK; return -1; }
ssize_t sendfile64(int out, int in, off_t* at, size_t size) { errno = ENOTSOCK; return -1; }
ssize_t copy_file_range(int in, off_t* from, int out, off_t* at, size_t size, unsigned flags) {
  errno = ENOSYS;
  return -1;
}

static int synced(int file, int (*call)(int)) {
  if (file < 0 || file >= FDS || !ours[file]) return call(file);
  if (fails()) return -1;
  pthread_mutex_lock(&mutex);
  record('S', inode(file), 0, "", 0, "", 0);
  const int done = call(file);
  pthread_mutex_unlock(&mutex);
  return done;
}
int fsync(int file) { return synced(file, REAL(fsync)); }
int fdatasync(int file) { return synced(file, REAL(fdatasync)); }

#define NAME(folder, path, call, letter, ino)                                            \
  char full[PATH_MAX];                                                                   \
  resolve(folder, path, full);                                                           \
  if (!under(full)) return call;                                                         \
  if (letter != 'U' && fails()) return -1;                                               \
  pthread_mutex_lock(&mutex);                                                            \
  struct stat of = {0};                                                                  \
  const int done = call;                                                                 \
  if (!done) lstat(full, &of), record(letter, ino, 0, full, strlen(full), "", 0);        \
  pthread_mutex_unlock(&mutex);                                                          \
  return done;

int mkdir(const char* path, mode_t mode) { NAME(AT_FDCWD, path, REAL(mkdir)(path, mode), 'D', of.st_ino) }
int rmdir(const char* path) { NAME(AT_FDCWD, path, REAL(rmdir)(path), 'U', 0) }
int unlink(const char* path) { NAME(AT_FDCWD, path, REAL(unlink)(path), 'U', 0) }
int unlinkat(int folder, const char* path, int flags) {
  NAME(folder, path, REAL(unlinkat)(folder, path, flags), 'U', 0)
}
int link(const char* old, const char* path) { NAME(AT_FDCWD, path, REAL(link)(old, path), 'L', of.st_ino) }
int linkat(int from, const char* old, int folder, const char* path, int flags) {
  NAME(folder, path, REAL(linkat)(from, old, folder, path, flags), 'L', of.st_ino)
}
int rename(const char* old, const char* path) {
  if (!under(old)) return REAL(rename)(old, path);
  if (fails()) return -1;
  pthread_mutex_lock(&mutex);
  const int done = REAL(rename)(old, path);
  if (!done) record('R', 0, 0, old, strlen(old), path, strlen(path));
  pthread_mutex_unlock(&mutex);
  return done;
}
