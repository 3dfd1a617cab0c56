/* ebuckets_slotmig.c -- where ebAdd() will put an item, ahead of time.
 *
 * Included at the end of ebuckets.c, whose tree and segments are private.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

/* The first item of the bucket into which one that expires at `when` would come, or NULL: there is
 * no tree yet, or no such bucket. Only until the next change of `eb`; whoever may change it may call. */
eItem slotmigEbFirst(ebuckets eb, uint64_t when) {
    unsigned char key[EB_KEY_SIZE];
    raxIterator it;
    eItem first = NULL;
    if (ebIsEmpty(eb) || ebIsList(eb)) return NULL;
    bucketKey2RaxKey(EB_BUCKET_KEY(when),key);
    raxStart(&it,ebGetRaxPtr(eb));
    raxSeek(&it,"<=",key,EB_KEY_SIZE);
    if (raxNext(&it)) first = ((FirstSegHdr*)it.data)->head;
    raxStop(&it);
    return first;
}
