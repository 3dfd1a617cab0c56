/* slot_rdb_ahead.c -- memory that serializing and loading will need, asked for ahead of its use.
 *
 * To serialize a dict is to wait for memory: buckets, entries, keys and values lie anywhere, and
 * each is reached through the one before. So is it to fill one that is larger than the cache. Asked
 * for some steps ahead of their use they come side by side. A prefetch of what is not there is no
 * fault.
 *
 * Threads: any that may look at the dict, or change it; nothing here is shared.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "server.h"
#include "slot_rdb_ahead.h"

/* upstream's, not declared in its headers */
void rdbReportError(int corruption_error, int linenum, char *reason, ...) __attribute__((format(printf,3,4)));

#define SORTED_SET_MAX (16*1024)

static void prefetchKey(const char *p) {
    __builtin_prefetch(p-1);            /* the kind of a string is before it */
}

static void prefetchBytes(const char *p) {
    for (int i = -1; i < 128; i += 64) __builtin_prefetch(p+i);
}

static void prefetchEntry(const dictEntry *de) {
    __builtin_prefetch((void*)((uintptr_t)de & ~(uintptr_t)7));     /* the bits tell its kind */
}

/* ---- to serialize ---- */

void aheadInit(aheadIterator *a, dict *d) {
    a->asked = 0;
    a->first = a->n = 0;
    dictInitIterator(&a->it,d);
}

/* Asks for the entries of buckets 2*AHEAD before the iterator comes to them: some at each step, for
 * a burst would have to wait itself. */
static dictEntry *nextEntry(aheadIterator *a) {
    dict *d = a->it.d;
    if (a->it.table == 0) {
        unsigned long buckets = DICTHT_SIZE(d->ht_size_exp[0]), to = a->it.index + 1 + 2*AHEAD;
        if (to > buckets) to = buckets;
        if ((long)a->asked <= a->it.index) a->asked = a->it.index + 1;  /* it leaps over those that were moved to the other table */
        for (; a->asked < to; a->asked++)
            if (d->ht_table[0][a->asked]) prefetchEntry(d->ht_table[0][a->asked]);
    }
    dictEntry *de = dictNext(&a->it);
    if (a->it.nextEntry) prefetchEntry(a->it.nextEntry);
    return de;
}

dictEntry *aheadNext(aheadIterator *a) {
    dictEntry *de;
    int values = !a->it.d->type->no_value;
    while (a->n < AHEAD && (de = nextEntry(a)) != NULL) {
        prefetchKey(dictGetKey(de));
        if (values) prefetchBytes(dictGetVal(de));
        a->coming[(a->first + a->n++) % AHEAD] = de;
    }
    if (a->n == 0) return NULL;
    de = a->coming[a->first];
    a->first = (a->first+1) % AHEAD;
    a->n--;
    return de;
}

void aheadKeysInit(aheadKeys *a, dict *keys) {
    aheadInit(&a->a,keys);
    a->first = a->n = 0;
}

dictEntry *aheadKeysNext(aheadKeys *a) {
    dictEntry *de;
    while (a->n < AHEAD/2 && (de = aheadNext(&a->a)) != NULL) {
        robj *o = dictGetVal(de);
        if (o->refcount != OBJ_SHARED_REFCOUNT && o->encoding != OBJ_ENCODING_INT && o->encoding != OBJ_ENCODING_EMBSTR) prefetchBytes(o->ptr);
        a->coming[(a->first + a->n++) % (AHEAD/2)] = de;
    }
    if (a->n == 0) return NULL;
    de = a->coming[a->first];
    a->first = (a->first+1) % (AHEAD/2);
    a->n--;
    return de;
}

/* Members and nodes of a sorted set, which is serialized by its skiplist: but for a large one, which
 * would not stay in the cache. */
void aheadSortedSet(zset *zs) {
    aheadIterator a;
    if (dictSize(zs->dict) < AHEAD || dictSize(zs->dict) > SORTED_SET_MAX || dictBuckets(zs->dict) > 8*dictSize(zs->dict)) return;
    aheadInit(&a,zs->dict);
    while (aheadNext(&a)) continue;
}

/* ---- to load ---- */

#define LOAD_AHEAD 16
#define IN_CACHE_EXP 10                 /* a table of so many buckets, as a power of two, is in the cache anyway */

static dictEntry **bucketOf(dict *d, uint64_t hash) {
    return &d->ht_table[0][hash & DICTHT_SIZE_MASK(d->ht_size_exp[0])];
}

/* Asks for what dictAdd() of these keys will look at. */
static void prefetchPlaces(dict *d, void **keys, int n) {
    dictEntry **buckets[LOAD_AHEAD];
    if (d->ht_size_exp[0] <= IN_CACHE_EXP || dictIsRehashing(d)) return;
    for (int i = 0; i < n; i++) __builtin_prefetch(buckets[i] = bucketOf(d,dictGetHash(d,keys[i])));
    for (int i = 0; i < n; i++) if (*buckets[i]) prefetchEntry(*buckets[i]);
    for (int i = 0; i < n; i++) if (*buckets[i]) prefetchKey(dictGetKey(*buckets[i]));
}

int slotRdbLoadDict(rio *rdb, dict *d, uint64_t *left, int hash) {
    void *keys[LOAD_AHEAD], *values[LOAD_AHEAD];
    int kind = hash ? RDB_LOAD_HFLD : RDB_LOAD_SDS, res = C_OK;
    while (*left && res == C_OK) {
        int n = 0, added = 0;
        for (; n < LOAD_AHEAD && *left && res == C_OK; --*left) {
            values[n] = NULL;
            if ((keys[n] = rdbGenericLoadStringObject(rdb,kind,NULL)) == NULL) res = C_ERR;
            else if (n++, hash && (values[n-1] = rdbGenericLoadStringObject(rdb,RDB_LOAD_SDS,NULL)) == NULL) res = C_ERR;
        }
        dictUseStoredKeyApi(d,hash);
        if (res == C_OK) prefetchPlaces(d,keys,n);
        while (res == C_OK && added < n) {
            if (dictAdd(d,keys[added],values[added]) == DICT_OK) added++;
            else res = C_ERR, rdbReportError(1,__LINE__,"Duplicate %s detected",hash ? "hash fields" : "set members");
        }
        dictUseStoredKeyApi(d,0);
        for (; added < n; added++) {
            if (hash) hfieldFree(keys[added]);
            else sdsfree(keys[added]);
            sdsfree(values[added]);
        }
    }
    *left = 0;
    return res;
}
