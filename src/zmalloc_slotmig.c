/* zmalloc_slotmig.c -- a part of zmalloc.c: threads that end give their counter back, what an
 * allocation takes is known by its size, a thread that loads has its pages made many at
 * once, and memory that many keys leave goes back to the system.
 *
 * Each thread counts what it allocates in a counter of its own, of 16, and so the sum is cheap: it is
 * made for every command. Upstream's threads live as long as the server. Those of a slot migration do not:
 * after ten of them all 16 would be summed for ever, and every 16th thread would share the
 * main thread's.
 *
 * Any thread. Counters are never cleared: a thread may free what another one has allocated.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include <pthread.h>
#include <errno.h>

/* ---- counters ---- */

static unsigned idle_indexes;       /* bits: of threads that have ended; atomic */
static pthread_key_t index_key;     /* of each thread: its index, plus one */
static int has_index_key;

/* As the thread ends. Should it allocate even then, it takes another one, and this is called again. */
static void giveIndexBack(void *index_plus_one) {
    my_thread_index = -1;
    __atomic_fetch_or(&idle_indexes,1u << ((long)index_plus_one-1),__ATOMIC_RELAXED);
}

static void makeIndexKey(void) {
    has_index_key = pthread_key_create(&index_key,giveIndexBack) == 0;
}

static __attribute__((noinline,cold)) long takeThreadIndex(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    unsigned idle = __atomic_load_n(&idle_indexes,__ATOMIC_RELAXED);
    long index;
    pthread_once(&once,makeIndexKey);
    while (idle && !__atomic_compare_exchange_n(&idle_indexes,&idle,idle & (idle-1),0,__ATOMIC_RELAXED,__ATOMIC_RELAXED)) continue;
    if (idle) {
        index = __builtin_ctz(idle);
    } else {
        atomicGetIncr(num_active_threads,index,1);
        if (index >= MAX_THREADS) return 1 + index % (MAX_THREADS-1);   /* another one's, which it may not give back; not the main thread's */
    }
    if (has_index_key) pthread_setspecific(index_key,(void*)(index+1));
    return index;
}

/* ---- what an allocation takes ---- */

#if defined(USE_JEMALLOC) && !defined(USE_SYSTEM_JEMALLOC)

/* Every allocation is counted with what it takes. The allocator tells that by the place, too, but looks
 * it up in memory for it; of a size asked for it is one of its classes. So with free(), which is
 * told the size that zfree() needs anyway. */
#define SMALL_SIZE 4096
static uint16_t size_classes[SMALL_SIZE/8+1];       /* of so many units of 8 bytes; only read from main() on */

__attribute__((constructor)) static void fillSizeClasses(void) {
    for (size_t size = 8; size <= SMALL_SIZE; size += 8) size_classes[size/8] = je_nallocx(size,0);
}

/* Of `ptr`, that malloc() gave for `size`, or for the least there is if that is 0. */
static inline size_t allocatedSize(void *ptr, size_t size) {
    UNUSED(ptr);
    size = MALLOC_MIN_SIZE(size);
    return likely(size <= SMALL_SIZE) ? size_classes[(size+7)/8] : je_nallocx(size,0);
}

#define freeSized(ptr,size) je_sdallocx(ptr,size,0)     /* `size` is zmalloc_size(ptr) */

#else

#define allocatedSize(ptr,size) zmalloc_size(ptr)
#define freeSized(ptr,size) free(ptr)

#endif

/* ---- pages, many at once ---- */

#if defined(USE_JEMALLOC) && !defined(USE_SYSTEM_JEMALLOC) && defined(__linux__)

#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
#endif

/* A thread that loads gigabytes spends a third of its time in faults of fresh pages, half of that on
 * the way there and back. jemalloc takes its memory as address space first and *commits*
 * what it uses; hooks of the thread's arena make the pages then, to the next multiple
 * of POPULATE_BYTES. What is made beyond is used next, as a rule; if not, it is this little. It may
 * belong to something else: then it is there, or is made for that, and nothing of it changes.
 *
 * Where the system lets a program ask for huge pages (transparent_hugepage/enabled is `madvise`), and the
 * thread comes to the beginning of one in memory that it took itself, it is made as a whole: the
 * loader then has a quarter of the faults' cost left, and a fork copies one entry instead of 512. What made
 * them disliked is over since Linux 5.8, older than MADV_POPULATE_WRITE: a write
 * after a fork copies 4 KB of it, not 2 MB. They are made here only, never by the system behind our back,
 * which would fill again what was given back to it: hence MADV_NOHUGEPAGE afterwards.
 *
 * Where it cannot be done, pages are made one by one, as ever. The arena's growth is locked
 * meanwhile, hence at most POPULATE_MAX of one allocation, of huge ones POPULATE_MAX_HUGE, and never the main
 * thread's arena. The hooks run on any thread that uses that arena, and on the allocator's own; what they
 * share is only read once it is set. */
#define POPULATE_BYTES (64*1024)
#define POPULATE_MAX (256*1024)
#define HUGE_PAGE (2*1024*1024)
#define POPULATE_MAX_HUGE (4*HUGE_PAGE)

static __thread int populates, huge_pages;
static __thread char *populated_from, *populated_to;
static __thread char *taken_from, *taken_to;            /* address space, the last time */
static extent_hooks_t *plain_hooks, populating_hooks;   /* NULL: not to be changed; set once */

static void *allocUncommitted(extent_hooks_t *hooks, void *addr, size_t size, size_t alignment, bool *zero, bool *commit, unsigned arena) {
    UNUSED(hooks);
    bool wanted = *commit;
    void *p = plain_hooks->alloc(plain_hooks,addr,size,alignment,zero,commit,arena);
    if (p && !wanted) *commit = false;
    taken_from = p;
    taken_to = p ? taken_from+size : NULL;
    return p;
}

static inline char *roundUp(char *p, size_t unit) {
    return (char*)(((uintptr_t)p + unit-1) & ~(uintptr_t)(unit-1));
}

static void populate(char *from, char *to, char *ahead) {
    /* What is ahead may be a guard of something else: EINVAL. So it is of a system that knows no such advice. */
    if (madvise(from,ahead-from,MADV_POPULATE_WRITE) == -1 && errno == EINVAL &&
        (to == ahead || (madvise(from,to-from,MADV_POPULATE_WRITE) == -1 && errno == EINVAL))) populates = 0;
}

static inline int mayBeHuge(const char *at) {
    return huge_pages && at >= taken_from && at+HUGE_PAGE <= taken_to;
}

static void populateHuge(char *at) {
    if (madvise(at,HUGE_PAGE,MADV_HUGEPAGE) == -1) {
        huge_pages = 0;     /* a kernel without them */
        return;
    }
    if (madvise(at,HUGE_PAGE,MADV_POPULATE_WRITE) == -1 && errno == EINVAL) populates = 0;
    madvise(at,HUGE_PAGE,MADV_NOHUGEPAGE);
}

static bool commitPopulated(extent_hooks_t *hooks, void *addr, size_t size, size_t offset, size_t length, unsigned arena) {
    UNUSED(hooks); UNUSED(size); UNUSED(arena);
    if (!populates) return false;
    char *from = (char*)addr+offset, *to = from+length;
    if (from < populated_from || from > populated_to) populated_from = populated_to = from;     /* somewhere else */
    int error = errno;
    for (char *start = populated_to; populated_to < to && populates; ) {
        char *at = populated_to, *huge = roundUp(at,HUGE_PAGE);
        int is_huge = mayBeHuge(huge);
        if (at-start >= (is_huge ? POPULATE_MAX_HUGE : POPULATE_MAX)) break;
        if (at == huge && is_huge) {
            populateHuge(at);
            populated_to = at+HUGE_PAGE;
            continue;
        }
        char *end = to-at > POPULATE_MAX ? at+POPULATE_MAX : to;
        if (is_huge && end > huge) end = huge;
        populated_to = roundUp(end,POPULATE_BYTES);
        populate(at,end,populated_to);
    }
    errno = error;
    return false;
}

static bool decommit(extent_hooks_t *hooks, void *addr, size_t size, size_t offset, size_t length, unsigned arena) {
    UNUSED(hooks);
    return plain_hooks->purge_forced == NULL || plain_hooks->purge_forced(plain_hooks,addr,size,offset,length,arena);
}

/* The same for each arena: what their hooks are before. Where the system does not overcommit, a
 * commit is more than that, and left alone: memory comes committed only where it does. */
static void makePopulatingHooks(void) {
    extent_hooks_t *hooks;
    size_t page, len = sizeof(hooks);
    bool zero = false, committed = false;
    if (je_mallctl("arena.0.extent_hooks",&hooks,&len,NULL,0)) return;
    len = sizeof(page);
    if (je_mallctl("arenas.page",&page,&len,NULL,0) || !hooks->destroy) return;
    void *probe = hooks->alloc(hooks,NULL,page,page,&zero,&committed,0);
    if (probe == NULL) return;
    hooks->destroy(hooks,probe,page,committed,0);
    if (!committed) return;
    plain_hooks = hooks;
    populating_hooks = *hooks;
    populating_hooks.alloc = allocUncommitted;
    populating_hooks.commit = commitPopulated;
    populating_hooks.decommit = decommit;
}

/* This thread will allocate and fill much memory: until it ends. The hooks stay with its
 * arena, for the next one; other threads that allocate there are not concerned. */
void zmallocPopulates(int with_huge_pages) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    extent_hooks_t *now, *ours = &populating_hooks;
    unsigned arena;
    char name[64];
    size_t len = sizeof(arena);
    pthread_once(&once,makePopulatingHooks);
    if (plain_hooks == NULL || je_mallctl("thread.arena",&arena,&len,NULL,0) || arena == 0) return;
    snprintf(name,sizeof(name),"arena.%u.extent_hooks",arena);
    len = sizeof(now);
    if (je_mallctl(name,&now,&len,NULL,0)) return;
    if (now == plain_hooks && je_mallctl(name,NULL,NULL,&ours,sizeof(ours))) return;
    populates = now == plain_hooks || now == ours;
    huge_pages = with_huge_pages;
}

#else

void zmallocPopulates(int with_huge_pages) { UNUSED(with_huge_pages); }

#endif

/* ---- memory that is not needed any more ---- */

#define DIRTY_MAX (8*1024*1024)     /* bytes that the allocator may keep */
#define DIRTY_TRIES 200

#ifdef USE_JEMALLOC

/* Bytes that are free, but not the system's yet. */
static size_t dirtyBytes(void) {
    uint64_t epoch = 1;
    size_t pages = 0, page = 0, len = sizeof(epoch);
    char name[64];
    je_mallctl("epoch",&epoch,&len,&epoch,len);
    snprintf(name,sizeof(name),"stats.arenas.%u.pdirty",MALLCTL_ARENAS_ALL);
    len = sizeof(size_t);
    return je_mallctl(name,&pages,&len,NULL,0) || je_mallctl("arenas.page",&page,&len,NULL,0) ? 0 : pages*page;
}

#else

static size_t dirtyBytes(void) {
    return 0;
}

#endif

/* Memory that was freed goes back to the system at once, as after a FLUSHALL; the allocator
 * keeps it for about 10 s else. It is asked again while its own thread is at it, for then it
 * does nothing: up to DIRTY_TRIES ms. Any thread but the main one. */
void zmallocGiveBack(void) {
    for (int i = 0; i < DIRTY_TRIES; i++) {
        jemalloc_purge();
        if (dirtyBytes() <= DIRTY_MAX) return;
        usleep(1000);
    }
}
