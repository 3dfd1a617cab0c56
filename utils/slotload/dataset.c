/* `load`: fill a cluster with a data set of every type.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * By bytes of keys, fields and values sent, by default:
 *
 *   40 %  h:<n>  hashes of 100 KB, 1000 fields
 *   20 %  H:<n>  hashes of 1 MB, 10000 fields
 *   35 %  s:<n>  strings of 100 bytes
 *    5 %  the rest in turn: integers, lists, sets (also of integers), sorted
 *         sets, streams with groups and pending entries, hashes whose fields
 *         expire, vector sets, HyperLogLogs, binary and empty strings; mostly
 *         small, every 40th so big that it has the type's other encoding.
 *
 * With --slots, only the keys of these slots, as many as make up the bytes. With
 * --giant, one hash and nothing else: the key whose slot is the first of --slots.
 *
 * A share of the keys expires. All times are absolute and in the year 2100, and
 * all contents come from the seed, so the same command makes the same data
 * whenever it runs. Contents are letters and digits at random: like most real
 * values they compress a little or not at all. */

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "slotload.h"

#define POOL (1024*1024)        /* Random text that values are cut from. */
#define MOST_BUFFERED (4*1024*1024)
#define MOST_PENDING 4000
#define EXPIRE_BASE 4102444800000LL     /* 2100-01-01, milliseconds. */
#define EXPIRE_SPAN (365LL*86400*1000)
#define BIG_EVERY 40            /* Of the small keys, one so often is big. */

enum { SMALL_INT, SMALL_LIST, SMALL_SET, SMALL_INTSET, SMALL_ZSET, SMALL_STREAM,
       SMALL_FIELDS, SMALL_VECTORS, SMALL_HLL, SMALL_BINARY, SMALL_EMPTY, SMALL_KINDS };

static const char *smallNames[SMALL_KINDS] = { "integers", "lists", "sets", "integer_sets",
    "sorted_sets", "streams", "hashes_with_expiring_fields", "vector_sets",
    "hyperloglogs", "binary_strings", "empty_strings" };

static char pool[POOL+1];
static uint64_t state;          /* Of the random numbers for the present key. */
static int64_t loaded, reported;
static long long expiring;
static int hasVectors;

/* The command that is being put together. Texts that are made for it live in
 * 'scratch' until it is sent. */
static const char **argv;
static size_t *argLen;
static int argCount, argSize;
static char *scratch;
static size_t scratchUsed, scratchSize;

static void arg(const char *data, size_t length) {
    if (argCount == argSize) {
        argSize = argSize ? argSize*2 : 1024;
        argv = realloc(argv, (size_t)argSize*sizeof(*argv));
        argLen = realloc(argLen, (size_t)argSize*sizeof(*argLen));
        if (!argv || !argLen) die("out of memory");
    }
    argv[argCount] = data;
    argLen[argCount++] = length;
}

static void argText(const char *text) {
    arg(text, strlen(text));
}

static void argPrint(const char *format, long long n) {
    /* Never grown while a command is put together: pointers go into it. */
    if (!scratch) {
        scratchSize = 1024*1024;
        scratch = malloc(scratchSize);
        if (!scratch) die("out of memory");
    }
    if (scratchUsed + 64 > scratchSize) die("load: a command with too many arguments");
    int n2 = snprintf(scratch + scratchUsed, 64, format, n);
    arg(scratch + scratchUsed, (size_t)n2);
    scratchUsed += (size_t)n2;
}

static uint64_t below(uint64_t limit) {
    return randomNext(&state) % limit;
}

/* A value of so many bytes. */
static void argValue(size_t length) {
    arg(pool + below(POOL - length), length);
}

static void answered(request *rq, redisReply *reply, const char *failure) {
    if (!reply) die("load: slot %d: %s", rq->slot, failure);
    if (reply->type == REDIS_REPLY_ERROR) die("load: slot %d: %s", rq->slot, reply->str);
}

static void progress(int64_t target) {
    if (opt.hideProgress || loaded - reported < 8*1024*1024) return;
    reported = loaded;
    fprintf(stderr, "\r  loading %lld of %lld MB ", (long long)loaded/1000000,
            (long long)target/1000000);
}

static void sendCommand(int slot) {
    request *rq = requestNew(slot, answered);
    requestArgs(rq, argCount, argv, argLen);
    for (int i = 1; i < argCount; i++) loaded += (int64_t)argLen[i];
    argCount = 0;
    scratchUsed = 0;
    clusterSend(rq);
    while (clusterBuffered() > MOST_BUFFERED || clusterPending() > MOST_PENDING)
        clusterPoll(nowUs() + 10000, -1, NULL);
    progress(opt.bytes);
}

/* Begin with a key: its random numbers depend on nothing but its name. */
static int startKey(char *key, size_t size, const char *format, long long n) {
    int length = snprintf(key, size, format, n);
    state = opt.seed * 0x9e3779b97f4a7c15ULL;
    for (int i = 0; i < length; i++) state = (state ^ (uint64_t)key[i]) * 0x100000001b3ULL;
    randomNext(&state);
    return keySlot(key, (size_t)length);
}

static long long expireTime(void) {
    return EXPIRE_BASE + (long long)below(EXPIRE_SPAN);
}

static void maybeExpire(const char *key, int slot) {
    if (randomUnit(&state) >= opt.ttlShare) return;
    argText("PEXPIREAT");
    argText(key);
    argPrint("%lld", expireTime());
    sendCommand(slot);
    expiring++;
}

void dataStringKey(char *buffer, size_t size, long long index) {
    snprintf(buffer, size, "s:%lld", index);
}

static int wanted(int slot) {
    return opt.slots.count == 0 || opt.slots.in[slot];
}

/* Each of these returns how many keys it has made, 0 or 1. */
static int loadString(long long n) {
    char key[32];
    int slot = startKey(key, sizeof(key), "s:%lld", n);
    if (!wanted(slot)) return 0;
    argText("SET");
    argText(key);
    argValue(100);
    if (randomUnit(&state) < opt.ttlShare) {
        argText("PXAT");
        argPrint("%lld", expireTime());
        expiring++;
    }
    sendCommand(slot);
    return 1;
}

static int loadHash(const char *format, long long n, int fields) {
    char key[32];
    int slot = startKey(key, sizeof(key), format, n);
    if (!wanted(slot)) return 0;
    argText("HSET");
    argText(key);
    for (int i = 0; i < fields; i++) {
        argPrint("f%lld", i);
        argValue(95);
    }
    sendCommand(slot);
    maybeExpire(key, slot);
    return 1;
}

/* One hash of so many bytes, in pieces, in the first of the slots. */
static void loadGiant(int64_t bytes) {
    const int pieces = 1000;
    char key[32];
    long long n = 0, field = 0;
    int first = 0, slot;

    while (opt.slots.count && !opt.slots.in[first]) first++;
    do slot = startKey(key, sizeof(key), "G:%lld", n++); while (slot != first);
    while (loaded < bytes) {
        argText("HSET");
        argText(key);
        for (int i = 0; i < pieces; i++) {
            argPrint("f%lld", field++);
            argValue(95);
        }
        sendCommand(slot);
    }
}

static void loadStream(const char *key, int slot, int entries) {
    for (int i = 0; i < entries; i++) {
        argText("XADD");
        argText(key);
        argPrint("1700000000000-%lld", i+1);
        argText("name");
        argValue(20);
        argText("value");
        argValue(20);
        sendCommand(slot);
    }
    argText("XGROUP");
    argText("CREATE");
    argText(key);
    argText("workers");
    argPrint("1700000000000-%lld", entries/2);
    sendCommand(slot);
    /* Pending entries, as if delivered at a time that is the same each run. */
    for (int i = 1; i <= 3; i++) {
        argText("XCLAIM");
        argText(key);
        argText("workers");
        argPrint("worker-%lld", i%2);
        argText("0");
        argPrint("1700000000000-%lld", i);
        argText("TIME");
        argText("1700000001000");
        argText("FORCE");
        argText("JUSTID");
        sendCommand(slot);
    }
}

/* Returns 0 when the servers do not have the type. */
static int loadSmall(int kind, long long n, int big) {
    static const char *names[SMALL_KINDS] = { "i:%lld", "l:%lld", "t:%lld", "ti:%lld", "z:%lld",
        "x:%lld", "hf:%lld", "v:%lld", "hll:%lld", "b:%lld", "e:%lld" };
    char key[32];
    int slot = startKey(key, sizeof(key), names[kind], n);
    int count = big ? 600 : 12;

    if (!wanted(slot)) return 0;

    switch (kind) {
    case SMALL_INT:
        argText("SET");
        argText(key);
        argPrint("%lld", (long long)randomNext(&state));
        break;
    case SMALL_LIST:
        argText("RPUSH");
        argText(key);
        for (int i = 0; i < count; i++) argValue(40);
        break;
    case SMALL_SET:
        argText("SADD");
        argText(key);
        for (int i = 0; i < count; i++) argValue(24);
        break;
    case SMALL_INTSET:
        argText("SADD");
        argText(key);
        for (int i = 0; i < count; i++) argPrint("%lld", (long long)below(1000000));
        break;
    case SMALL_ZSET:
        argText("ZADD");
        argText(key);
        for (int i = 0; i < count; i++) {
            argPrint("%lld.25", (long long)below(1000000));
            argValue(24);
        }
        break;
    case SMALL_STREAM:
        loadStream(key, slot, big ? 200 : 6);
        maybeExpire(key, slot);
        return 1;
    case SMALL_FIELDS:
        argText("HSET");
        argText(key);
        for (int i = 0; i < count; i++) {
            argPrint("f%lld", i);
            argValue(30);
        }
        sendCommand(slot);
        for (int i = 0; i < count; i += 4) {
            argText("HPEXPIREAT");
            argText(key);
            argPrint("%lld", expireTime());
            argText("FIELDS");
            argText("1");
            argPrint("f%lld", i);
            sendCommand(slot);
        }
        maybeExpire(key, slot);
        return 1;
    case SMALL_VECTORS:
        if (!hasVectors) return 0;
        if (big) count = 60;
        for (int i = 0; i < count; i++) {
            argText("VADD");
            argText(key);
            argText("VALUES");
            argText("8");
            for (int j = 0; j < 8; j++) argPrint("0.%03lld", (long long)below(1000));
            argPrint("item-%lld", i);
            sendCommand(slot);
        }
        maybeExpire(key, slot);
        return 1;
    case SMALL_HLL:
        argText("PFADD");
        argText(key);
        for (int i = 0; i < count; i++) argValue(12);
        break;
    case SMALL_BINARY:
        argText("SET");
        argText(key);
        arg("\0\r\n\xff\0binary", 11);
        break;
    case SMALL_EMPTY:
        argText("SET");
        argText(key);
        arg("", 0);
        break;
    }
    sendCommand(slot);
    maybeExpire(key, slot);
    return 1;
}

static void vectorsKnown(request *rq, redisReply *reply, const char *failure) {
    (void)rq;
    (void)failure;
    hasVectors = !opt.noVectors && reply && reply->type == REDIS_REPLY_ARRAY && reply->elements == 1 &&
                 reply->element[0]->type == REDIS_REPLY_ARRAY && reply->element[0]->elements > 0;
}

int commandLoad(void) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    long long strings = 0, hashes = 0, huge = 0, small[SMALL_KINDS] = {0}, n;
    long long stringNames = 0;
    int64_t start = nowUs(), before;

    state = opt.seed + 1;
    for (int i = 0; i < POOL; i++) pool[i] = letters[randomNext(&state) >> 58];
    if (!isatty(2)) opt.hideProgress = 1;

    clusterInit(&opt.cluster);
    request *rq = requestNew(0, vectorsKnown);
    requestFormat(rq, "COMMAND INFO VADD");
    clusterSend(rq);
    while (clusterPending()) clusterPoll(nowUs() + 10000, -1, NULL);

    int64_t bigBytes = (int64_t)((double)opt.bytes*opt.bigShare);
    int64_t hugeBytes = (int64_t)((double)opt.bytes*opt.hugeShare);
    int64_t stringBytes = (int64_t)((double)opt.bytes*opt.stringShare);
    if (opt.giant) {
        opt.bytes = opt.giant;
        loadGiant(opt.giant);
        bigBytes = hugeBytes = stringBytes = 0;
    }
    for (before = loaded, n = 0; loaded - before < bigBytes; n++) hashes += loadHash("h:%lld", n, 1000);
    for (before = loaded, n = 0; loaded - before < hugeBytes; n++) huge += loadHash("H:%lld", n, 10000);
    for (before = loaded; loaded - before < stringBytes; stringNames++) strings += loadString(stringNames);
    for (n = 0; loaded < opt.bytes; n++) {
        int kind = (int)(n % SMALL_KINDS);
        long long index = n / SMALL_KINDS;
        small[kind] += loadSmall(kind, index, index % BIG_EVERY == BIG_EVERY-1);
    }
    while (clusterPending()) clusterPoll(nowUs() + 10000, -1, NULL);
    if (!opt.hideProgress) fprintf(stderr, "\r                              \r");

    long long keys = strings + hashes + huge + (opt.giant != 0);
    for (int i = 0; i < SMALL_KINDS; i++) keys += small[i];
    double seconds = (double)(nowUs()-start)/1e6;
    reportInteger("bytes", loaded);
    reportInteger("keys", keys);
    reportInteger("expiring_keys", expiring);
    reportInteger("strings", strings);
    reportInteger("string_names", stringNames); /* Tried: --data-keys of `run`. */
    reportInteger("hashes_100kb", hashes);
    reportInteger("hashes_1mb", huge);
    for (int i = 0; i < SMALL_KINDS; i++) reportInteger(smallNames[i], small[i]);
    reportReal("seconds", seconds);
    clusterFree();
    return 0;
}
