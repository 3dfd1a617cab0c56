/* slotmig_loader.c -- bytes in, slots out: the target's background loader.
 *
 * One thread for each incoming snapshot. It reads the connection itself, parses
 * records with upstream's object loaders as the bytes arrive, and builds for
 * each slot a dict of keys and one of expires that nobody else can reach. When a
 * section is complete and its count and CRC are what the source says, it is
 * handed to the main thread. At the end the index (slot_rdb.c) must be the one
 * of what was received.
 *
 * Threads. The loader's thread owns, from slotmigLoaderStart() until it ends:
 * the connection with its TLS state, everything in the struct above the first line,
 * and every object it makes until it is handed over. Between the lines are atomics: the main thread sets `stop`,
 * `paused` and `rate`, it reads the others, and takes all that there is in `done` and `teed` at once, where the
 * loader's thread puts one more. There is no lock: the thread gives way to everybody, so whoever holds one may be
 * without a processor for long, and the main thread must not wait for that. What is below the second line is the
 * main thread's, and in the end the one's that frees the loader. From server.* the thread only
 * reads plain words of the configuration (encoding limits), for which a stale
 * value is as good as a new one. It must never reach server.current_client,
 * server.db, the replication or AOF state, or a module that is not known to be
 * thread-safe. The hooks in rdb.c see to that, they ask slotmigInLoader().
 *
 *   main                                loader's thread
 *   slotmigLoaderStart ---------------> reads REDIS0012, AUX...
 *                                       SLOT_INFO 7: new dicts
 *                                       keys of slot 7
 *                          section 7 <- AUX slot-section: count, CRC right
 *   wake(); slotmigLoaderNext()
 *   attaches it to the shadow           SLOT_INFO 12 ...
 *                           complete <- AUX slot-index, trailer, EOF, CRC
 *   slotmigLoaderFree (joins)
 *
 * Values are validated in depth as upstream does for RESTORE from a client, for they
 * are made of bytes whose sum is known only when their section has ended.
 *
 * What must never happen: a byte from the network that ends the process, and a
 * section that counts as arrived and is not what was sent.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"
#include "crc64.h"
#include "bio.h"
#include "eventnotifier.h"
#include <poll.h>
#include <pthread.h>
#include <signal.h>

#define LOADER_BUFFER (128*1024)
#define LOADER_POLL 100                 /* ms between two looks at `stop` while no byte comes */
#define GIVE_WAY_READS 32               /* until others may have the processor */
#define TEE_MAX (512*1024)              /* bytes for the replicas that wait until no more is read */
#define PACE_BURST 250                  /* ms of the rate limit that may come at once */
#define HUGE_PAGE_PATIENCE 1000         /* us */
#define KEY_OVERHEAD 96                 /* bytes of memory a key takes besides its text, if the allocator does not tell */

/* The presizing of a dict follows a number from the network: a section of more
 * keys than this grows as it goes. */
#define PRESIZE_MAX (1<<24)

struct slotMigLoader {
    rio rdb;                            /* first: loaderRead() gets its address */
    connection *conn;
    int tls, patient, tee, huge_pages;
    int commands;                       /* sections are to have those that make their keys */
    slotMigFile *file;                  /* gets what is read, NULL: none */
    int lost;                           /* the connection ended, before the error was set */
    slotSet slots;                      /* expected */
    unsigned char buf[LOADER_BUFFER];
    size_t pos, len;                    /* of what was read into `buf`: taken, there */
    size_t summed;                      /* taken and contained in `crc` */
    uint64_t crc;                       /* of the open section, or of the file when none is open */
    uint64_t outer_crc;                 /* of the file up to the open section */
    uint64_t offset;                    /* bytes taken */
    slotMigSection *section;            /* open, NULL: none */
    uint64_t section_offset;
    uint64_t want_keys, want_expires;   /* of the open section, as SLOT_INFO says */
    slotSet seen;
    slotRdbIndex index;
    slotMigReader reader;
    sds capture;                        /* of what is taken; NULL: nothing */
    sds replay;                         /* captured, to be read again first; NULL: none */
    size_t replayed;
    unsigned reads;
    long long section_memory;           /* slotmigThreadMemory() when the section was opened */
    double allowed;                     /* bytes that the rate limit lets in */
    monotime allowed_at;
    long long idle_limit;               /* ms without a byte */
    pthread_t thread;
    eventNotifier *notifier;
    /* ---------------------------------------------------------------- */
    redisAtomic unsigned long long bytes;
    redisAtomic int stop, paused;
    redisAtomic long long rate;         /* bytes per second, 0: any */
    redisAtomic size_t open_memory;     /* of the open section */
    redisAtomic size_t done_memory;     /* of those that are complete and not taken yet */
    redisAtomic size_t teed_bytes;      /* the same */
    slotMigHanded *done;                /* slotMigSections, newest first, NULL: none */
    slotMigHanded *teed;                /* what was read, for the replicas: the same */
    int state;                          /* 0: running, 1: complete, -1: failed */
    /* ---------------------------------------------------------------- */
    slotMigHanded *taken, *taken_teed;  /* oldest first */
    void (*wake)(void*);
    void *arg;
};

struct teed {
    slotMigHanded handed;       /* first */
    sds bytes;
};

static __thread slotMigReader *this_reader;

/* ---- hooks in rdb.c ---- */

int slotmigInLoader(void) {
    return this_reader != NULL;
}

int slotmigLoaderValidates(void) {
    return this_reader != NULL && this_reader->validates;
}

int slotmigLoaderError(const char *msg) {
    if (this_reader == NULL) return 0;
    if (!this_reader->error[0])
        snprintf(this_reader->error,sizeof(this_reader->error),"%s",msg);
    return 1;
}

/* On the loader's thread only types known to load without touching the module's
 * or the server's state. The low ten bits of an id are the encoding's version. */
moduleType *slotmigLoaderModuleType(uint64_t id) {
    slotMigReader *r = this_reader;
    if (r->on_main) return moduleTypeLookupModuleByID(id);
    return r->vectorset && (id & ~(uint64_t)1023) == (r->vectorset_id & ~(uint64_t)1023) ? r->vectorset : NULL;
}

/* On the main thread, before a thread uses it. */
void slotmigReaderInit(slotMigReader *r, int validates) {
    memset(r,0,sizeof(*r));
    r->validates = validates;
    r->vectorset = moduleTypeLookupModuleByName("vectorset");
    if (r->vectorset) r->vectorset_id = r->vectorset->id;
    slotmigInitSections();
    slotRdbCombineCrc(0,0,1);   /* fills a table that threads then only read */
}

/* What this thread reads from here on is read for `r`; NULL: as ever. */
void slotmigReaderUse(slotMigReader *r) {
    this_reader = r;
}

/* ---- reading ---- */

static void loaderFail(slotMigLoader *l, const char *fmt, ...) __attribute__((format(printf,2,3)));
static void loaderFail(slotMigLoader *l, const char *fmt, ...) {
    va_list ap;
    if (l->reader.error[0]) return;     /* the first one is the cause */
    va_start(ap,fmt);
    vsnprintf(l->reader.error,sizeof(l->reader.error),fmt,ap);
    va_end(ap);
}

/* That the open section takes so far. */
static size_t sectionMemory(slotMigLoader *l) {
    long long now = slotmigThreadMemory();
    if (now == 0) return l->offset - l->section_offset + l->section->nkeys*KEY_OVERHEAD;
    return now > l->section_memory ? now - l->section_memory : 0;
}

/* ---- handing over ---- */

/* 1: there was none. From here on `h` is the main thread's. */
static int put(slotMigHanded **newest, slotMigHanded *h) {
    slotMigHanded *older = __atomic_load_n(newest,__ATOMIC_RELAXED);
    do h->next = older;
    while (!__atomic_compare_exchange_n(newest,&older,h,1,__ATOMIC_RELEASE,__ATOMIC_RELAXED));
    return older == NULL;
}

/* The next one of those that were taken, or else of all that there are now; NULL: none. */
static void *take(slotMigHanded **taken, slotMigHanded **newest) {
    if (*taken == NULL) {
        slotMigHanded *h = __atomic_exchange_n(newest,NULL,__ATOMIC_ACQUIRE), *older;
        for (; h; h = older) {
            older = h->next;
            h->next = *taken;
            *taken = h;
        }
    }
    slotMigHanded *oldest = *taken;
    if (oldest) *taken = oldest->next;
    return oldest;
}

static int teeIsFull(slotMigLoader *l) {
    size_t bytes;
    atomicGet(l->teed_bytes,bytes);
    return bytes > TEE_MAX;
}

static void teeBytes(slotMigLoader *l, const void *p, size_t len) {
    struct teed *t = zmalloc(sizeof(*t));
    t->bytes = sdsnewlen(p,len);
    atomicIncr(l->teed_bytes,len);
    if (put(&l->teed,&t->handed)) triggerEventNotifier(l->notifier);
}

/* How many of `len` bytes may be read now, 0: stopped. Waits while the operator
 * wants that; TCP then slows the source down. */
static size_t loaderMayRead(slotMigLoader *l, size_t len) {
    for (;;) {
        int stop, paused;
        long long rate;
        atomicGet(l->stop,stop);
        atomicGet(l->paused,paused);
        atomicGet(l->rate,rate);
        if (stop) {
            loaderFail(l,"stopped");
            return 0;
        }
        if (l->tee && teeIsFull(l)) {
            usleep(1000);
            continue;
        }
        monotime now = getMonotonicUs();
        double most = rate*(PACE_BURST/1000.0)+1;
        if (paused || rate == 0 || l->allowed_at == 0) l->allowed = 0;
        else l->allowed += (now - l->allowed_at)/1e6*rate;
        l->allowed_at = now;
        if (l->allowed > most) l->allowed = most;
        if (!paused && rate == 0) return len;
        if (!paused && l->allowed >= 1) return len < l->allowed ? len : (size_t)l->allowed;
        usleep(paused ? 10000 : 1000);
    }
}

/* Some bytes from the connection; 0 when there will be none. */
static size_t loaderReceive(slotMigLoader *l, void *buf, size_t room) {
    long long idle = 0;
    for (;;) {
        size_t len = loaderMayRead(l,room);
        if (len == 0) return 0;
        /* With TLS an ordinary read would look for the event loop, which the
         * connection does not have any more; a synchronous one waits itself. */
        int n = l->tls ? connSyncRead(l->conn,buf,len,LOADER_POLL) : connRead(l->conn,buf,len);
        if (n > 0) {
            l->allowed -= n;
            if (l->tee) teeBytes(l,buf,n);
            if (l->file && slotmigFileWrite(l->file,buf,n) == C_ERR) {
                loaderFail(l,"cannot write to the append-only file's directory: %s",strerror(errno));
                return 0;
            }
            atomicIncr(l->bytes,n);
            if (l->section) atomicSet(l->open_memory,sectionMemory(l));
            return n;
        }
        if ((n == 0 && !l->tls) || connGetState(l->conn) != CONN_STATE_CONNECTED) {
            l->lost = 1;
            loaderFail(l,"the snapshot's connection ended at offset %llu",(unsigned long long)l->offset);
            return 0;
        }
        struct pollfd pfd = { l->conn->fd, POLLIN, 0 };
        if ((l->tls || poll(&pfd,1,LOADER_POLL) == 0) && (idle += LOADER_POLL) > l->idle_limit && !l->patient) {
            l->lost = 1;
            loaderFail(l,"no byte of the snapshot arrived for repl-timeout, at offset %llu",
                (unsigned long long)l->offset);
            return 0;
        }
    }
}

/* Sum up what was taken from the buffer, but for its last `but` bytes. */
static void loaderSum(slotMigLoader *l, size_t but) {
    size_t end = l->pos - but;
    l->crc = crc64(l->crc,l->buf+l->summed,end-l->summed);
    l->summed = end;
}

static size_t loaderRead(rio *r, void *dst, size_t len) {
    slotMigLoader *l = (slotMigLoader*)r;
    char *p = dst;
    if (++l->reads%GIVE_WAY_READS == 0) slotmigGiveWay();
    if (l->replay) {    /* what was counted and summed already */
        size_t n = sdslen(l->replay) - l->replayed;
        if (n > len) n = len;
        memcpy(p,l->replay+l->replayed,n);
        p += n;
        len -= n;
        if ((l->replayed += n) == sdslen(l->replay)) {
            sdsfree(l->replay);
            l->replay = NULL;
        }
    }
    while (len) {
        size_t n = l->len - l->pos;
        if (n) {
            if (n > len) n = len;
            memcpy(p,l->buf+l->pos,n);
            l->pos += n;
        } else if (len >= LOADER_BUFFER) {      /* a big string: not twice through memory */
            loaderSum(l,0);
            if ((n = loaderReceive(l,p,len)) == 0) return 0;
            l->crc = crc64(l->crc,(unsigned char*)p,n);
        } else {
            loaderSum(l,0);
            l->pos = l->summed = l->len = 0;
            if ((l->len = loaderReceive(l,l->buf,LOADER_BUFFER)) == 0) return 0;
            continue;
        }
        if (l->capture) {
            /* Doubled, for sdscatlen() alone would copy a large one again and again. */
            if (sdsavail(l->capture) < n) l->capture = sdsMakeRoomForNonGreedy(l->capture,n > sdslen(l->capture) ? n : sdslen(l->capture));
            l->capture = sdscatlen(l->capture,p,n);
        }
        p += n;
        len -= n;
        l->offset += n;
    }
    return 1;
}

static off_t loaderTell(rio *r) {
    return ((slotMigLoader*)r)->offset;
}

/* ---- parsing ---- */

static void freeSectionStores(kvstore *keys, kvstore *expires) {
    if (keys) kvstoreRelease(keys);
    if (expires) kvstoreRelease(expires);
}

void slotmigSectionFree(slotMigSection *s) {
    if (s == NULL) return;
    freeSectionStores(s->keys,s->expires);
    for (size_t i = s->decoded; i < s->nraw; i++) {
        sdsfree(s->raw[i].key);
        sdsfree(s->raw[i].bytes);
    }
    zfree(s->raw);
    zfree(s->field_expiry);
    sdsfree(s->commands);
    zfree(s);
}

static void freeSection(void *args[]) {
    slotmigSectionFree(args[0]);
}

void slotmigSectionDrop(slotMigSection *s) {
    if (s) bioCreateLazyFreeJob(freeSection,1,s);
}

static sds catText(sds s, const char *p, size_t len) {
    char head[32];
    int n = snprintf(head,sizeof(head),"$%zu\r\n",len);
    return sdscatlen(sdscatlen(sdscatlen(s,head,n),p,len),"\r\n",2);
}

static sds catNumber(sds s, long long v) {
    char text[32];
    return catText(s,text,snprintf(text,sizeof(text),"%lld",v));
}

/* The RESTORE of a key whose record had this type and these bytes of value: they are what
 * DUMP gives, but for its end, the RDB's version and a sum. */
static void addCommand(slotMigSection *s, unsigned char type, sds key, sds value, long long expire, long long lfu, long long lru) {
    char head[32];
    unsigned char end[10] = { RDB_VERSION & 0xff, RDB_VERSION >> 8 };
    size_t room = sdslen(key)+sdslen(value)+256;
    uint64_t crc = crc64(crc64(crc64(0,&type,1),(unsigned char*)value,sdslen(value)),end,2);
    memrev64ifbe(&crc);
    memcpy(end+2,&crc,8);
    /* Doubled, as in loaderRead(). */
    if (sdsavail(s->commands) < room) s->commands = sdsMakeRoomForNonGreedy(s->commands,room > sdslen(s->commands) ? room : sdslen(s->commands));
    sds c = sdscat(s->commands,lfu == -1 && lru == -1 ? "*6\r\n" : "*8\r\n");
    c = sdscat(c,"$7\r\nRESTORE\r\n");
    c = catText(c,key,sdslen(key));
    c = catNumber(c,expire == -1 ? 0 : expire);
    c = sdscatlen(c,head,snprintf(head,sizeof(head),"$%zu\r\n",1+sdslen(value)+sizeof(end)));
    c = sdscatlen(sdscatlen(sdscatlen(c,&type,1),value,sdslen(value)),end,sizeof(end));
    c = sdscat(c,"\r\n$7\r\nREPLACE\r\n$6\r\nABSTTL\r\n");
    if (lfu != -1) c = catNumber(sdscat(c,"$4\r\nFREQ\r\n"),lfu);
    else if (lru != -1) c = catNumber(sdscat(c,"$8\r\nIDLETIME\r\n"),lru);
    s->commands = c;
}

/* `keys`, `expires`: how many there will be, which need not be true. Any thread, as below. */
slotMigSection *slotmigSectionCreate(int slot, uint64_t keys, uint64_t expires) {
    slotMigSection *s = zcalloc(sizeof(*s));
    s->slot = slot;
    s->keys = slotmigSectionKeys();
    s->expires = slotmigSectionExpires();
    if (keys <= PRESIZE_MAX && keys) kvstoreExpand(s->keys,keys,1,NULL);
    if (expires <= PRESIZE_MAX && expires) kvstoreExpand(s->expires,expires,1,NULL);
    return s;
}

/* Takes the key and the value. NULL: the key is there already, nothing was taken. */
static dictEntry *addKey(slotMigSection *s, sds key, robj *o, long long expire) {
    redisDb db = { .keys = s->keys, .expires = s->expires };
    dictEntry *de = kvstoreDictAddRaw(s->keys,0,key,NULL);
    if (de == NULL) return NULL;
    kvstoreDictSetVal(s->keys,0,de,o);
    updateKeysizesHist(&db,0,o->type,-1,getObjectLength(o));
    if (expire != -1) dictSetSignedIntegerVal(kvstoreDictAddRaw(s->expires,0,key,NULL),expire);
    return de;
}

/* The same, of one of its raw values that was decoded: it is counted already. Main thread. */
int slotmigSectionAddDecoded(slotMigSection *s, sds key, robj *o, long long expire) {
    return addKey(s,key,o,expire) ? C_OK : C_ERR;
}

/* Takes the key and the value; C_ERR: the key is there already, nothing was taken. */
int slotmigSectionAdd(slotMigSection *s, sds key, robj *o, long long expire, long long lfu, long long lru, long long lru_clock) {
    initObjectLRUOrLFU(o);
    dictEntry *de = addKey(s,key,o,expire);
    if (de == NULL) return C_ERR;
    if (o->refcount != OBJ_SHARED_REFCOUNT) objectSetLRUOrLFU(o,lfu,lru,lru_clock,1000);     /* all threads' */
    s->nkeys++;
    if (expire != -1) s->nexpires++;
    if (o->type == OBJ_HASH && hashTypeGetMinExpire(o,1) != EB_EXPIRE_TIME_INVALID) {
        size_t n = s->nfield_expiry++;
        if ((n & (n-1)) == 0) s->field_expiry = zrealloc(s->field_expiry,sizeof(de)*(n ? n*2 : 1));
        s->field_expiry[n] = de;
    }
    return C_OK;
}

static int openSection(slotMigLoader *l) {
    uint64_t slot = rdbLoadLen(&l->rdb,NULL);
    uint64_t keys = rdbLoadLen(&l->rdb,NULL);
    uint64_t expires = rdbLoadLen(&l->rdb,NULL);
    if (rioGetReadError(&l->rdb)) return C_ERR;
    if (slot >= CLUSTER_SLOTS || !slotSetHas(&l->slots,slot)) {
        loaderFail(l,"a section of slot %llu, which is not in this job",(unsigned long long)slot);
        return C_ERR;
    }
    if (slotSetHas(&l->seen,slot)) {
        loaderFail(l,"a second section of slot %d",(int)slot);
        return C_ERR;
    }
    slotSetAdd(&l->seen,slot);
    l->section_memory = slotmigThreadMemory();
    l->want_keys = keys;
    l->want_expires = expires;
    l->section = slotmigSectionCreate(slot,keys,expires);
    if (l->commands) l->section->commands = sdsempty();
    return C_OK;
}

/* Hands the open section over if it is what the source says. */
static int closeSection(slotMigLoader *l, const char *text, size_t len, uint64_t crc, uint64_t bytes) {
    slotMigSection *s = l->section;
    slotRdbSection said;

    if (s == NULL || !slotRdbParseSection(text,len,&said)) {
        loaderFail(l,"a section's end that is none, at offset %llu",(unsigned long long)l->offset);
        return C_ERR;
    }
    if (said.slot != s->slot || said.keys != s->nkeys || said.expires != s->nexpires ||
        s->nkeys != l->want_keys || s->nexpires != l->want_expires || said.bytes != bytes)
    {
        loaderFail(l,"slot %d arrived with %llu keys, %llu expires, %llu bytes where the source "
            "sent %llu, %llu, %llu",s->slot,s->nkeys,s->nexpires,(unsigned long long)bytes,
            (unsigned long long)said.keys,(unsigned long long)said.expires,(unsigned long long)said.bytes);
        return C_ERR;
    }
    if (said.crc != crc) {
        loaderFail(l,"slot %d arrived damaged: CRC %016llx where the source sent %016llx",s->slot,
            (unsigned long long)crc,(unsigned long long)said.crc);
        return C_ERR;
    }
    said.offset = l->section_offset;
    slotRdbIndexAdd(&l->index,&said);
    if (l->file) slotmigFileSection(l->file,s->slot,l->offset);
    s->bytes = bytes;
    s->point = said.point;
    s->memory = sectionMemory(l);
    l->section = NULL;
    atomicSet(l->open_memory,0);
    atomicIncr(l->done_memory,s->memory);
    put(&l->done,&s->handed);
    triggerEventNotifier(l->notifier);
    return C_OK;
}

static int checkIndex(slotMigLoader *l, const char *text, size_t len) {
    sds mine = slotRdbIndexText(&l->index);
    int same = sdslen(mine) == len && memcmp(mine,text,len) == 0;
    sdsfree(mine);
    if (!same) loaderFail(l,"the snapshot's index is not the one of its sections");
    return same ? C_OK : C_ERR;
}

static int loadAux(slotMigLoader *l, uint64_t crc, uint64_t bytes, int *indexed) {
    int res = C_OK;
    sds name = rdbGenericLoadStringObject(&l->rdb,RDB_LOAD_SDS,NULL);
    if (name == NULL) return C_ERR;
    sds value = rdbGenericLoadStringObject(&l->rdb,RDB_LOAD_SDS,NULL);
    if (value == NULL) {
        sdsfree(name);
        return C_ERR;
    }
    if (!strcmp(name,SLOT_RDB_AUX_SECTION)) {
        res = closeSection(l,value,sdslen(value),crc,bytes);
    } else if (!strcmp(name,SLOT_RDB_AUX_INDEX)) {
        res = checkIndex(l,value,sdslen(value));
        *indexed = res == C_OK;
    }
    sdsfree(name);
    sdsfree(value);
    return res;
}

/* Take in the bytes of a module's value. The record names its type and consists
 * of fields that say what they are, so its end can be found without the module. */
static int captureModuleValue(slotMigLoader *l, uint64_t *id) {
    rio *rdb = &l->rdb;
    uint64_t opcode, n;
    float f;
    double d;
    sds text;
    l->capture = sdsempty();
    *id = rdbLoadLen(rdb,NULL);
    if (rioGetReadError(rdb)) return C_ERR;
    if (slotmigLoaderModuleType(*id)) return C_OK;
    while ((opcode = rdbLoadLen(rdb,NULL)) != RDB_MODULE_OPCODE_EOF) {
        if (rioGetReadError(rdb)) return C_ERR;
        switch (opcode) {
        case RDB_MODULE_OPCODE_SINT:
        case RDB_MODULE_OPCODE_UINT:
            if (rdbLoadLenByRef(rdb,NULL,&n) == -1) return C_ERR;
            break;
        case RDB_MODULE_OPCODE_FLOAT:
            if (rdbLoadBinaryFloatValue(rdb,&f) == -1) return C_ERR;
            break;
        case RDB_MODULE_OPCODE_DOUBLE:
            if (rdbLoadBinaryDoubleValue(rdb,&d) == -1) return C_ERR;
            break;
        case RDB_MODULE_OPCODE_STRING:
            if ((text = rdbGenericLoadStringObject(rdb,RDB_LOAD_SDS,NULL)) == NULL) return C_ERR;
            sdsfree(text);
            break;
        default:
            loaderFail(l,"a module's value with an unknown field in slot %d at offset %llu",l->section->slot,
                (unsigned long long)l->offset);
            return C_ERR;
        }
    }
    return C_OK;
}

/* A module's value is kept for the main thread; *decode: it need not be. */
static int loadModuleValue(slotMigLoader *l, sds key, long long expire, long long lfu, long long lru,
                           long long lru_clock, int *decode)
{
    slotMigSection *s = l->section;
    uint64_t id;
    int res = captureModuleValue(l,&id);
    sds bytes = l->capture;
    l->capture = NULL;
    *decode = 0;
    if (res == C_ERR) {
        sdsfree(bytes);
        return C_ERR;
    }
    if (slotmigLoaderModuleType(id)) {
        if (l->commands) l->capture = sdsdup(bytes);
        l->replay = bytes;
        l->replayed = 0;
        *decode = 1;
        return C_OK;
    }
    if ((s->nraw & (s->nraw-1)) == 0) s->raw = zrealloc(s->raw,sizeof(*s->raw)*(s->nraw ? s->nraw*2 : 1));
    if (l->commands) addCommand(s,RDB_TYPE_MODULE_2,key,bytes,expire,lfu,lru);
    s->raw[s->nraw++] = (slotMigRawValue){ key, bytes, expire, lfu, lru, lru_clock };
    s->nkeys++;
    if (expire != -1) s->nexpires++;
    return C_OK;
}

static int loadKey(slotMigLoader *l, int type, long long expire, long long lfu, long long lru, long long lru_clock) {
    slotMigSection *s = l->section;
    int error;
    if (s == NULL) {
        loaderFail(l,"a key outside of a section, at offset %llu",(unsigned long long)l->offset);
        return C_ERR;
    }
    sds key = rdbGenericLoadStringObject(&l->rdb,RDB_LOAD_SDS,NULL);
    if (key == NULL) return C_ERR;
    if ((int)keyHashSlot(key,sdslen(key)) != s->slot) {
        loaderFail(l,"a key of slot %d in the section of slot %d",(int)keyHashSlot(key,sdslen(key)),s->slot);
        sdsfree(key);
        return C_ERR;
    }
    if (type == RDB_TYPE_MODULE_2) {
        int decode;
        if (loadModuleValue(l,key,expire,lfu,lru,lru_clock,&decode) == C_ERR) {
            sdsfree(key);
            return C_ERR;
        }
        if (!decode) return C_OK;
    }
    if (l->commands && l->capture == NULL) l->capture = sdsempty();
    robj *o = rdbLoadObject(type,&l->rdb,key,0,&error);
    sds value = l->capture;
    l->capture = NULL;
    if (o && value) addCommand(s,type,key,value,expire,lfu,lru);
    sdsfree(value);
    if (o == NULL) {
        loaderFail(l,"a value of slot %d cannot be read at offset %llu",s->slot,(unsigned long long)l->offset);
        sdsfree(key);
        return C_ERR;
    }
    if (slotmigSectionAdd(s,key,o,expire,lfu,lru,lru_clock) == C_ERR) {
        loaderFail(l,"a key twice in the section of slot %d",s->slot);
        sdsfree(key);
        decrRefCount(o);
        return C_ERR;
    }
    return C_OK;
}

/* The whole snapshot. C_ERR: l->error tells why. */
static int loadSnapshot(slotMigLoader *l) {
    rio *rdb = &l->rdb;
    char magic[10] = {0};
    int indexed = 0;
    long long expire = -1, lfu = -1, lru = -1, lru_clock = LRU_CLOCK();

    if (rioRead(rdb,magic,9) == 0) return C_ERR;
    int version = memcmp(magic,"REDIS",5) ? 0 : atoi(magic+5);
    if (version < 12 || version > RDB_VERSION) {
        loaderFail(l,"what arrives at offset 0 is not an RDB of a version that this node reads");
        return C_ERR;
    }
    for (;;) {
        int type = rdbLoadType(rdb);
        if (type == -1) return C_ERR;
        switch (type) {
        case RDB_OPCODE_SLOT_INFO:
            if (l->section) {
                loaderFail(l,"slot %d has no end",l->section->slot);
                return C_ERR;
            }
            /* The section's sum starts with the opcode just read. */
            loaderSum(l,1);
            l->outer_crc = l->crc;
            l->crc = 0;
            l->section_offset = l->offset-1;
            if (openSection(l) == C_ERR) return C_ERR;
            break;
        case RDB_OPCODE_AUX: {
            uint64_t crc = 0, bytes = 0;
            if (l->section) {   /* it ended before the opcode just read */
                loaderSum(l,1);
                crc = l->crc;
                bytes = l->offset-1 - l->section_offset;
                l->crc = slotRdbCombineCrc(l->outer_crc,crc,bytes);
            }
            if (loadAux(l,crc,bytes,&indexed) == C_ERR) return C_ERR;
            if (l->section) {
                loaderFail(l,"slot %d has no end",l->section->slot);
                return C_ERR;
            }
            break;
        }
        case RDB_OPCODE_SELECTDB:
            if (rdbLoadLen(rdb,NULL) != 0) {
                loaderFail(l,"a database other than 0 at offset %llu",(unsigned long long)l->offset);
                return C_ERR;
            }
            break;
        case RDB_OPCODE_RESIZEDB:
            rdbLoadLen(rdb,NULL);
            rdbLoadLen(rdb,NULL);
            if (rioGetReadError(rdb)) return C_ERR;
            break;
        case RDB_OPCODE_EXPIRETIME_MS:
            expire = rdbLoadMillisecondTime(rdb,version);
            if (rioGetReadError(rdb)) return C_ERR;
            if (expire < 1) expire = 1;             /* gone for ever as well, and RESTORE can say it */
            break;
        case RDB_OPCODE_FREQ: {
            uint8_t byte;
            if (rioRead(rdb,&byte,1) == 0) return C_ERR;
            lfu = byte;
            break;
        }
        case RDB_OPCODE_IDLE:
            if ((lru = rdbLoadLen(rdb,NULL)) == (long long)RDB_LENERR) return C_ERR;
            if (lru < 0 || lru > UINT32_MAX) lru = UINT32_MAX;      /* seconds; the same for RESTORE */
            break;
        case RDB_OPCODE_EOF: {
            uint64_t sum;
            loaderSum(l,0);
            uint64_t mine = l->crc;
            if (rioRead(rdb,&sum,8) == 0) return C_ERR;
            memrev64ifbe(&sum);
            if (l->section || !indexed || sum != mine) {
                loaderFail(l,"the snapshot ends without its index or with a wrong sum");
                return C_ERR;
            }
            return C_OK;
        }
        default:
            if (!rdbIsObjectType(type)) {
                loaderFail(l,"an unknown record of type %d at offset %llu",type,(unsigned long long)l->offset);
                return C_ERR;
            }
            if (loadKey(l,type,expire,lfu,lru,lru_clock) == C_ERR) return C_ERR;
            expire = lfu = lru = -1;
        }
    }
}

static void *loaderMain(void *arg) {
    slotMigLoader *l = arg;
    redis_set_thread_title("slot_loader");
    makeThreadKillable();
    slotmigBackground();
    this_reader = &l->reader;
    zmallocPopulates(l->huge_pages != SLOTMIG_HUGE_PAGES_NO,l->huge_pages == SLOTMIG_HUGE_PAGES_YES ? 0 :
        slotmigFailPoint(FP_target_slow_pages) ? 1 : HUGE_PAGE_PATIENCE);
    int res = loadSnapshot(l);
    if (zmallocPopulatesEnd())
        serverLog(LL_VERBOSE,"Slots arrive in small pages: the system takes long to make huge ones (cluster-slot-migration-huge-pages)");
    if (res == C_ERR) loaderFail(l,"the snapshot cannot be read at offset %llu",(unsigned long long)l->offset);
    slotmigSectionFree(l->section);
    l->section = NULL;
    if (l->file) slotmigFileEnd(l->file,res == C_OK);
    atomicSet(l->open_memory,0);
    sdsfree(l->capture);
    sdsfree(l->replay);
    this_reader = NULL;
    __atomic_store_n(&l->state,res == C_OK ? 1 : -1,__ATOMIC_RELEASE);
    triggerEventNotifier(l->notifier);
    return NULL;
}

/* ---- the main thread's side ---- */

static void loaderWoken(struct aeEventLoop *el, int fd, void *data, int mask) {
    UNUSED(el); UNUSED(fd); UNUSED(mask);
    slotMigLoader *l = data;
    handleEventNotifier(l->notifier);
    if (slotmigMustNotExecute()) return;
    slotMigWork was = slotmigWork(WORK_checks);
    l->wake(l->arg);  /* may free the loader; else the timer comes */
    slotmigWork(was);
}

/* Takes the connection; must not be called from inside one of its handlers. `wake(arg)` is called
 * on the main thread when there is something new. `patient`: the connection may be
 * silent for any time; `tee`: keep what is read for slotmigLoaderTeed(); `commands`: make them
 * for each section; `file`: write it
 * there, too, and call slotmigFileEnd(). NULL: no thread or no descriptor could be had; the
 * connection is then still the caller's. */
slotMigLoader *slotmigLoaderStart(connection *conn, const slotSet *slots, int patient, int tee, int commands, slotMigFile *file,
                                  void (*wake)(void*), void *arg)
{
    slotMigLoader *l = zcalloc(sizeof(*l));
    l->rdb.read = loaderRead;
    l->rdb.tell = loaderTell;
    l->conn = conn;
    l->tls = conn->type != connectionTypeTcp();
    l->slots = *slots;
    l->patient = patient;
    l->huge_pages = slotmig_config.huge_pages;
    l->tee = tee;
    l->commands = commands;
    l->file = file;
    slotSetClear(&l->seen);
    slotRdbIndexInit(&l->index);
    l->idle_limit = server.repl_timeout*1000LL;
    slotmigReaderInit(&l->reader,1);
    l->wake = wake;
    l->arg = arg;
    l->notifier = createEventNotifier();
    if (l->notifier == NULL) goto err;
    if (aeCreateFileEvent(server.el,getReadEventFd(l->notifier),AE_READABLE,loaderWoken,l) == AE_ERR) goto err;

    connUnbindEventLoop(conn);      /* from here on it is the thread's */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK,&all,&before);
    int res = pthread_create(&l->thread,NULL,loaderMain,l);
    pthread_sigmask(SIG_SETMASK,&before,NULL);
    if (res == 0) return l;
    connRebindEventLoop(conn,server.el);
    aeDeleteFileEvent(server.el,getReadEventFd(l->notifier),AE_READABLE);
err:
    if (file) slotmigFileEnd(file,0);
    if (l->notifier) freeEventNotifier(l->notifier);
    zfree(l);
    return NULL;
}

slotMigSection *slotmigLoaderNext(slotMigLoader *l) {
    slotMigSection *s = take(&l->taken,&l->done);
    if (s) atomicDecr(l->done_memory,s->memory);
    return s;
}

sds slotmigLoaderTeed(slotMigLoader *l) {
    struct teed *t = take(&l->taken_teed,&l->teed);
    if (t == NULL) return NULL;
    sds bytes = t->bytes;
    atomicDecr(l->teed_bytes,sdslen(bytes));
    zfree(t);
    return bytes;
}

void slotmigLoaderPace(slotMigLoader *l, long long rate, int paused) {
    atomicSet(l->rate,rate);
    atomicSet(l->paused,paused);
}

size_t slotmigLoaderMemory(slotMigLoader *l) {
    size_t open, done;
    atomicGet(l->open_memory,open);
    atomicGet(l->done_memory,done);
    return open+done;
}

/* As the loader's thread would, for types that must be decoded here. */
robj *slotmigDecodeValue(const slotMigRawValue *v, sds *error) {
    slotMigReader reader = { .on_main = 1, .validates = 1 };
    rio rdb;
    int code;
    rioInitWithBuffer(&rdb,v->bytes);
    this_reader = &reader;
    robj *o = rdbLoadObject(RDB_TYPE_MODULE_2,&rdb,v->key,0,&code);
    this_reader = NULL;
    if (o == NULL) {
        *error = sdscatprintf(sdsempty(),"key '%.64s': %s",v->key,reader.error[0] ? reader.error : "its value cannot be read");
        return NULL;
    }
    initObjectLRUOrLFU(o);
    objectSetLRUOrLFU(o,v->lfu,v->lru,v->lru_clock,1000);
    return o;
}

int slotmigLoaderState(slotMigLoader *l, const char **error, unsigned long long *bytes) {
    int state = __atomic_load_n(&l->state,__ATOMIC_ACQUIRE);    /* first: the last section was there before it */
    if (l->taken || __atomic_load_n(&l->done,__ATOMIC_RELAXED)) state = 0;
    if (error) *error = l->reader.error;   /* written before the state was */
    if (bytes) atomicGet(l->bytes,*bytes);
    return state;
}

/* Does its thread still read, whatever was taken of what it has read? */
int slotmigLoaderRuns(slotMigLoader *l) {
    return __atomic_load_n(&l->state,__ATOMIC_ACQUIRE) == 0;
}

/* To look at who it is, not to read or to close it. */
connection *slotmigLoaderConnection(const slotMigLoader *l) {
    return l->conn;
}

/* On a bio thread: the loader's may be inside of a large value. */
static void finishLoader(void *args[]) {
    slotMigLoader *l = args[0];
    pthread_join(l->thread,NULL);
    freeEventNotifier(l->notifier);
    connClose(l->conn);
    slotMigSection *s;
    sds bytes;
    while ((s = slotmigLoaderNext(l)) != NULL) slotmigSectionFree(s);
    while ((bytes = slotmigLoaderTeed(l)) != NULL) sdsfree(bytes);
    slotRdbIndexFree(&l->index);
    zfree(l);
}

/* The thread is to end; what it has finished may still be taken. */
void slotmigLoaderStop(slotMigLoader *l) {
    atomicSet(l->stop,1);
    slotmigLoaderCut(l);
}

/* Its connection ends. */
void slotmigLoaderCut(slotMigLoader *l) {
    shutdown(l->conn->fd,SHUT_RDWR);    /* wakes a read; not through TLS, whose state is the thread's */
}

/* Of one that failed: because its connection ended? */
int slotmigLoaderLost(slotMigLoader *l) {
    return l->lost;     /* written before the state was */
}

/* Stops the thread; what it holds is freed in the background. */
void slotmigLoaderFree(slotMigLoader *l) {
    if (l == NULL) return;
    slotmigLoaderStop(l);
    aeDeleteFileEvent(server.el,getReadEventFd(l->notifier),AE_READABLE);
    bioCreateLazyFreeJob(finishLoader,1,l);
}
