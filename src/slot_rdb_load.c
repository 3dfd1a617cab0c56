/* slot_rdb_load.c -- loads a file's RDB by several threads, section by section.
 *
 * A cluster node whose file carries the index of slots (slot_rdb.c) need not read it
 * from end to end: sections are independent of one another. Upstream's reader goes on
 * reading all else in order: AUX fields, functions, what modules keep beside the keys,
 * EOF and checksum. Where the first section begins it comes here, once, and goes on
 * behind the last one.
 *
 *   main thread                              load threads, cluster-slot-load-threads of them
 *   slotRdbLoadBegin: is there an index that
 *     fits the file? If not: upstream's way
 *   upstream: "REDIS0012", AUX, functions
 *   SLOT_INFO: slotRdbLoadSections -------->  take the next sections, in the file's order
 *                                             read them, compare the CRC, then parse them
 *   attaches each slot's dicts to  <--------  into dicts that nobody else can reach
 *     database 0; events, as upstream's
 *     reader handles them meanwhile
 *   joins; puts the rio behind the sections
 *   upstream: the index, EOF, CRC
 *
 * The file's checksum is verified in full, without a second pass: each section's by its
 * thread, against the index and *before* a byte of it is parsed; what is between and before them
 * here; from these the checksum up to the last section is put together, with which upstream's
 * reader goes on and compares. A file that was saved without checksums has its values
 * validated in depth instead, as RESTORE does.
 *
 * What comes out is what upstream's reader makes of the file: the same keys, expiry times,
 * LRU and LFU fields, counters, and DELs in the backlog for keys that had expired. A section
 * that is wrong ends the load as a wrong byte ends upstream's: DEBUG RELOAD tells its
 * client, otherwise the process ends after redis-check-rdb has looked at the file.
 *
 * Threads. A thread owns its buffer and the sections it has not handed over; the main
 * thread reads the threads' list of finished ones under the mutex. The rules for what
 * a thread may touch are slotmig_loader.c's.
 *
 * What must never happen: a file that loads here and not there, or the other way round,
 * but for keys that are twice in it (an assertion there, an error here) and keys in
 * another slot's section (an error here), which no server writes.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"
#include "slot_rdb_load.h"
#include "crc64.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>

extern char *rdbFileBeingLoaded;        /* rdb.c */

#define LOAD_THREADS_AUTO_MAX 8         /* cluster-slot-load-threads 0: not more, however many processors */
#define LOAD_AUTO_MIN (4*1024*1024)     /* bytes of a file below which it uses one */
#define LOAD_RUN (256*1024)             /* bytes of sections that a thread takes at once, and its buffer */
#define LOAD_WAIT_MS 10                 /* the main thread's, for a section */
#define LOAD_EVENTS_MS 500              /* between two looks at the events while no section ends */
#define LOAD_EVENTS_CHECK 1024          /* hashes registered between two looks at the events */
#define EMPTY_KEYS_LOGGED 10            /* as upstream */

/* Consecutive sections: together not more than LOAD_RUN, or one alone. */
typedef struct loadRun {
    int first, count;
    uint64_t bytes;
} loadRun;

typedef struct slotRdbLoad {
    const slotRdbFile *file;
    slotRdbRules rules;
    int sums;                           /* are there sums, and are they wanted? */
    loadRun *runs;
    int nruns;
    unsigned long long events_bytes;    /* loaded at the last look at the events */
    monotime events_at;
    uint64_t *crcs;                     /* of the sections, as they are in the file */
    pthread_t *threads;
    int started;
    redisAtomic int stop;
    redisAtomic unsigned long long bytes;       /* that are loaded, or nearly so */
    /* ---- under the mutex ---- */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int next_run, running;
    slotRdbLoaded *done;                /* in no order */
    char error[SLOTMIG_READER_ERROR+128];       /* of the first section that is wrong */
} slotRdbLoad;

/* A section's bytes, for upstream's loaders of values. */
typedef struct sectionRio {
    rio rdb;                            /* first: sectionRead() gets its address */
    slotRdbLoad *load;
    int fd;
    unsigned char *buf;                 /* LOAD_RUN bytes */
    size_t pos, len;                    /* of `buf`: taken, there */
    uint64_t at, end;                   /* of the file: read into `buf` up to, the section's end */
    slotMigReader reader;
} sectionRio;

/* ---- on the threads: reading ---- */

static void readerFail(slotMigReader *r, const char *fmt, ...) __attribute__((format(printf,2,3)));
static void readerFail(slotMigReader *r, const char *fmt, ...) {
    va_list ap;
    if (r->error[0]) return;            /* the first one is the cause */
    va_start(ap,fmt);
    vsnprintf(r->error,sizeof(r->error),fmt,ap);
    va_end(ap);
}

static int stopped(sectionRio *r) {
    int stop = 0;
    if (r->load) atomicGet(r->load->stop,stop);
    if (stop) readerFail(&r->reader,"the load is given up");
    return stop;
}

static int readFile(sectionRio *r, void *dst, size_t len) {
    for (char *p = dst; len;) {
        ssize_t n = pread(r->fd,p,len,r->at);
        if (n == -1 && errno == EINTR) continue;
        if (n <= 0) {
            readerFail(&r->reader,"offset %llu cannot be read: %s",(unsigned long long)r->at,
                n ? strerror(errno) : "the file became shorter");
            return 0;
        }
        p += n;
        len -= n;
        r->at += n;
    }
    return 1;
}

static size_t sectionRead(rio *rdb, void *dst, size_t len) {
    sectionRio *r = (sectionRio*)rdb;
    for (char *p = dst; len;) {
        size_t n = r->len - r->pos;
        if (n) {
            if (n > len) n = len;
            memcpy(p,r->buf+r->pos,n);
            r->pos += n;
        } else if (stopped(r)) {
            return 0;
        } else if (len > r->end - r->at) {
            readerFail(&r->reader,"what is there is longer than the section");
            return 0;
        } else if (len >= LOAD_RUN) {   /* a big string: not twice through memory */
            n = LOAD_RUN;
            if (!readFile(r,p,n)) return 0;
            if (r->load) atomicIncr(r->load->bytes,n);
        } else {
            n = r->end - r->at < LOAD_RUN ? r->end - r->at : LOAD_RUN;
            if (!readFile(r,r->buf,n)) return 0;
            r->pos = 0;
            r->len = n;
            if (r->load) atomicIncr(r->load->bytes,n);
            continue;
        }
        p += n;
        len -= n;
    }
    return 1;
}

static uint64_t sectionAt(const sectionRio *r) {
    return r->at - (r->len - r->pos);
}

static off_t sectionTell(rio *rdb) {
    return sectionAt((sectionRio*)rdb);
}

static void sectionRioInit(sectionRio *r, slotRdbLoad *load, int fd, int validates) {
    memset(r,0,sizeof(*r));
    r->rdb.read = sectionRead;
    r->rdb.tell = sectionTell;
    r->load = load;
    r->fd = fd;
    r->buf = zmalloc(LOAD_RUN);
    slotmigReaderInit(&r->reader,validates);
}

/* ---- on the threads: parsing ---- */

void slotRdbLoadedFree(slotRdbLoaded *s) {
    if (s == NULL) return;
    slotmigSectionFree(s->section);
    for (size_t i = 0; i < s->nexpired; i++) sdsfree(s->expired[i]);
    for (int i = 0; i < EMPTY_KEYS_LOGGED && i < s->nempty; i++) sdsfree(s->empty[i]);
    zfree(s->expired);
    zfree(s->empty);
    zfree(s);
}

static void keepExpired(slotRdbLoaded *s, sds key) {
    size_t n = s->nexpired++;
    if ((n & (n-1)) == 0) s->expired = zrealloc(s->expired,sizeof(sds)*(n ? n*2 : 1));
    s->expired[n] = key;
}

static void keepEmpty(slotRdbLoaded *s, sds key) {
    if (s->empty == NULL) s->empty = zmalloc(sizeof(sds)*EMPTY_KEYS_LOGGED);
    if (s->nempty < EMPTY_KEYS_LOGGED) s->empty[s->nempty] = key;
    else sdsfree(key);
    s->nempty++;
}

static int parseKey(sectionRio *r, slotRdbLoaded *s, const slotRdbRules *rules, int type, long long expire, long long lfu, long long lru) {
    int error = 0;
    sds key = rdbGenericLoadStringObject(&r->rdb,RDB_LOAD_SDS,NULL);
    if (key == NULL) return C_ERR;
    if ((int)keyHashSlot(key,sdslen(key)) != s->section->slot) {
        readerFail(&r->reader,"it has a key of slot %d",(int)keyHashSlot(key,sdslen(key)));
        sdsfree(key);
        return C_ERR;
    }
    robj *o = rdbLoadObject(type,&r->rdb,key,0,&error);
    if (o == NULL) {
        if (error == RDB_LOAD_ERR_EMPTY_KEY) {
            keepEmpty(s,key);
            return C_OK;
        }
        sdsfree(key);
        return C_ERR;
    }
    if (rules->drop_expired && expire != -1 && expire < rules->now) {
        decrRefCount(o);
        keepExpired(s,key);
        return C_OK;
    }
    if (slotmigSectionAdd(s->section,key,o,expire,lfu,lru,rules->lru_clock) == C_ERR) {
        readerFail(&r->reader,"it has a key twice");
        sdsfree(key);
        decrRefCount(o);
        return C_ERR;
    }
    return C_OK;
}

/* From the section's first byte, where the rio stands, to its end. */
static int parseRecords(sectionRio *r, const slotRdbSection *want, const slotRdbRules *rules, slotRdbLoaded *s) {
    rio *rdb = &r->rdb;
    long long expire = -1, lfu = -1, lru = -1;
    int type = rdbLoadType(rdb), attributes = 0;
    uint64_t slot = rdbLoadLen(rdb,NULL), keys = rdbLoadLen(rdb,NULL), expires = rdbLoadLen(rdb,NULL);
    if (rioGetReadError(rdb)) return C_ERR;
    if (type != RDB_OPCODE_SLOT_INFO || slot != (uint64_t)want->slot || keys != want->keys || expires != want->expires) {
        readerFail(&r->reader,"its head is another one");
        return C_ERR;
    }
    s->section = slotmigSectionCreate(want->slot,keys,expires);
    while (sectionAt(r) < r->end) {
        if (stopped(r) || (type = rdbLoadType(rdb)) == -1) return C_ERR;
        attributes = 1;
        switch (type) {
        case RDB_OPCODE_EXPIRETIME:
            expire = rdbLoadTime(rdb)*1000LL;
            break;
        case RDB_OPCODE_EXPIRETIME_MS:
            expire = rdbLoadMillisecondTime(rdb,RDB_VERSION);
            break;
        case RDB_OPCODE_FREQ: {
            uint8_t byte = 0;
            rioRead(rdb,&byte,1);
            lfu = byte;
            break;
        }
        case RDB_OPCODE_IDLE:
            if ((lru = rdbLoadLen(rdb,NULL)) == (long long)RDB_LENERR) return C_ERR;
            if (lru < 0 || lru > UINT32_MAX) lru = UINT32_MAX;      /* upstream's sum would overflow */
            break;
        default:
            if (!rdbIsObjectType(type)) {
                readerFail(&r->reader,"it has a record of type %d",type);
                return C_ERR;
            }
            if (parseKey(r,s,rules,type,expire,lfu,lru) == C_ERR) return C_ERR;
            expire = lfu = lru = -1;
            attributes = 0;
        }
        if (rioGetReadError(rdb)) return C_ERR;
    }
    if (attributes) readerFail(&r->reader,"it ends in the middle of a key");
    return attributes ? C_ERR : C_OK;
}

/* NULL: the reader's error tells why. */
static slotRdbLoaded *parseSection(sectionRio *r, const slotRdbSection *want, const slotRdbRules *rules) {
    slotRdbLoaded *s = zcalloc(sizeof(*s));
    slotmigReaderUse(&r->reader);
    int res = parseRecords(r,want,rules,s);
    slotmigReaderUse(NULL);
    if (res == C_OK) return s;
    readerFail(&r->reader,"a value cannot be read");
    slotRdbLoadedFree(s);
    return NULL;
}

slotRdbLoaded *slotRdbLoadOne(int fd, const slotRdbSection *want, const slotRdbRules *rules, int validate, sds *error) {
    sectionRio r;
    sectionRioInit(&r,NULL,fd,validate);
    r.at = want->offset;
    r.end = want->offset+want->bytes;
    slotRdbLoaded *s = parseSection(&r,want,rules);
    *error = s ? NULL : sdsnew(r.reader.error);
    zfree(r.buf);
    return s;
}

/* ---- on the threads: one run after another ---- */

/* 0: there is no more. */
static int nextRun(slotRdbLoad *l, loadRun *run) {
    pthread_mutex_lock(&l->mutex);
    int more = l->next_run < l->nruns;
    if (more) *run = l->runs[l->next_run++];
    pthread_mutex_unlock(&l->mutex);
    return more;
}

static int sumMatches(sectionRio *r, int i, uint64_t crc) {
    const slotRdbSection *s = r->load->file->index.sections+i;
    r->load->crcs[i] = crc;
    if (crc == s->crc) return 1;
    readerFail(&r->reader,"its CRC is %016llx, the index has %016llx",(unsigned long long)crc,(unsigned long long)s->crc);
    return 0;
}

/* A section that does not fit the buffer is read twice, first for its sum; what the
 * machine has memory for comes from there the second time. */
static int sumLargeSection(sectionRio *r, int i) {
    uint64_t crc = 0;
    while (r->at < r->end) {
        size_t n = r->end - r->at < LOAD_RUN ? r->end - r->at : LOAD_RUN;
        if (stopped(r) || !readFile(r,r->buf,n)) return 0;
        crc = crc64(crc,r->buf,n);
    }
    return sumMatches(r,i,crc);
}

static int loadOne(sectionRio *r, int i, uint64_t run_at, int whole, slotRdbLoaded **list) {
    slotRdbLoad *l = r->load;
    const slotRdbSection *s = l->file->index.sections+i;
    r->end = s->offset+s->bytes;
    if (whole) {        /* the run is in the buffer */
        r->at = r->end;
        r->pos = s->offset-run_at;
        r->len = r->pos+s->bytes;
        if (l->sums && !sumMatches(r,i,crc64(0,r->buf+r->pos,s->bytes))) return 0;
    } else {
        r->at = s->offset;
        if (l->sums && !sumLargeSection(r,i)) return 0;
        r->at = s->offset;
        r->pos = r->len = 0;
    }
    slotRdbLoaded *loaded = parseSection(r,s,&l->rules);
    if (loaded == NULL) return 0;
    loaded->next = *list;
    *list = loaded;
    if (whole) atomicIncr(l->bytes,s->bytes);
    return 1;
}

static int loadRunOfSections(sectionRio *r, const loadRun *run, slotRdbLoaded **list) {
    slotRdbLoad *l = r->load;
    const slotRdbSection *first = l->file->index.sections+run->first;
    int whole = run->bytes <= LOAD_RUN, i = run->first, ok = 1, stop;
    r->at = first->offset;
    if (whole) ok = readFile(r,r->buf,run->bytes);
    for (; ok && i < run->first+run->count; i++) ok = !stopped(r) && loadOne(r,i,first->offset,whole,list);
    if (ok) return 1;
    if (i > run->first) i--;
    atomicGet(l->stop,stop);
    pthread_mutex_lock(&l->mutex);
    if (!l->error[0] && !stop)
        snprintf(l->error,sizeof(l->error),"Slot %d, whose section begins at offset %llu, cannot be loaded: %s (at offset %llu)",
            l->file->index.sections[i].slot,(unsigned long long)l->file->index.sections[i].offset,r->reader.error,
            (unsigned long long)sectionAt(r));
    pthread_mutex_unlock(&l->mutex);
    return 0;
}

static void handOver(slotRdbLoad *l, slotRdbLoaded *list) {
    slotRdbLoaded *last = list;
    if (last == NULL) return;
    while (last->next) last = last->next;
    pthread_mutex_lock(&l->mutex);
    last->next = l->done;
    l->done = list;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->mutex);
}

/* What was loaded is to be in the arena of the thread that will change and free it, as if
 * that had loaded it: what is freed in another's arena, it could not use again. */
#ifdef USE_JEMALLOC
static unsigned main_arena;

static void findArena(void) {
    size_t len = sizeof(main_arena);
    je_mallctl("thread.arena",&main_arena,&len,NULL,0);
}

static void useMainArena(void) {
    je_mallctl("thread.arena",NULL,NULL,&main_arena,sizeof(main_arena));
}
#else
static void findArena(void) {}
static void useMainArena(void) {}
#endif

static void *loadMain(void *arg) {
    sectionRio *r = arg;
    slotRdbLoad *l = r->load;
    loadRun run;
    int ok = 1;
    redis_set_thread_title("slot_load");
    makeThreadKillable();
    useMainArena();
    while (ok && !stopped(r) && nextRun(l,&run)) {
        slotRdbLoaded *list = NULL;
        ok = loadRunOfSections(r,&run,&list);
        handOver(l,list);
    }
    if (!ok) atomicSet(l->stop,1);
    zfree(r->buf);
    zfree(r);
    pthread_mutex_lock(&l->mutex);
    l->running--;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->mutex);
    return NULL;
}

/* ---- the main thread: whether ---- */

static slotRdbLoad *load;               /* that runs, NULL: none */
static slotRdbFile planned;             /* its index fits `planned_for`, which is being read */
static rio *planned_for;

static int processors(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0,sizeof(set),&set) == 0) return CPU_COUNT(&set);
#endif
    return sysconf(_SC_NPROCESSORS_ONLN);
}

static int threadsWanted(void) {
    if (slotmig_config.load_threads) return slotmig_config.load_threads;
    int n = processors();
    return n < 1 ? 1 : n > LOAD_THREADS_AUTO_MAX ? LOAD_THREADS_AUTO_MAX : n;
}

/* Threads are not worth their while for it. */
static int isSmall(const slotRdbIndex *ix) {
    const slotRdbSection *last = ix->sections+ix->count-1;
    return slotmig_config.load_threads == 0 && last->offset+last->bytes < LOAD_AUTO_MIN;
}

/* Why upstream's way must be gone, besides the file itself. */
static const char *whyNot(int rdbflags) {
    if (rdbflags & RDBFLAGS_ALLOW_DUP) return "Its keys may be there already.";
    if (server.key_load_delay || server.skip_checksum_validation) return "A directive for debugging is set.";
    if (slotmigModulesListen()) return "There are modules that may have to hear of each key.";
    return NULL;
}

static void oneByOne(const char *why) {
    serverLog(LL_NOTICE,"The slots of the RDB are loaded one after another. %s",why);
}

void slotRdbLoadBegin(rio *rdb, int rdbflags) {
    const char *why;
    slotRdbClose(&planned);
    planned_for = NULL;
    if (!server.cluster_enabled || rioCheckType(rdb) != RIO_TYPE_FILE) return;
    if (threadsWanted() < 2) {
        serverLog(LL_VERBOSE,"The slots of the RDB are loaded one after another: by one thread, see cluster-slot-load-threads.");
        return;
    }
    if ((why = whyNot(rdbflags)) != NULL) {
        oneByOne(why);
        return;
    }
    FILE *fp = rdb->io.file.fp;
    if (ftello(fp) != 0) oneByOne("It does not begin where its file does.");
    else if (slotRdbOpen(&planned,fileno(fp)) != SLOT_RDB_GOOD) oneByOne(planned.why);
    else if (planned.crc && !server.rdb_checksum) oneByOne("It has checksums that rdbchecksum says not to verify.");
    else if (planned.index.count && !isSmall(&planned.index)) planned_for = rdb;
}

/* Does it fit where upstream's reader stands, and what is there? */
static const char *whyNotHere(rio *rdb, redisDb *db) {
    const slotRdbIndex *ix = &planned.index;
    if (db != server.db) return "It is to be loaded to another place than database 0.";
    if (rdb->processed_bytes-1 != ix->sections[0].offset) return "Its first section is not the first one of its index.";
    for (int i = 0; i < ix->count; i++)
        if (kvstoreDictSize(db->keys,ix->sections[i].slot)) return "Some of its slots have keys already.";
    return NULL;
}

/* ---- the main thread: the load ---- */

/* Large ones in front: the last thread to end is to have a small one. */
static void planRuns(slotRdbLoad *l, int threads) {
    const slotRdbIndex *ix = &l->file->index;
    uint64_t total = 0;
    int in_front = 0;
    l->runs = zmalloc(sizeof(*l->runs)*ix->count);
    for (int i = 0; i < ix->count; i++) {
        const slotRdbSection *s = ix->sections+i;
        loadRun *run = l->nruns ? l->runs+l->nruns-1 : NULL;
        total += s->bytes;
        if (run && s->offset+s->bytes - ix->sections[run->first].offset <= LOAD_RUN) {
            run->bytes = s->offset+s->bytes - ix->sections[run->first].offset;
            run->count++;
        } else {
            l->runs[l->nruns++] = (loadRun){ i, 1, s->bytes };
        }
    }
    for (int i = 0; i < l->nruns; i++) {
        loadRun run = l->runs[i];
        if (run.count > 1 || run.bytes < total/(4*threads)) continue;
        memmove(l->runs+in_front+1,l->runs+in_front,sizeof(run)*(i-in_front));
        l->runs[in_front++] = run;
    }
}

static slotRdbLoad *startLoad(const slotRdbRules *rules, int threads) {
    slotRdbLoad *l = zcalloc(sizeof(*l));
    sigset_t all, before;
    l->file = &planned;
    l->rules = *rules;
    l->sums = server.rdb_checksum && planned.crc != 0;
    l->events_at = getMonotonicUs();
    l->crcs = zcalloc(sizeof(uint64_t)*planned.index.count);
    pthread_mutex_init(&l->mutex,NULL);
    pthread_cond_init(&l->changed,NULL);
    planRuns(l,threads);
    if (threads > l->nruns) threads = l->nruns;
    l->threads = zmalloc(sizeof(pthread_t)*threads);
    findArena();
    l->running = threads;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK,&all,&before);
    while (l->started < threads) {
        sectionRio *r = zmalloc(sizeof(*r));
        sectionRioInit(r,l,planned.fd,!l->sums);
        if (pthread_create(l->threads+l->started,NULL,loadMain,r) == 0) {
            l->started++;
            continue;
        }
        zfree(r->buf);
        zfree(r);
        break;
    }
    pthread_sigmask(SIG_SETMASK,&before,NULL);
    pthread_mutex_lock(&l->mutex);
    l->running -= threads-l->started;
    pthread_mutex_unlock(&l->mutex);
    return l;
}

/* Joins the threads, which end by themselves or were told to. */
static void endLoad(slotRdbLoad *l) {
    for (int i = 0; i < l->started; i++) pthread_join(l->threads[i],NULL);
    l->started = 0;
    while (l->done) {
        slotRdbLoaded *s = l->done;
        l->done = s->next;
        slotRdbLoadedFree(s);
    }
}

static void freeLoad(slotRdbLoad *l) {
    endLoad(l);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->mutex);
    zfree(l->threads);
    zfree(l->crcs);
    zfree(l->runs);
    zfree(l);
}

void slotRdbLoadStop(void) {
    if (load == NULL) return;
    atomicSet(load->stop,1);
    endLoad(load);      /* who waits for it goes on, should the process live */
}

/* As upstream's reader for each so many bytes: nobody notices that a small file is loaded. */
static void handleEvents(slotRdbLoad *l) {
    unsigned long long bytes, interval = server.loading_process_events_interval_bytes;
    monotime now = getMonotonicUs();
    atomicGet(l->bytes,bytes);
    bytes += l->file->index.sections[0].offset;
    if (interval == 0 || (bytes/interval == l->events_bytes/interval && now < l->events_at+LOAD_EVENTS_MS*1000)) return;
    l->events_bytes = bytes;
    l->events_at = now;
    if (server.masterhost && server.repl_state == REPL_STATE_TRANSFER) replicationSendNewlineToMaster();
    loadingAbsProgress(bytes);
    processEventsWhileBlocked();
    processModuleLoadingProgressEvent(0);
}

/* Some finished sections, NULL: none at the moment. *ends: there will be no more. */
static slotRdbLoaded *takeLoaded(slotRdbLoad *l, int *ends) {
    struct timespec until;
    pthread_mutex_lock(&l->mutex);
    if (l->done == NULL && l->running) {
        clock_gettime(CLOCK_REALTIME,&until);
        until.tv_nsec += LOAD_WAIT_MS*1000000;
        until.tv_sec += until.tv_nsec/1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&l->changed,&l->mutex,&until);
    }
    slotRdbLoaded *list = l->done;
    l->done = NULL;
    *ends = l->running == 0;
    pthread_mutex_unlock(&l->mutex);
    return list;
}

/* As upstream does with a key that it drops. */
static void tellExpired(slotRdbLoaded *s, redisDb *db, int rdbflags) {
    server.rdb_last_load_keys_expired += s->nexpired;
    if (!(rdbflags & RDBFLAGS_FEED_REPL) || server.repl_backlog == NULL) return;
    for (size_t i = 0; i < s->nexpired; i++) {
        robj key, *argv[2] = { server.lazyfree_lazy_expire ? shared.unlink : shared.del, &key };
        initStaticStringObject(key,s->expired[i]);
        replicationFeedSlaves(server.slaves,db->id,argv,2);
    }
}

static void attach(slotRdbLoad *l, slotRdbLoaded *s, redisDb *db, int rdbflags, long long *empty_keys) {
    slotMigSection *section = s->section;
    for (int i = 0; i < s->nempty; i++)
        if ((*empty_keys)++ < EMPTY_KEYS_LOGGED && i < EMPTY_KEYS_LOGGED)
            serverLog(LL_NOTICE,"rdbLoadObject skipping empty key: %s",s->empty[i]);
    tellExpired(s,db,rdbflags);
    for (size_t i = 0, n; i < section->nfield_expiry; i += n) {
        if (i) handleEvents(l);
        n = section->nfield_expiry-i < LOAD_EVENTS_CHECK ? section->nfield_expiry-i : LOAD_EVENTS_CHECK;
        slotmigRegisterHashes(db,section->field_expiry+i,n);
    }
    if (section->nkeys) kvstoreMoveDict(section->keys,0,db->keys,section->slot);
    if (section->nexpires) kvstoreMoveDict(section->expires,0,db->expires,section->slot);
    server.rdb_last_load_keys_loaded += section->nkeys;
}

/* The file's sum up to the end of its last section. */
static int sumUpTo(slotRdbLoad *l, slotRdbFile *f, uint64_t *crc) {
    const slotRdbIndex *ix = &f->index;
    uint64_t at = ix->sections[0].offset, gap_crc;
    if (!slotRdbSum(f,0,at,crc)) return 0;
    for (int i = 0; i < ix->count; i++) {
        const slotRdbSection *s = ix->sections+i;
        if (s->offset != at) {
            if (!slotRdbSum(f,at,s->offset-at,&gap_crc)) return 0;
            *crc = slotRdbCombineCrc(*crc,gap_crc,s->offset-at);
        }
        *crc = slotRdbCombineCrc(*crc,l->crcs[i],s->bytes);
        at = s->offset+s->bytes;
    }
    return 1;
}

/* All is attached: upstream's reader goes on behind it. */
static int goOnBehind(slotRdbLoad *l, rio *rdb) {
    const slotRdbSection *last = planned.index.sections+planned.index.count-1;
    uint64_t crc = 0;
    if ((l->sums && !sumUpTo(l,&planned,&crc)) || fseeko(rdb->io.file.fp,last->offset+last->bytes,SEEK_SET) == -1) {
        serverLog(LL_WARNING,"The RDB cannot be read any more behind its slots: %s",planned.why[0] ? planned.why : strerror(errno));
        return 0;
    }
    rdb->processed_bytes = last->offset+last->bytes;
    rdb->cksum = crc;
    loadingAbsProgress(rdb->processed_bytes);
    return 1;
}

/* Where upstream's reader would end the process after redis-check-rdb has looked at the file,
 * it does so with that one's status, which is 0 if it sees nothing: it knows no sections. */
static void endProcess(void) {
    char *argv[2] = { "", rdbFileBeingLoaded ? rdbFileBeingLoaded : "RDB" };
    if (server.current_client && server.current_client->id != CLIENT_ID_AOF) return;    /* DEBUG RELOAD tells the client */
    int fd = dup(planned.fd);
    FILE *fp = fd == -1 ? NULL : fdopen(fd,"r");
    if (fp && fseeko(fp,0,SEEK_SET) == 0) redis_check_rdb_main(2,argv,fp);
    serverLog(LL_WARNING,"Terminating server after rdb file reading failure.");
    exit(1);
}

int slotRdbLoadSections(rio *rdb, redisDb *db, int rdbflags, long long now, long long lru_clock, long long *empty_keys) {
    const char *why;
    int ends = 0, res = -1;
    if (planned_for != rdb) return 0;
    planned_for = NULL;
    if ((why = whyNotHere(rdb,db)) != NULL) {
        oneByOne(why);
        return 0;
    }
    slotRdbRules rules = { .now = now, .lru_clock = lru_clock,
        .drop_expired = iAmMaster() && !(rdbflags & RDBFLAGS_AOF_PREAMBLE) };
    slotRdbLoad *l = load = startLoad(&rules,threadsWanted());
    if (l->started == 0) {
        oneByOne("No thread could be started.");
        res = 0;
    } else {
        serverLog(LL_NOTICE,"The %d slots of the RDB are loaded by threads: %d",planned.index.count,l->started);
        while (!ends) {
            slotRdbLoaded *list = takeLoaded(l,&ends), *s;
            while ((s = list) != NULL) {
                list = s->next;
                attach(l,s,db,rdbflags,empty_keys);
                slotRdbLoadedFree(s);
                handleEvents(l);
            }
            handleEvents(l);
        }
        int stop;
        atomicGet(l->stop,stop);
        if (stop) serverLog(LL_WARNING,"%s",l->error[0] ? l->error : "The load was given up");
        else if (goOnBehind(l,rdb)) res = 1;
    }
    load = NULL;
    freeLoad(l);
    if (res == -1) endProcess();
    slotRdbClose(&planned);
    return res;
}
