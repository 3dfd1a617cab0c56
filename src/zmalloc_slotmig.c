/* zmalloc_slotmig.c -- a part of zmalloc.c: threads that end give their counter back,
 * and memory that many keys leave goes back to the system.
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
