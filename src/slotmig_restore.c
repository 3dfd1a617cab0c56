/* slotmig_restore.c -- CLUSTER RESTORE-SLOTS: slots of an RDB file into this node.
 *
 * The file is one with an index of slots (slot_rdb.c): of a save, of CLUSTER BACKUP-SLOTS,
 * or extracted from another. One restore at a time:
 *
 *   VERIFY   a thread reads the index and the bytes of the slots, and compares each
 *            section's sum. Nothing has changed so far. Then it is checked whether this
 *            node may take them: it is their master, they are in no migration, and they are
 *            empty, unless the client said REPLACE
 *   LOAD     the same thread writes the sections, as a snapshot, to a pair of sockets; the
 *            background loader (slotmig_loader.c) reads them from there like one that comes
 *            from a node, and makes of each section dicts that nobody sees, and the commands
 *            that would make the same keys elsewhere. What is finished is put into the
 *            database slot by slot, in slices of a turn
 *
 *   main thread            reader's thread                     loader's thread
 *   opens the file ------> index, sums of the slots
 *   owner, empty? <------- verified
 *                  ------> section 7, section 12 ... ========> parses, checks, makes dicts
 *   slot 7: old keys out, <----------------------------------- section 7
 *     dicts in, MULTI ... EXEC to replicas and append-only file
 *   reply, when all are in
 *
 * A slot is restored whole or not at all, in one turn: here by moving its dicts, on the
 * replicas and in the append-only file by one transaction that deletes what was in the slot
 * and RESTOREs each key. So any Redis 8.0 follows. The transaction is made by the loader's
 * thread and only copied here. Its bytes wait for the slowest replica.
 *
 * What can still go wrong in LOAD is told with the slot and ends it: a value that is damaged
 * under a right sum, a module that is missing, no memory; a slot that got another owner, a
 * migration or keys in the meantime. Slots before it are restored then, those behind are as
 * they were. It also ends when the client goes, and when the keys are flushed.
 *
 * A file is chosen by the client, and reading any file of the system for it would be a hole:
 * it must lie in the node's directory, where CONFIG SET dir is not allowed either
 * (enable-protected-configs).
 *
 * Threads. The reader owns what is above the line in its struct until its phase has ended.
 * Everything else is the main thread's.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"
#include "bio.h"
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define TICK 1                      /* ms between two looks */
#define LOADED_MAX (64*1024*1024)   /* bytes of finished sections that wait here; above, the loader does */
#define OUTPUT_MAX (16*1024*1024)   /* bytes that a replica has not taken yet; above, the next slot waits */

/* ---- the reader's thread ---- */

typedef struct slotReader {
    slotRdbFile file;
    slotSet slots;                  /* asked for; after VERIFY: of them in the file */
    slotSet missing;                /* of those asked for */
    int out;                        /* the loader's sockets; -1: VERIFY */
    char why[200];                  /* one sentence, "" when it succeeded */
    /* ---------------------------------------------------------------- */
    pthread_t thread;
    redisAtomic int ended, stop;
    int runs;                       /* the thread is to be joined; main thread only */
} slotReader;

static void readerFail(slotReader *r, const char *fmt, ...) __attribute__((format(printf,2,3)));
static void readerFail(slotReader *r, const char *fmt, ...) {
    va_list ap;
    va_start(ap,fmt);
    vsnprintf(r->why,sizeof(r->why),fmt,ap);
    va_end(ap);
}

static void verifyFile(slotReader *r) {
    struct slotRdbExtracted e;
    int state = slotRdbOpen(&r->file,r->file.fd), stop;
    if (state == SLOT_RDB_NONE) readerFail(r,"It has no index of slots: load it into a node of this kind and save it there.");
    else if (state != SLOT_RDB_GOOD || !slotRdbChoose(&r->file,&r->slots,&e)) readerFail(r,"%s",r->file.why);
    else if (e.slots == 0) readerFail(r,"It has none of these slots.");
    if (r->why[0]) return;
    slotSet there;
    slotSetClear(&there);
    for (int i = 0; i < r->file.index.count; i++) {
        const slotRdbSection *s = r->file.index.sections+i;
        uint64_t crc;
        if (!slotSetHas(&r->slots,s->slot)) continue;
        atomicGet(r->stop,stop);
        if (stop) return;
        if (!slotRdbSum(&r->file,s->offset,s->bytes,&crc) || !slotRdbCheckSum(&r->file,s,crc)) {
            readerFail(r,"%s",r->file.why);
            return;
        }
        slotSetAdd(&there,s->slot);
        slotSetRemove(&r->missing,s->slot);
    }
    r->slots = there;
}

static void sendFile(slotReader *r) {
    rio rdb;
    rioInitWithFd(&rdb,r->out);
    rdb.update_cksum = rioGenericUpdateChecksum;
    if (!slotRdbExtract(&r->file,&r->slots,&rdb,1))
        readerFail(r,"%s",r->file.why[0] ? r->file.why : "The loader did not take it.");
    rioFreeFd(&rdb);
    shutdown(r->out,SHUT_WR);
}

static void *readerMain(void *arg) {
    slotReader *r = arg;
    redis_set_thread_title("slot_reader");
    makeThreadKillable();
    if (r->out == -1) verifyFile(r);
    else sendFile(r);
    atomicSetWithSync(r->ended,1);
    return NULL;
}

static int readerStart(slotReader *r) {
    sigset_t all, before;
    r->ended = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK,&all,&before);
    int res = pthread_create(&r->thread,NULL,readerMain,r);
    pthread_sigmask(SIG_SETMASK,&before,NULL);
    r->runs = res == 0;
    return r->runs;
}

static int readerEnded(slotReader *r) {
    int ended;
    atomicGetWithSync(r->ended,ended);
    return ended;
}

static void readerClose(slotReader *r) {
    close(r->file.fd);
    if (r->out != -1) close(r->out);
    slotRdbClose(&r->file);
    zfree(r);
}

/* On a bio thread: it may be inside of a long read. */
static void joinReader(void *args[]) {
    slotReader *r = args[0];
    pthread_join(r->thread,NULL);
    readerClose(r);
}

/* ---- a restore ---- */

static struct {
    uint64_t client;                /* that waits; 0: none runs */
    sds path;
    int replace;
    slotReader *reader;
    slotMigLoader *loader;          /* NULL: VERIFY */
    slotMigSection *section;        /* taken from it, its modules' values are being decoded */
    int more;                       /* sections are left for the next slice */
    const char *doomed;
    slotSet done;
    unsigned long long keys, replaced;
    mstime_t started;
} restore;

/* Its timer sees that there is none. */
static void endRestore(void) {
    slotmigSectionDrop(restore.section);
    slotmigLoaderFree(restore.loader);
    atomicSet(restore.reader->stop,1);
    if (restore.reader->runs) bioCreateLazyFreeJob(joinReader,1,restore.reader);
    else readerClose(restore.reader);
    sdsfree(restore.path);
    memset(&restore,0,sizeof(restore));
}

static void answer(client *c, int failed) {
    updateStatsOnUnblock(c,0,0,failed);
    unblockClient(c,1);
}

/* Takes `why`, a sentence without its end. */
static void failed(sds why) {
    client *c = slotmigBlockedClient(restore.client);
    sds done = restore.done.count ? sdscatprintf(sdsempty(),"; %d of %d slots were restored before, the others are as they were",
        restore.done.count,restore.reader->slots.count) : sdsnew("; no slot was restored");
    serverLog(LL_WARNING,"Restore of slots from %s: %s%s",restore.path,why,done);
    if (c) {
        addReplyErrorFormat(c,"%s%s",why,done);
        answer(c,1);
    }
    sdsfree(why);
    sdsfree(done);
    endRestore();
}

static void succeeded(void) {
    client *c = slotmigBlockedClient(restore.client);
    serverLog(LL_NOTICE,"Restore of slots from %s: %d slots with %llu keys in %lld ms, %llu keys were replaced",restore.path,
        restore.done.count,restore.keys,(long long)(mstime()-restore.started),restore.replaced);
    if (c) {
        addReplyMapLen(c,4);
        slotmigReplyNumber(c,"slots",restore.done.count);
        slotmigReplyNumber(c,"keys",restore.keys);
        slotmigReplyNumber(c,"keys-replaced",restore.replaced);
        sds missing = slotmigCommaRanges(&restore.reader->missing);
        slotmigReplyText(c,"not-in-file",missing);
        sdsfree(missing);
        c->woff = server.master_repl_offset;    /* for WAIT */
        answer(c,0);
    }
    endRestore();
}

/* ---- checks ---- */

static sds checkNode(void) {
    if (!clusterNodeIsMaster(server.cluster->myself)) return sdsnew("this node is a replica: send the command to its master");
    if (server.cluster->state != CLUSTER_OK) return sdsnew("the cluster is down as this node sees it: see CLUSTER INFO");
    if (writeCommandsDeniedByDiskError() != DISK_ERROR_TYPE_NONE)
        return sdsnew("this node does not accept writes because it cannot write its data to disk: see its log");
    if (slotmigAofRenamed())
        return sdscatprintf(sdsempty(),"the command '%s' was renamed (rename-command), and what is restored goes to replicas and to "
            "the append-only file as commands: give it its name back",slotmigAofRenamed());
    return NULL;
}

/* May this slot be put in here, now? */
static sds checkSlot(int slot) {
    slotSet one;
    slotSetClear(&one);
    slotSetAdd(&one,slot);
    sds error = slotmigCheckServed(&one);
    if (error) return error;
    slotMigJob *job = slotmigJobOfSlot(slot);
    if (job) return sdscatprintf(sdsempty(),"slot %d is in slot migration %.40s: wait for its end, or cancel it",slot,job->id);
    if (server.cluster->migrating_slots_to[slot] || server.cluster->importing_slots_from[slot])
        return sdscatprintf(sdsempty(),"slot %d is being moved key by key: wait for its end, or CLUSTER SETSLOT %d STABLE",slot,slot);
    unsigned long keys = kvstoreDictSize(server.db[0].keys,slot);
    if (keys && !restore.replace)
        return sdscatprintf(sdsempty(),"slot %d has %lu keys: say REPLACE to have them replaced by the file's",slot,keys);
    return NULL;
}

/* ---- a slot into the database ---- */

/* To the replicas and the append-only file, as one transaction. */
static void propagate(int slot, int replaced, sds commands) {
    int aof = server.aof_state == AOF_ON || (server.aof_state == AOF_WAIT_REWRITE && server.child_type == CHILD_TYPE_AOF);
    int argc = 0;
    robj **argv = NULL;
    if (replaced) {
        slotSet one;
        slotSetClear(&one);
        slotSetAdd(&one,slot);
        argv = slotmigDeleteArgs(&one,&argc);
    }
    if (aof) {
        feedAppendOnlyFile(0,&shared.multi,1);
        if (argc) feedAppendOnlyFile(0,argv,argc);
        server.aof_buf = sdscatsds(server.aof_buf,commands);
        feedAppendOnlyFile(0,&shared.exec,1);
    }
    replicationFeedSlaves(server.slaves,0,&shared.multi,1);
    if (argc) replicationFeedSlaves(server.slaves,0,argv,argc);
    feedReplicationBuffer(commands,sdslen(commands));
    replicationFeedSlaves(server.slaves,0,&shared.exec,1);
    for (int i = 0; i < argc; i++) decrRefCount(argv[i]);
    zfree(argv);
}

/* Who blocks on a key of the slot looks again. */
static void wakeBlocked(int slot) {
    redisDb *db = server.db;
    dictEntry *de;
    if (dictSize(db->blocking_keys) == 0) return;
    list *keys = listCreate();
    dictIterator *di = dictGetIterator(db->blocking_keys);
    while ((de = dictNext(di)) != NULL) {
        robj *key = dictGetKey(de);
        if ((int)keyHashSlot(key->ptr,sdslen(key->ptr)) == slot) listAddNodeTail(keys,key);
    }
    dictReleaseIterator(di);
    listIter li;
    listNode *ln;
    listRewind(keys,&li);
    while ((ln = listNext(&li)) != NULL) {
        robj *key = listNodeValue(ln);
        dictEntry *there = kvstoreDictFind(db->keys,slot,key->ptr);
        if (there) signalKeyAsReady(db,key,((robj*)dictGetVal(there))->type);
        else signalDeletedKeyAsReady(db,key,OBJ_STREAM);        /* XREADGROUP is told that its stream is gone */
    }
    listRelease(keys);
}

/* What was in the slot goes to *limbo, which is made when there is none yet. */
static void putSlot(slotMigSection *s, slotMigLimbo **limbo) {
    redisDb *db = server.db;
    slotSet one;
    slotSetClear(&one);
    slotSetAdd(&one,s->slot);
    if (kvstoreDictSize(db->keys,s->slot) && *limbo == NULL) {
        *limbo = slotmigLimboCreate();
        slotmigLimboIsReplaced(*limbo);
    }
    unsigned long long replaced = *limbo ? slotmigLimboTake(*limbo,s->slot) : 0;
    if (kvstoreSize(s->keys)) kvstoreMoveDict(s->keys,0,db->keys,s->slot);
    if (kvstoreSize(s->expires)) kvstoreMoveDict(s->expires,0,db->expires,s->slot);
    slotmigRegisterHashes(db,s->field_expiry,s->nfield_expiry);
    slotmigAofSlotBack(s->slot);        /* the transaction tells */
    propagate(s->slot,replaced != 0,s->commands);
    slotmigTouchWatchedKeys(&one);
    wakeBlocked(s->slot);
    server.dirty += replaced+s->nkeys;
    slotSetAdd(&restore.done,s->slot);
    restore.keys += s->nkeys;
    restore.replaced += replaced;
}

/* What must be decoded here, until the clock reads `until`. 1: all is, 0: not yet, -1: *error. */
static int decodeValues(slotMigSection *s, monotime until, sds *error) {
    while (s->decoded < s->nraw) {
        slotMigRawValue *v = s->raw+s->decoded;
        slotMigWork was = slotmigWork(WORK_decode);
        robj *o = slotmigDecodeValue(v,error);
        slotmigWork(was);
        if (o == NULL) return -1;
        if (slotmigSectionAddDecoded(s,v->key,o,v->expire) == C_ERR) {
            *error = sdscatprintf(sdsempty(),"key '%.64s' is there twice",v->key);
            decrRefCount(o);
            return -1;
        }
        sdsfree(v->bytes);
        s->decoded++;
        if (getMonotonicUs() >= until) return s->decoded == s->nraw;
    }
    return 1;
}

/* Must slots wait? */
static int outputIsFull(void) {
    listIter li;
    listNode *ln;
    if (isPausedActionsWithUpdate(PAUSE_ACTION_CLIENT_WRITE|PAUSE_ACTION_CLIENT_ALL|PAUSE_ACTION_REPLICA)) return 1;
    listRewind(server.slaves,&li);
    while ((ln = listNext(&li)) != NULL) {
        client *c = listNodeValue(ln);
        if (getClientOutputBufferMemoryUsage(c) > OUTPUT_MAX) return 1;    /* also while it copies everything */
    }
    return 0;
}

/* Finished sections, in a slice. 0: the restore is over. */
static int takeSections(void) {
    monotime until = slotmigSliceEnd();
    slotMigLimbo *limbo = NULL;
    int put = 0, ok = 1, more = 0;
    while (!outputIsFull()) {
        if (restore.section == NULL && (restore.section = slotmigLoaderNext(restore.loader)) == NULL) break;
        slotMigSection *s = restore.section;
        sds error = NULL;
        int res = decodeValues(s,until,&error);
        if ((more = res == 0)) break;
        if (error == NULL) error = checkNode();
        if (error == NULL) error = checkSlot(s->slot);
        if (error == NULL) error = slotmigCheckMemory();
        if (error) {
            failed(sdscatprintf(sdsempty(),"slot %d is not restored: %s",s->slot,error));
            sdsfree(error);
            ok = 0;
            break;
        }
        putSlot(s,&limbo);
        put = 1;
        slotmigSectionDrop(s);
        restore.section = NULL;
        if ((more = getMonotonicUs() >= until)) break;
    }
    restore.more = ok && more;
    slotmigLimboFree(limbo);
    if (put && server.tracking_clients) trackingInvalidateKeysOnFlush(1);
    return ok;
}

/* ---- the phases ---- */

static void loaderWoken(void *unused) {
    UNUSED(unused);     /* the timer comes soon */
}

/* The file is what it was written to be. May the node take its slots? */
static void verified(void) {
    slotReader *r = restore.reader;
    pthread_join(r->thread,NULL);
    r->runs = 0;
    sds error = checkNode();
    for (int j = slotSetNext(&r->slots,0); j != -1 && error == NULL; j = slotSetNext(&r->slots,j+1)) error = checkSlot(j);
    connection *conn = error ? NULL : slotmigPipe(&r->out,&error);
    if (conn) {
        fcntl(r->out,F_SETFL,0);    /* the reader waits for the loader */
        restore.loader = slotmigLoaderStart(conn,&r->slots,1,0,1,NULL,loaderWoken,NULL);
        if (restore.loader == NULL) {
            connClose(conn);
            error = sdsnew("cannot start the loader's thread: the node is out of threads or descriptors");
        }
    }
    if (error == NULL && readerStart(r)) return;
    failed(error ? error : sdsnew("cannot start the reader's thread: the node is out of threads"));
}

static void stepRestore(void) {
    slotReader *r = restore.reader;
    const char *error;
    if (restore.doomed) {
        failed(sdsnew(restore.doomed));
    } else if (slotmigBlockedClient(restore.client) == NULL) {
        failed(sdsnew("the client went"));
    } else if (restore.loader == NULL) {
        if (!readerEnded(r)) return;
        if (r->why[0]) failed(sdscatprintf(sdsempty(),"'%s' is not restored from: %s",restore.path,r->why));
        else verified();
    } else if (takeSections() && restore.section == NULL) {
        int state = slotmigLoaderState(restore.loader,&error,NULL);
        slotmigLoaderPace(restore.loader,0,outputIsFull() && slotmigLoaderMemory(restore.loader) > LOADED_MAX);
        if (state == 1) succeeded();
        else if (state == -1 && !slotmigLoaderLost(restore.loader)) failed(sdscatprintf(sdsempty(),"'%s' cannot be loaded: %s",restore.path,error));
        /* The reader ended it, and says why. */
        else if (state == -1 && readerEnded(r)) failed(sdscatprintf(sdsempty(),"'%s' cannot be loaded: %s",restore.path,r->why));
    }
}

static int ticking;

static int tick(struct aeEventLoop *el, long long id, void *data) {
    UNUSED(el); UNUSED(id); UNUSED(data);
    if (slotmigMustNotExecute()) return TICK;
    slotMigWork was = slotmigWork(WORK_restore);
    if (restore.client) stepRestore();
    slotmigWork(was);
    ticking = restore.client != 0;
    return !ticking ? AE_NOMORE : restore.more ? 0 : TICK;
}

/* ---- from outside ---- */

void slotmigRestoreFlushed(void) {
    if (restore.client) restore.doomed = "the node's keys were flushed in the middle";
}

void slotmigRestoreShutdown(void) {
    if (restore.client == 0) return;
    atomicSet(restore.reader->stop,1);
    if (restore.loader) slotmigLoaderStop(restore.loader);
}

size_t slotmigRestoreMemory(void) {
    size_t memory = restore.loader ? slotmigLoaderMemory(restore.loader) : 0;
    return memory + (restore.section ? restore.section->memory : 0);
}

/* Its name without links, if this client may have it read; the caller's to zlibc_free(). What is
 * outside is not told from what is not there. */
static char *allowedPath(client *c, const char *path) {
    char *name = realpath(path,NULL);
    int no = errno;
    char *dir = realpath(".",NULL);
    size_t len = dir ? strlen(dir) : 0;
    int inside = name && dir && !strncmp(name,dir,len) && (name[len] == '/' || len == 1);
    int anywhere = allowProtectedAction(server.enable_protected_configs,c);
    if (!inside && !anywhere)
        addReplyErrorFormat(c,"'%s' is no file in this node's directory %s: put it there, or start the node with enable-protected-configs",
            path,dir ? dir : ".");
    else if (name == NULL)
        addReplyErrorFormat(c,"'%s' cannot be opened: %s",path,strerror(no));
    zlibc_free(dir);
    if (inside || anywhere) return name;
    zlibc_free(name);
    return NULL;
}

/* -1, with an error. */
static int openFile(client *c, const char *path) {
    struct stat sb;
    char *name = allowedPath(c,path);
    if (name == NULL) return -1;
    int fd = open(name,O_RDONLY|O_NONBLOCK|O_NOFOLLOW|O_CLOEXEC);    /* nothing that makes us wait */
    int no = errno;
    zlibc_free(name);
    if (fd != -1 && fstat(fd,&sb) == 0 && S_ISREG(sb.st_mode)) return fd;
    if (fd == -1) {
        addReplyErrorFormat(c,"'%s' cannot be opened: %s",path,strerror(no));
    } else {
        addReplyErrorFormat(c,"'%s' is not a file",path);
        close(fd);
    }
    return -1;
}

/* The slots of all that are asked for are checked when it is known which the file has. */
void slotmigRestore(client *c, const char *path, const slotSet *slots, int replace) {
    if (!slotmigMayBlock(c)) return;
    sds error = restore.client ? sdscatprintf(sdsempty(),"slots are being restored from '%s': wait for its end",restore.path) : checkNode();
    int fd = error ? -1 : openFile(c,path);
    if (error) addReplyErrorFormat(c,"%s",error);
    sdsfree(error);
    if (fd == -1) return;
    slotReader *r = zcalloc(sizeof(*r));
    r->file.fd = fd;
    r->slots = r->missing = *slots;
    r->out = -1;
    restore.path = sdsnew(path);
    restore.replace = replace;
    restore.reader = r;
    restore.started = mstime();
    slotSetClear(&restore.done);
    if (!ticking) ticking = aeCreateTimeEvent(server.el,TICK,tick,NULL,NULL) != AE_ERR;
    if (!ticking || !readerStart(r)) {
        addReplyError(c,"cannot start the reader's thread: the node is out of threads");
        endRestore();
        return;
    }
    restore.client = c->id;
    slotmigBlockClient(c);
}
