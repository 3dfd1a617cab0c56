/* slotload: a load generator that watches what moving slots does to clients.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * The parts:
 *
 *   main.c     the command line
 *   cluster.c  a small cluster client: topology, connections, redirections
 *   dataset.c  `load`    fill a cluster with a reproducible data set
 *   keys.c     the keys that `run` writes, and whether each write is still there
 *   run.c      `run`     open-loop reads and writes, latency histograms
 *   digest.c   `digest`  one number for the contents of a range of slots
 *   watch.c    `watch`   stalls, processor time and memory of server processes
 *   report.c   results as JSON or as "name value" lines
 *
 * Everything runs in one thread around one ppoll() loop. */

#ifndef SLOTLOAD_H
#define SLOTLOAD_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "hiredis.h"

#define SLOTS 16384

/* ------------------------------------------------------------- cluster.c */

struct request;

/* Called once for each request, with its final reply, or with reply == NULL
 * and a sentence in 'failure'. The request is freed after the call. */
typedef void doneFunction(struct request *rq, redisReply *reply,
                          const char *failure);

typedef struct request {
    struct request *next;   /* In the one queue that holds the request. */
    char *command;          /* In the wire format, to be sent again. */
    size_t length;
    int slot;
    int node;               /* Node it must go to, -1: whoever serves the slot. */
    int idempotent;         /* May be sent again when a connection is lost. */
    int skipReplies;        /* 1 when ASKING was sent in front of it. */
    int phase;              /* Which counters its redirections go to. */
    int attempts;
    uint64_t offset;        /* Where it starts in its connection's output. */
    int64_t sent;           /* When it was put there, microseconds. */
    int64_t intended;       /* When it should have been sent, microseconds. */
    int64_t due;            /* In the delay queue: when to send it again. */
    const char *why;        /* Why it waits in the delay queue. */
    doneFunction *done;
    int kind, index;        /* For the owner of the request. */
    int64_t expected;
    void *owner;
} request;

/* What the servers answered besides results, per phase. */
typedef struct redirections {
    long long moved, ask, tryagain, clusterdown, lost, refreshes;
    unsigned char movedSlots[SLOTS]; /* MOVED replies a slot, up to 255. */
} redirections;

#define MAX_PHASES 16

typedef struct clusterOptions {
    const char *host;
    int port;
    const char *user, *password; /* NULL when there is none. */
    int connections;        /* A node. */
    int64_t retryFor;       /* Give a request up after so long, microseconds. */
    int64_t timeout;        /* Close a connection that is silent so long. */
} clusterOptions;

extern redirections clusterRedirections[MAX_PHASES];

void clusterInit(const clusterOptions *options);
void clusterFree(void);
void clusterRefresh(void);
int clusterNodes(void);                 /* Masters with slots, now. */
int clusterNode(int i);                 /* The i-th of them, for request.node. */
const char *clusterNodeName(int node);  /* host:port */
int clusterOwner(int slot);             /* Node that serves a slot, or -1. */
void clusterSend(request *rq);          /* Takes ownership. */
long long clusterPending(void);         /* Requests without an answer yet. */
size_t clusterBuffered(void);           /* Bytes not yet written to sockets. */
void clusterPoll(int64_t until, int extraFd, int *extraReady);
void clusterAbandon(const char *failure);

request *requestNew(int slot, doneFunction *done);
void requestArgs(request *rq, int argc, const char **argv, const size_t *len);
void requestFormat(request *rq, const char *format, ...);

int keySlot(const char *key, size_t length);
int64_t nowUs(void);                    /* Monotonic, microseconds. */

/* --------------------------------------------------------------- report.c */

typedef enum reportFormat { REPORT_JSON, REPORT_FLAT } reportFormat;

void reportBegin(FILE *to, reportFormat format);
void reportOpen(const char *name);      /* Of an object. */
void reportClose(void);
void reportInteger(const char *name, long long value);
void reportReal(const char *name, double value);
void reportString(const char *name, const char *value);
void reportEnd(void);

/* ------------------------------------------------------------------ main.c */

typedef struct slotRanges {
    unsigned char in[SLOTS];
    int count;
} slotRanges;

void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
uint64_t randomNext(uint64_t *state);
double randomUnit(uint64_t *state);     /* In [0,1). */
int readLines(void (*obey)(char *line)); /* From standard input; 0 at its end. */

/* A server process for `watch`. */
typedef struct watchedNode {
    const char *name, *host;
    int port, pid;
} watchedNode;
#define MAX_WATCHED 32

typedef struct options {
    clusterOptions cluster;
    const char *command;
    uint64_t seed;
    slotRanges slots;
    const char *output;                 /* File of the report, NULL: stdout. */
    reportFormat format;
    /* load */
    int64_t bytes;
    double bigShare, hugeShare, stringShare;
    double ttlShare;
    int64_t giant;                      /* Bytes of one more hash, alone in the data. */
    int noVectors;
    int hideProgress;
    /* run */
    double rate;
    double seconds;
    double warmup;
    double readShare, movingShare, multiShare, dataShare;
    int uniform;                        /* Equal gaps instead of Poisson's. */
    int keys;                           /* Written, in moving and in other slots each. */
    int valueSize;
    long long dataKeys;                 /* Strings that `load` has made. */
    int dataMoving;                     /* It made them in the moving slots only. */
    const char *timeline;               /* File with a line for each tenth of a second. */
    const char *firstPhase;
    const char *status;                 /* File with a line of the present state. */
    const char *journal;
    const char *laps;                   /* File with a line for each lap. */
    double drain;
    int noVerify;
    /* digest */
    const char *list;                   /* File for each key's hash. */
    const char *exclude;                /* Prefix of keys that are left out. */
    /* watch */
    watchedNode watched[MAX_WATCHED];
    int watchedCount;
} options;

extern options opt;

/* ------------------------------------------- dataset.c, run.c and the rest */

int commandLoad(void);
int commandRun(void);
int commandVerify(void);
int commandDigest(void);
int commandWatch(void);

void dataStringKey(char *buffer, size_t size, long long index);

/* ------------------------------------------------------------------ keys.c */

/* What `run` knows of a key that it writes. Only one of a key's writes that
 * are not increments is under way at a time: else two that are retried at
 * different nodes could arrive in the wrong order. */
typedef struct loadKey {
    int slot;
    char tag[16];           /* The key is load:c:{tag} or load:p:{tag}:a and b. */
    int64_t base;           /* What was stored before the run. */
    int64_t acknowledged;   /* Counter: value that acknowledged increments make.
                               Pair: highest sequence acknowledged. */
    int64_t unknown;        /* Counter: increments sent that nobody answered. */
    int64_t sequence;       /* Pair: last sequence sent. */
    request *waiting, *waitingLast; /* Pair: writes behind the one under way. */
    int busy;
} loadKey;

enum { KEY_COUNTER, KEY_PAIR, KEY_KINDS };
enum { SET_MOVING, SET_OTHER, SETS };

typedef struct keyVerdict {
    long long keys, acknowledged, lost, keysWithLoss, excess, torn, unread;
    char example[160];      /* The first loss, in words. */
} keyVerdict;

extern loadKey *loadKeys[SETS][KEY_KINDS];

void keysCreate(void);
void keysReadBack(int asBase, keyVerdict *verdict);
void keysWriteJournal(const char *path);
void keysReadJournal(const char *path);
void keysReport(const keyVerdict *verdict);
int64_t keysParsePair(const char *value, size_t length);
int keysPairValue(char *buffer, size_t size, int64_t sequence);

#endif
