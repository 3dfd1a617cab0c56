/* kvstore_slotmig.c -- move one dict between two kvstores in O(1), or all of them.
 *
 * Included at the end of kvstore.c because it keeps that file's private
 * counters true: key and bucket counts, the binary indexed tree, the list of
 * dicts that are rehashing, the histograms of key sizes. A slot is attached to
 * a database and detached from it with this and nothing else.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#define KVSTORE_FEW_DICTS 64    /* up to so many, moving each costs less than looking at all places */

/* Account for `delta` keys that came or went at once in dict `didx`, which has
 * them already (or no more). cumulativeKeyCountAdd() only counts one by one. */
static void kvstoreAccountDict(kvstore *kvs, int didx, long long delta) {
    kvs->key_count += delta;
    if (delta > 0) kvs->non_empty_dicts++;
    else if (delta < 0) kvs->non_empty_dicts--;
    if (kvs->num_dicts == 1) return;
    for (int idx = didx+1; idx <= kvs->num_dicts; idx += idx & -idx)
        kvs->dict_size_index[idx] += delta;
}

/* Add (sign 1) or take away (sign -1) what a dict contributes to the sums its
 * kvstore keeps. */
static void kvstoreAccountBuckets(kvstore *kvs, dict *d, int sign) {
    unsigned long long from = 0, to = 0;
    if (dictIsRehashing(d)) {
        /* "Rehashing started" counted the new table, the old one is still in. */
        dictRehashingInfo(d,&from,&to);
        kvs->overhead_hashtable_rehashing += sign*(long long)from;
        kvs->overhead_hashtable_lut += sign*(long long)(from+to);
        kvs->bucket_count += sign*(long long)(from+to);
    } else {
        kvs->overhead_hashtable_lut += sign*(long long)dictBuckets(d);
        kvs->bucket_count += sign*(long long)dictBuckets(d);
    }
}

static void kvstoreAccountHistogram(kvstore *kvs, dict *d, int sign) {
    if (!(kvs->flags & KVSTORE_ALLOC_META_KEYS_HIST)) return;
    kvstoreDictMetaEx *meta = (kvstoreDictMetaEx *)dictMetadata(d);
    kvstoreMetadata *sum = kvstoreGetMetadata(kvs);
    for (int t = 0; t < MAX_KEYSIZES_TYPES; t++)
        for (int b = 0; b < MAX_KEYSIZES_BINS; b++)
            sum->keysizes_hist[t][b] += sign*(int64_t)meta->meta.keysizes_hist[t][b];
}

/* Move the dict `sidx` of `src` to the place `didx` of `dst`.
 *
 * Both were created with the same KVSTORE_ALLOC_META_KEYS_HIST flag and with
 * dict types that agree on keys and values. The place in `dst` holds no key (an
 * empty dict there is released). Nobody iterates over the dict (it is not
 * paused). Does nothing when `src` has no dict there. Neither kvstore may be in
 * use by another thread. */
void kvstoreMoveDict(kvstore *src, int sidx, kvstore *dst, int didx) {
    dict *d = kvstoreGetDict(src,sidx), *old = kvstoreGetDict(dst,didx);
    if (d == NULL) return;
    assert((src->flags & KVSTORE_ALLOC_META_KEYS_HIST) ==
           (dst->flags & KVSTORE_ALLOC_META_KEYS_HIST));
    assert(!dictIsRehashingPaused(d));

    if (old) {
        assert(dictSize(old) == 0 && !dictIsRehashingPaused(old));
        /* dictRelease() ends a rehash, which accounts for the old table and
         * the list node; nobody accounts for the remaining table. */
        size_t left = DICTHT_SIZE(old->ht_size_exp[dictIsRehashing(old) ? 1 : 0]);
        dst->bucket_count -= left;
        dst->overhead_hashtable_lut -= left;
        dictRelease(old);
        dst->allocated_dicts--;
    }

    kvstoreDictMetaBase *meta = (kvstoreDictMetaBase *)dictMetadata(d);
    if (meta->rehashing_node) listDelNode(src->rehashing,meta->rehashing_node);
    kvstoreAccountBuckets(src,d,-1);
    kvstoreAccountHistogram(src,d,-1);
    src->dicts[sidx] = NULL;
    src->allocated_dicts--;
    kvstoreAccountDict(src,sidx,-(long long)dictSize(d));

    /* The type leads back to the kvstore (its userdata): without this the
     * callbacks of a dict freed in the background would run on `src`. */
    d->type = &dst->dtype;
    dst->dicts[didx] = d;
    dst->allocated_dicts++;
    if (meta->rehashing_node) {
        listAddNodeTail(dst->rehashing,d);
        meta->rehashing_node = listLast(dst->rehashing);
    }
    kvstoreAccountBuckets(dst,d,1);
    kvstoreAccountHistogram(dst,d,1);
    kvstoreAccountDict(dst,didx,(long long)dictSize(d));
}

/* Move every dict of `src` to the same place of `dst`, as kvstoreMoveDict() would,
 * but with the sums moved once when there are many: in one turn of the event loop.
 * `src` is left without dicts. Both have the same number of places. */
void kvstoreMoveAll(kvstore *src, kvstore *dst) {
    assert(src->num_dicts == dst->num_dicts);
    assert((src->flags & KVSTORE_ALLOC_META_KEYS_HIST) == (dst->flags & KVSTORE_ALLOC_META_KEYS_HIST));
    if (src->allocated_dicts == 0) return;
    if (src->allocated_dicts <= KVSTORE_FEW_DICTS && src->allocated_dicts == src->non_empty_dicts) {
        /* The tree finds them without a walk over all places. */
        while (src->non_empty_dicts) {
            int i = kvstoreGetFirstNonEmptyDictIndex(src);
            kvstoreMoveDict(src,i,dst,i);
        }
        return;
    }
    for (int i = 0; i < src->num_dicts; i++) {
        dict *d = src->dicts[i], *old = dst->dicts[i];
        if (i+8 < src->num_dicts && src->dicts[i+8]) __builtin_prefetch(src->dicts[i+8],1);
        if (d == NULL) continue;
        if (old) {
            kvstoreMoveDict(src,i,dst,i);
            continue;
        }
        assert(!dictIsRehashingPaused(d));
        kvstoreDictMetaBase *meta = (kvstoreDictMetaBase *)dictMetadata(d);
        if (meta->rehashing_node) {
            listDelNode(src->rehashing,meta->rehashing_node);
            listAddNodeTail(dst->rehashing,d);
            meta->rehashing_node = listLast(dst->rehashing);
        }
        kvstoreAccountBuckets(src,d,-1);
        kvstoreAccountBuckets(dst,d,1);
        src->key_count -= dictSize(d);
        dst->key_count += dictSize(d);
        if (dictSize(d)) {
            src->non_empty_dicts--;
            dst->non_empty_dicts++;
        }
        src->allocated_dicts--;
        dst->allocated_dicts++;
        src->dicts[i] = NULL;
        dst->dicts[i] = d;
        d->type = &dst->dtype;
    }
    if (src->flags & KVSTORE_ALLOC_META_KEYS_HIST) {
        /* What is left in the source's sums belongs to the dicts just moved. */
        kvstoreMetadata *from = kvstoreGetMetadata(src), *to = kvstoreGetMetadata(dst);
        for (int t = 0; t < MAX_KEYSIZES_TYPES; t++)
            for (int b = 0; b < MAX_KEYSIZES_BINS; b++)
                to->keysizes_hist[t][b] += from->keysizes_hist[t][b];
        memset(from,0,sizeof(*from));
    }
    if (src->num_dicts > 1) {   /* the tree is a sum of its dicts */
        for (int i = 1; i <= src->num_dicts; i++) {
            if (src->dict_size_index[i] == 0) continue;     /* pages that were never touched stay so */
            dst->dict_size_index[i] += src->dict_size_index[i];
            src->dict_size_index[i] = 0;
        }
    }
}

void kvstorePrefetchDict(kvstore *kvs, int didx) {
    if (didx >= 0 && didx < kvs->num_dicts && kvs->dicts[didx]) __builtin_prefetch(kvs->dicts[didx]);
}

dict *kvstoreSlotDict(kvstore *kvs, int didx) {
    return kvs->dicts[didx];
}
