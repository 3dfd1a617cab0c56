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
#include <time.h>

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
#include <sys/prctl.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
#endif

/* A thread that loads gigabytes spends a third of its time in faults of fresh pages, half of that on
 * the way there and back. jemalloc takes its memory as address space first and *commits*
 * what it uses; hooks of the thread's arena make the pages then, to the next multiple
 * of POPULATE_BYTES. What is made beyond is used next, as a rule; if not, it is this little. It may
 * belong to something else: then it is there, or is made for that, and nothing of it changes.
 * Where it cannot be done, pages are made one by one, as ever. The arena's growth is locked
 * meanwhile, hence POPULATE_MAX of one allocation, and never the main thread's arena.
 *
 * Where a program may ask for huge pages, the address space that the thread takes is to have such, for as
 * long as it takes from there: the first page then makes its whole 2 MB. That saves most of
 * what is left of the faults, and a fork has a part of the pages to copy. Not for longer, or the system would
 * fill again what was given back to it. One advice for all of an address space, never one for
 * each page: parts that differ for a moment stay apart for ever, and there may be 65530.
 *
 * A huge page takes some tenths of a millisecond. It takes several where the system does not have the memory yet: the
 * host of a virtual machine is given back what lies free there, in pieces as large as these (free page reporting),
 * while there may be plenty of small pages at hand. If most of PAGES_JUDGED are so slow, the rest comes in small ones.
 *
 * The hooks run on any thread that uses that arena, and on the allocator's own; what they
 * share is only read once it is set. */
#define POPULATE_BYTES (64*1024)
#define POPULATE_MAX (256*1024)
#define HUGE_PAGE (2*1024*1024)
#define PAGES_JUDGED 8

static __thread int populates, wants_huge_pages, gave_up_huge_pages;
static __thread long long patience;                     /* us for a huge page; 0: any */
static __thread size_t judged;                          /* bytes, and how many pages of these took longer */
static __thread int slow_pages;
static __thread char *populated_from, *populated_to;
static __thread char *huge_from, *huge_to;              /* is to have huge pages now */
static int has_huge_pages;                              /* atomic: there was any such space */
static extent_hooks_t *plain_hooks, populating_hooks;   /* NULL: not to be changed; set once */

static void endHugePages(void) {
    if (huge_from < huge_to) madvise(huge_from,huge_to-huge_from,MADV_NOHUGEPAGE);
    huge_from = huge_to = NULL;
}

/* In address space that was just taken. */
static void beginHugePages(char *from, size_t size) {
    endHugePages();
    huge_from = (char*)(((uintptr_t)from + HUGE_PAGE-1) & ~(uintptr_t)(HUGE_PAGE-1));
    huge_to = (char*)(((uintptr_t)from + size) & ~(uintptr_t)(HUGE_PAGE-1));
    if (huge_from < huge_to && madvise(huge_from,huge_to-huge_from,MADV_HUGEPAGE) == 0) atomicSet(has_huge_pages,1);
    else huge_from = huge_to = NULL;
}

static void *allocUncommitted(extent_hooks_t *hooks, void *addr, size_t size, size_t alignment, bool *zero, bool *commit, unsigned arena) {
    UNUSED(hooks);
    bool wanted = *commit;
    void *p = plain_hooks->alloc(plain_hooks,addr,size,alignment,zero,commit,arena);
    if (p && !wanted) *commit = false;
    int error = errno;
    if (p && wants_huge_pages) beginHugePages(p,size);
    errno = error;
    return p;
}

static long long clockUs(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC,&t);
    return t.tv_sec*1000000LL + t.tv_nsec/1000;
}

/* One may be slow for want of a processor; not most of them. */
static void judgeHugePages(size_t bytes, long long us) {
    slow_pages += us > patience;
    if ((judged += bytes) < PAGES_JUDGED*HUGE_PAGE) return;
    if (slow_pages > PAGES_JUDGED/2) {
        gave_up_huge_pages = 1;
        wants_huge_pages = 0;
        endHugePages();
    }
    judged = slow_pages = 0;
}

static void populate(char *from, char *to, char *ahead) {
    int error = errno;
    int judges = patience && from >= huge_from && ahead <= huge_to;
    long long began = judges ? clockUs() : 0;
    /* What is ahead may be a guard of something else: EINVAL. So it is of a system that knows no such advice. */
    if (madvise(from,ahead-from,MADV_POPULATE_WRITE) == -1 && errno == EINVAL &&
        (to == ahead || (madvise(from,to-from,MADV_POPULATE_WRITE) == -1 && errno == EINVAL))) populates = 0;
    if (judges) judgeHugePages(ahead-from,clockUs()-began);
    errno = error;
}

static bool commitPopulated(extent_hooks_t *hooks, void *addr, size_t size, size_t offset, size_t length, unsigned arena) {
    UNUSED(hooks); UNUSED(size); UNUSED(arena);
    if (!populates) return false;
    char *from = (char*)addr+offset, *to = from+length;
    if (from < populated_from || from > populated_to) populated_from = populated_to = from;     /* somewhere else */
    if (to <= populated_to) return false;
    from = populated_to;
    if (to-from > POPULATE_MAX) to = from+POPULATE_MAX;
    populated_to = (char*)(((uintptr_t)to + POPULATE_BYTES-1) & ~(uintptr_t)(POPULATE_BYTES-1));
    populate(from,to,populated_to);
    return false;
}

static bool decommit(extent_hooks_t *hooks, void *addr, size_t size, size_t offset, size_t length, unsigned arena) {
    UNUSED(hooks);
    return plain_hooks->purge_forced == NULL || plain_hooks->purge_forced(plain_hooks,addr,size,offset,length,arena);
}

static int fileHas(const char *path, const char *text) {
    char buf[128];
    FILE *f = fopen(path,"r");
    int has = f && fgets(buf,sizeof(buf),f) && strstr(buf,text);
    if (f) fclose(f);
    return has;
}

/* If the system has them always it needs no advice, unless upstream's disable-thp, the default, keeps this process from it.
 * What made them disliked beside forks, that a write copied 2 MB, is over since Linux 5.8 (it splits the
 * page and copies 4 KB), which is older than MADV_POPULATE_WRITE. */
static int mayAskForHugePages(void) {
    return madvise(NULL,0,MADV_POPULATE_WRITE) == 0 &&
        fileHas("/sys/kernel/mm/transparent_hugepage/enabled","[madvise]") &&
        fileHas("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size","2097152\n") &&
        prctl(PR_GET_THP_DISABLE,0,0,0,0) == 0;
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

/* This thread will allocate and fill much memory, until it calls zmallocPopulatesEnd(). In huge pages, if wanted, for as
 * long as most take no more than `huge_page_us` (0: however long). The hooks stay with its
 * arena, for the next one; other threads that allocate there are not concerned. */
void zmallocPopulates(int with_huge_pages, long long huge_page_us) {
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
    wants_huge_pages = populates && with_huge_pages && mayAskForHugePages();
    patience = huge_page_us;
    judged = slow_pages = gave_up_huge_pages = 0;
}

/* 1: huge pages took too long, and the rest went to small ones. */
int zmallocPopulatesEnd(void) {
    populates = wants_huge_pages = 0;
    endHugePages();
    return gave_up_huge_pages;
}

int zmallocHasHugePages(void) {
    int has;
    atomicGet(has_huge_pages,has);
    return has;
}

#else

void zmallocPopulates(int with_huge_pages, long long huge_page_us) { UNUSED(with_huge_pages); UNUSED(huge_page_us); }
int zmallocPopulatesEnd(void) { return 0; }
int zmallocHasHugePages(void) { return 0; }

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
