/* lies.h - included before each file of the core (-include): each load of shared memory asks lie() what is there, each store is checked for whether the
 * bytes are the node's own, and the kernel is a fake. The core itself knows nothing of it. */
#ifndef LIES_H
#define LIES_H

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The fences, and what goes with them, are those of the core; not how memory is touched. */
#define sh_load sh_honest_load
#define sh_peek sh_honest_peek
#define sh_store sh_honest_store
#define sh_put sh_honest_put
#define sh_copy_out sh_honest_copy_out
#define sh_copy_in sh_honest_copy_in
#define sh_cas sh_honest_cas
#include "atomics.h"
#undef sh_load
#undef sh_peek
#undef sh_store
#undef sh_put
#undef sh_copy_out
#undef sh_copy_in
#undef sh_cas

uint64_t lie(const uint64_t *p, uint64_t truth);
void lie_in_copy(const void *from, void *copy, uint32_t n);
void may_store(const void *at, uint64_t n);

static inline uint64_t sh_load(const uint64_t *p, int wc) { return lie(p, sh_honest_load(p, wc)); }
static inline uint64_t sh_peek(const uint64_t *p) { return lie(p, sh_honest_peek(p)); }
static inline void sh_store(uint64_t *p, uint64_t v, int wc)
{
    may_store(p, sizeof *p);
    sh_honest_store(p, v, wc);
}
static inline void sh_put(uint64_t *p, uint64_t v)
{
    may_store(p, sizeof *p);
    sh_honest_put(p, v);
}
static inline void sh_copy_out(void *to, const void *from, uint32_t n)
{
    may_store(to, n);
    sh_honest_copy_out(to, from, n);
}
static inline void sh_copy_in(void *to, const void *from, uint32_t n)
{
    sh_honest_copy_in(to, from, n);
    lie_in_copy(from, to, n);
}
static inline int sh_cas(uint64_t *p, uint64_t old, uint64_t new_) { return sh_honest_cas(p, old, new_); }

/* ---- the kernel ---- */

int fake_clock_gettime(clockid_t clock, struct timespec *t);
int fake_sched_yield(void);
int fake_poll(struct pollfd *fds, nfds_t n, int timeout);
long fake_syscall(long number, ...);
ssize_t fake_write(int fd, const void *from, size_t n);
ssize_t fake_read(int fd, void *to, size_t n);
ssize_t fake_pread(int fd, void *to, size_t n, off_t at);
ssize_t fake_pwrite(int fd, const void *from, size_t n, off_t at);
ssize_t fake_recv(int fd, void *to, size_t n, int flags);
ssize_t fake_send(int fd, const void *from, size_t n, int flags);
ssize_t fake_preadv2(int fd, const struct iovec *v, int n, off_t at, int flags);
int fake_fcntl(int fd, int command, struct flock *lock);
int fake_fstat(int fd, struct stat *s);
int fake_madvise(void *at, size_t n, int advice);
int fake_posix_fallocate(int fd, off_t at, off_t n);
int fake_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *arg);
int fake_pthread_join(pthread_t t, void **result);
int fake_pthread_setname_np(pthread_t t, const char *name);
int fake_pthread_sigmask(int how, const sigset_t *set, sigset_t *old);
int fake_prctl(int what, unsigned long value);

#define clock_gettime fake_clock_gettime
#define sched_yield fake_sched_yield
#define poll fake_poll
#define syscall fake_syscall
#define write fake_write
#define read fake_read
#define pread fake_pread
#define pwrite fake_pwrite
#define recv fake_recv
#define send fake_send
#define preadv2 fake_preadv2
#define fcntl fake_fcntl
#define fstat fake_fstat
#define madvise fake_madvise
#define posix_fallocate fake_posix_fallocate
#define pthread_create fake_pthread_create
#define pthread_join fake_pthread_join
#define pthread_setname_np fake_pthread_setname_np
#define pthread_sigmask fake_pthread_sigmask
#define prctl fake_prctl

#endif
