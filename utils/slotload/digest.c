/* One number for the contents of a range of slots.
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * For every key in the slots, asked from the node that serves it: its name, its
 * type, the server's own digest of its value (DEBUG DIGEST-VALUE), the expire
 * time of each hash field that has one, and for a stream its groups, consumers
 * and pending entries (XINFO STREAM FULL). DEBUG DIGEST-VALUE alone says only
 * *whether* a key or a field expires, and ignores groups. The keys' hashes are
 * added up, so their order is irrelevant.
 *
 * The keys' expire times, to the millisecond, make a second digest of their
 * own: MIGRATE sends the time that is left, so a move key by key shifts them.
 *
 * The servers need `enable-debug-command local`. Nobody may write meanwhile.
 *
 * --list writes a line "slot key hash expiretime" for each key: where two digests differ, a
 * diff of the sorted lists names the keys.
 *
 * Also counted: strays, keys on a node that does not serve their slot. They are
 * what is left of a move that was not cleaned up. */

#include <stdlib.h>
#include <string.h>

#include "slotload.h"

#define KEYS_A_COMMAND 500
#define MOST_PENDING 256

/* Type and expire time of each key, and for a hash the fields that expire. */
static const char *script =
    "local all = {} "
    "for _, key in ipairs(KEYS) do "
    "  local kind = redis.call('TYPE', key).ok "
    "  local one = {kind, redis.call('PEXPIRETIME', key)} "
    "  if kind == 'hash' then "
    "    local fields = redis.call('HKEYS', key) "
    "    table.sort(fields) "
    "    for from = 1, #fields, 1000 do "
    "      local to = math.min(from + 999, #fields) "
    "      local times = redis.call('HPEXPIRETIME', key, 'FIELDS', to - from + 1, unpack(fields, from, to)) "
    "      for i, time in ipairs(times) do "
    "        if time ~= -1 then one[#one+1] = fields[from+i-1]; one[#one+1] = time end "
    "      end "
    "    end "
    "  end "
    "  all[#all+1] = one "
    "end "
    "return all";

typedef struct hash128 {
    uint64_t a, b;
} hash128;

/* A part of the contents: the keys of one slot, or some of them. */
typedef struct batch {
    int slot, node;
    redisReply *keys;           /* Owned; the names. */
    size_t from, count;
    hash128 *hashes;            /* One a key. */
    long long *expires;         /* Likewise; below 0: the key does not expire. */
    int waiting;                /* Replies to come. */
} batch;

static const hash128 hashStart = { 0xcbf29ce484222325ULL, 0x9e3779b97f4a7c15ULL };
static hash128 total, totalExpires;
static FILE *list;              /* Of every key's hash, or NULL. */
static long long keyCount, expireCount, fieldExpireCount, excluded;
static long long served, present;

/* FNV-1a twice, from two starting points, with a final mix: contents that
 * differ by accident must not look equal. It is not meant against malice. */
static void mix(hash128 *h, const void *data, size_t length) {
    const unsigned char *p = data;
    uint64_t a = h->a, b = h->b;
    for (size_t i = 0; i < length; i++) {
        a = (a ^ p[i]) * 0x100000001b3ULL;
        b = (b ^ p[i]) * 0x100000001b3ULL;
        b ^= b >> 29;
    }
    /* The length parts what is mixed in next from this. */
    h->a = (a ^ length) * 0xff51afd7ed558ccdULL;
    h->b = (b ^ length) * 0xc4ceb9fe1a85ec53ULL;
    h->a ^= h->a >> 33;
    h->b ^= h->b >> 31;
}

static void mixReply(hash128 *h, const redisReply *r) {
    mix(h, &r->type, sizeof(r->type));
    if (r->type == REDIS_REPLY_INTEGER) {
        mix(h, &r->integer, sizeof(r->integer));
    } else if (r->type == REDIS_REPLY_ARRAY) {
        for (size_t i = 0; i < r->elements; i++) mixReply(h, r->element[i]);
    } else if (r->str) {
        mix(h, r->str, r->len);
    }
}

/* Unless the reply is what was asked for there is no digest. */
static void need(const request *rq, const redisReply *reply, const char *failure, int type) {
    if (!reply) die("digest: slot %d: %s", rq->slot, failure);
    if (reply->type == REDIS_REPLY_ERROR) die("digest: slot %d: %s", rq->slot, reply->str);
    if (reply->type != type) die("digest: slot %d: an unexpected type of reply", rq->slot);
}

/* One line of --list. */
static void listKey(const redisReply *key, int slot, hash128 h, long long expires) {
    fprintf(list, "%d ", slot);
    for (size_t i = 0; i < key->len; i++) {
        unsigned char c = (unsigned char)key->str[i];
        if (c > 32 && c < 127 && c != '\\') fputc(c, list);
        else fprintf(list, "\\x%02x", c);
    }
    fprintf(list, " %016llx%016llx %lld\n", (unsigned long long)h.a, (unsigned long long)h.b, expires);
}

static void batchDone(batch *b) {
    if (--b->waiting) return;
    for (size_t i = 0; i < b->count; i++) {
        total.a += b->hashes[i].a;
        total.b += b->hashes[i].b;
        const redisReply *key = b->keys->element[b->from+i];
        if (b->expires[i] >= 0) {
            hash128 h = hashStart;
            mix(&h, key->str, key->len);
            mix(&h, &b->expires[i], sizeof(b->expires[i]));
            totalExpires.a += h.a;
            totalExpires.b += h.b;
            expireCount++;
        }
        if (list) listKey(key, b->slot, b->hashes[i], b->expires[i]);
    }
    keyCount += (long long)b->count;
    freeReplyObject(b->keys);
    free(b->hashes);
    free(b->expires);
    free(b);
}

static void streamArrived(request *rq, redisReply *reply, const char *failure) {
    batch *b = rq->owner;
    need(rq, reply, failure, REDIS_REPLY_ARRAY);
    for (size_t i = 0; i+1 < reply->elements; i += 2) {
        /* The shape of the tree is an accident of its history. */
        if (strncmp(reply->element[i]->str, "radix-tree-", 11) == 0) continue;
        mixReply(&b->hashes[rq->index], reply->element[i]);
        mixReply(&b->hashes[rq->index], reply->element[i+1]);
    }
    batchDone(b);
}

static void detailsArrived(request *rq, redisReply *reply, const char *failure) {
    batch *b = rq->owner;
    need(rq, reply, failure, REDIS_REPLY_ARRAY);
    if (reply->elements != b->count) die("digest: slot %d: keys come and go", b->slot);
    for (size_t i = 0; i < b->count; i++) {
        redisReply *one = reply->element[i];
        redisReply *key = b->keys->element[b->from+i];
        mixReply(&b->hashes[i], one->element[0]);
        b->expires[i] = one->element[1]->integer;
        for (size_t j = 2; j < one->elements; j++) mixReply(&b->hashes[i], one->element[j]);
        if (!strcmp(one->element[0]->str, "hash")) {
            fieldExpireCount += (long long)(one->elements-2)/2;
        } else if (!strcmp(one->element[0]->str, "stream")) {
            request *more = requestNew(b->slot, streamArrived);
            more->owner = b;
            more->index = (int)i;
            b->waiting++;
            requestFormat(more, "XINFO STREAM %b FULL COUNT 0", key->str, key->len);
            clusterSend(more);
        }
    }
    batchDone(b);
}

/* Values are digested first and details mixed in later, always in this order:
 * both are sent on one connection. */
static void valuesArrived(request *rq, redisReply *reply, const char *failure) {
    batch *b = rq->owner;
    need(rq, reply, failure, REDIS_REPLY_ARRAY);
    if (reply->elements != b->count) die("digest: slot %d: keys come and go", b->slot);
    for (size_t i = 0; i < b->count; i++) {
        redisReply *key = b->keys->element[b->from+i];
        b->hashes[i] = hashStart;
        mix(&b->hashes[i], key->str, key->len);
        mix(&b->hashes[i], reply->element[i]->str, reply->element[i]->len);
    }
    batchDone(b);
}

static void askBatch(batch *b) {
    size_t most = b->count + 3;
    const char **argv = malloc(most*sizeof(*argv));
    size_t *len = malloc(most*sizeof(*len));
    char number[32];
    if (!argv || !len) die("out of memory");
    for (size_t i = 0; i < b->count; i++) {
        argv[i+3] = b->keys->element[b->from+i]->str;
        len[i+3] = b->keys->element[b->from+i]->len;
    }
    b->waiting = 2;

    argv[1] = "DEBUG";
    argv[2] = "DIGEST-VALUE";
    for (int i = 1; i < 3; i++) len[i] = strlen(argv[i]);
    request *rq = requestNew(b->slot, valuesArrived);
    rq->node = b->node; /* DEBUG names no keys that could be redirected. */
    rq->owner = b;
    requestArgs(rq, (int)b->count+2, argv+1, len+1);
    clusterSend(rq);

    snprintf(number, sizeof(number), "%zu", b->count);
    argv[0] = "EVAL_RO";
    argv[1] = script;
    argv[2] = number;
    for (int i = 0; i < 3; i++) len[i] = strlen(argv[i]);
    rq = requestNew(b->slot, detailsArrived);
    rq->owner = b;
    requestArgs(rq, (int)b->count+3, argv, len);
    clusterSend(rq);
    free(argv);
    free(len);
}

/* The names of a slot's keys: leave out those that are not wanted, and ask for
 * the others in handfuls. Each batch gets its own array of names. */
static void namesArrived(request *rq, redisReply *reply, const char *failure) {
    need(rq, reply, failure, REDIS_REPLY_ARRAY);
    size_t prefix = opt.exclude ? strlen(opt.exclude) : 0;
    size_t i = 0;
    while (i < reply->elements) {
        batch *b = calloc(1, sizeof(*b));
        redisReply *names = calloc(1, sizeof(*names));
        redisReply **element = calloc(KEYS_A_COMMAND, sizeof(*element));
        hash128 *hashes = calloc(KEYS_A_COMMAND, sizeof(*hashes));
        long long *expires = calloc(KEYS_A_COMMAND, sizeof(*expires));
        if (!b || !names || !element || !hashes || !expires) die("out of memory");
        names->type = REDIS_REPLY_ARRAY;
        names->element = element;
        for (; i < reply->elements && names->elements < KEYS_A_COMMAND; i++) {
            redisReply *key = reply->element[i];
            if (prefix && key->len >= prefix && !memcmp(key->str, opt.exclude, prefix)) {
                excluded++;
                continue;
            }
            element[names->elements++] = key;
            reply->element[i] = NULL; /* Taken over; freeReplyObject() allows it. */
        }
        b->slot = rq->slot;
        b->node = clusterOwner(rq->slot);
        b->keys = names;
        b->count = names->elements;
        b->hashes = hashes;
        b->expires = expires;
        if (b->count) {
            askBatch(b);
        } else {
            b->waiting = 1;
            batchDone(b);
        }
    }
}

static void countArrived(request *rq, redisReply *reply, const char *failure) {
    need(rq, reply, failure, REDIS_REPLY_INTEGER);
    *(long long*)rq->owner += reply->integer;
}

static void countStrays(void) {
    for (int i = 0; i < clusterNodes(); i++) {
        request *rq = requestNew(-1, countArrived);
        rq->node = clusterNode(i);
        rq->owner = &present;
        requestFormat(rq, "DBSIZE");
        clusterSend(rq);
    }
    for (int slot = 0; slot < SLOTS; slot++) {
        if (clusterOwner(slot) < 0) continue;
        request *rq = requestNew(slot, countArrived);
        rq->node = clusterOwner(slot);
        rq->owner = &served;
        requestFormat(rq, "CLUSTER COUNTKEYSINSLOT %d", slot);
        clusterSend(rq);
        while (clusterPending() > 1000) clusterPoll(nowUs() + 10000, -1, NULL);
    }
    while (clusterPending()) clusterPoll(nowUs() + 10000, -1, NULL);
}

static void reportHash(const char *name, hash128 h) {
    char text[40];
    snprintf(text, sizeof(text), "%016llx%016llx", (unsigned long long)h.a, (unsigned long long)h.b);
    reportString(name, text);
}

int commandDigest(void) {
    int64_t start = nowUs();

    if (opt.list && !(list = fopen(opt.list, "w"))) die("cannot write %s", opt.list);
    clusterInit(&opt.cluster);
    for (int slot = 0; slot < SLOTS; slot++) {
        if (opt.slots.count && !opt.slots.in[slot]) continue;
        if (clusterOwner(slot) < 0) die("digest: no node serves slot %d", slot);
        request *rq = requestNew(slot, namesArrived);
        rq->node = clusterOwner(slot);
        requestFormat(rq, "CLUSTER GETKEYSINSLOT %d %d", slot, 1<<30);
        clusterSend(rq);
        while (clusterPending() > MOST_PENDING) clusterPoll(nowUs() + 10000, -1, NULL);
    }
    while (clusterPending()) clusterPoll(nowUs() + 10000, -1, NULL);
    countStrays();
    if (list && fclose(list) != 0) die("cannot write %s", opt.list);

    reportInteger("keys", keyCount);
    reportInteger("expiring_keys", expireCount);
    reportInteger("expiring_fields", fieldExpireCount);
    reportInteger("excluded", excluded);
    reportInteger("strays", present - served);
    reportHash("digest", total);
    reportHash("digest_of_expire_times", totalExpires);
    reportReal("seconds", (double)(nowUs()-start)/1e6);
    clusterFree();
    return 0;
}
