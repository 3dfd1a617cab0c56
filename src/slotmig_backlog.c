/* slotmig_backlog.c -- the stream once more, from the replication backlog: for a
 * target that attaches again and has all of it up to some offset.
 *
 * The backlog is what replicas were sent, in the protocol of clients: commands one
 * behind the other, the commands of a unit between MULTI and EXEC. It is read in
 * pieces, cut into units, and given to slotmig_feed.c as if each had just happened. A
 * replica's backlog has the same bytes at the same offsets, so its promoted node can
 * do that as well.
 *
 * History. Offsets mean something together with the replication id only. A promoted
 * replica goes on from its old master's history (replid2) up to where it was then.
 * What a target has got beyond that never happened there: it has to drop it.
 *
 * While a node is the source of a job its backlog is not trimmed below
 * cluster-slot-migration-backlog-size.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"

#define PIECE (64*1024)         /* bytes copied from the backlog at a time */
#define UNIT_MAX (1024*1024*1024LL)     /* bytes of a unit; a longer one is not the stream's */

/* upstream's, not declared in its headers */
int redisOpArrayAppend(redisOpArray *oa, int dbid, robj **argv, int argc, int target);

struct slotMigReplay {
    long long offset;           /* of the stream, where `buf` begins */
    sds buf;                    /* as far as it was copied */
    size_t pos;                 /* in `buf`, behind the last whole command */
    redisOpArray unit;          /* commands of an open transaction */
    int in_multi;
};

slotMigReplay *slotmigReplayCreate(long long offset) {
    slotMigReplay *r = zcalloc(sizeof(*r));
    r->offset = offset;
    r->buf = sdsempty();
    return r;
}

void slotmigReplayFree(slotMigReplay *r) {
    if (r == NULL) return;
    redisOpArrayFree(&r->unit);
    zfree(r->unit.ops);
    sdsfree(r->buf);
    zfree(r);
}

/* Up to which offset do a target's history, as it names it, and ours agree? -1: they
 * have nothing in common that the backlog still reaches. */
long long slotmigAgreedOffset(const char *replid, long long offset) {
    replBacklog *b = server.repl_backlog;
    long long agreed = offset;
    if (b == NULL || offset < 0) return -1;
    if (!memcmp(replid,server.replid,CONFIG_RUN_ID_SIZE)) {
        if (offset > server.master_repl_offset) return -1;
    } else if (!memcmp(replid,server.replid2,CONFIG_RUN_ID_SIZE) && server.second_replid_offset > 0) {
        if (agreed > server.second_replid_offset-1) agreed = server.second_replid_offset-1;
    } else {
        return -1;
    }
    return agreed+1 >= b->offset ? agreed : -1;
}

/* Appends bytes of the stream from behind `offset` on, about `max` at most. C_ERR: the
 * backlog does not reach back so far any more. */
static int copyBacklog(long long offset, sds *buf, size_t max) {
    replBacklog *b = server.repl_backlog;
    long long first = offset+1;     /* number of the first byte wanted */
    if (b == NULL || first < b->offset) return C_ERR;
    listNode *ln = b->ref_repl_buf_node;
    if (raxSize(b->blocks_index)) {
        uint64_t key = htonu64((uint64_t)first);
        raxIterator it;
        raxStart(&it,b->blocks_index);
        raxSeek(&it,"<=",(unsigned char*)&key,sizeof(key));
        if (raxNext(&it)) ln = it.data;
        raxStop(&it);
    }
    for (; ln && max; ln = listNextNode(ln)) {
        replBufBlock *o = listNodeValue(ln);
        if (o->repl_offset + (long long)o->used <= first) continue;
        size_t at = first > o->repl_offset ? first - o->repl_offset : 0, n = o->used - at;
        if (n > max) n = max;
        *buf = sdscatlen(*buf,o->buf+at,n);
        first += n;
        max -= n;
    }
    return C_OK;
}

/* "<type>number\r\n" at *p. 1: *n is set and *p behind it, 0: not all of it is here, -1: it is
 * something else. */
static int takeNumber(const char **p, const char *end, char type, long long *n) {
    const char *nl;
    if (*p == end) return 0;
    if (**p != type) return -1;
    if ((nl = memchr(*p,'\n',end-*p)) == NULL) return end-*p > 32 ? -1 : 0;
    if (nl-*p < 3 || nl[-1] != '\r' || !string2ll(*p+1,nl-1-(*p+1),n) || *n < 0) return -1;
    *p = nl+1;
    return 1;
}

/* The next command into *argv, *argc (the caller's). 1: there is one, 0: not all of it is
 * here, -1: these are not commands. */
static int takeCommand(slotMigReplay *r, robj ***argv, int *argc) {
    const char *p = r->buf+r->pos, *end = r->buf+sdslen(r->buf);
    long long n, len;
    int res;
    while (p < end && (*p == '\n' || *p == '\r')) p++;      /* between commands: a master's sign of life */
    r->pos = p - r->buf;
    if ((res = takeNumber(&p,end,'*',&n)) != 1) return res;
    if (n < 1 || n > INT_MAX/2) return -1;
    const char *args = p;
    for (long long i = 0; i < n; i++) {     /* is all of it here? */
        if ((res = takeNumber(&p,end,'$',&len)) != 1) return res;
        if (len > UNIT_MAX) return -1;
        if (end-p < len+2) return 0;
        p += len+2;
    }
    *argc = n;
    *argv = zmalloc(sizeof(robj*)*n);
    const char *q = args;
    for (int i = 0; i < n; i++) {
        takeNumber(&q,end,'$',&len);
        (*argv)[i] = createStringObject(q,len);
        q += len+2;
    }
    r->pos = p - r->buf;
    return 1;
}

static void freeCommand(robj **argv, int argc) {
    for (int i = 0; i < argc; i++) decrRefCount(argv[i]);
    zfree(argv);
}

/* Feed what is behind, until the clock reads `until`, `bytes` of the job's stream were
 * sent or the end is reached. 1: it is reached, what happens from now on is to be fed
 * as it happens; 0: not yet; -1: it cannot be done, *error tells why (a constant). To be
 * called between execution units. */
int slotmigReplayStep(slotMigReplay *r, slotMigJob *job, monotime until, unsigned long long bytes, const char **error) {
    unsigned long long sent = job->stream_bytes;
    for (;;) {
        robj **argv;
        int argc, res = takeCommand(r,&argv,&argc);
        if (res == -1 || sdslen(r->buf) > UNIT_MAX) {
            *error = "the replication backlog has something that is not understood";
            return -1;
        }
        if (res == 0) {
            sdsrange(r->buf,r->pos,-1);
            r->offset += r->pos;
            r->pos = 0;
            long long there = r->offset + sdslen(r->buf);
            if (there == server.master_repl_offset) {
                if (!r->in_multi && sdslen(r->buf) == 0) return 1;
                *error = "the replication backlog ends in the middle of a unit";
                return -1;
            }
            if (copyBacklog(there,&r->buf,PIECE+sdslen(r->buf)) == C_ERR) {
                *error = "the replication backlog does not reach back any more (cluster-slot-migration-backlog-size)";
                return -1;
            }
            continue;
        }
        if (!strcasecmp(argv[0]->ptr,"multi")) {
            r->in_multi = 1;
            freeCommand(argv,argc);
            continue;
        }
        int ends = !r->in_multi;
        if (r->in_multi && !strcasecmp(argv[0]->ptr,"exec")) {
            freeCommand(argv,argc);
            ends = 1;
        } else {
            redisOpArrayAppend(&r->unit,0,argv,argc,PROPAGATE_REPL);
        }
        if (!ends) continue;
        r->in_multi = 0;
        slotmigFeedAgain(job,&r->unit,r->offset+r->pos);
        redisOpArrayFree(&r->unit);
        if (job->stream_bytes - sent >= bytes || getMonotonicUs() >= until) return 0;
    }
}
