/* slot_rdb_extract.c -- some slots of a slot-sectioned RDB, as an RDB of their own.
 *
 * Finds their sections by the file's index and copies them as they are: no key is
 * decoded, and what the file has of other slots is not read. What is written is the same
 * format (slot_rdb.c) with an index and sums of its own, so it loads anywhere, and slots
 * can be extracted from it again. Functions, modules' data beside the keys, and what the
 * file tells of replication belong to no slot and are left out.
 *
 * The sum of each section is compared while it is copied, so a damaged one is known when
 * it has been written: the output is only good when all of it succeeded.
 *
 * Used by redis-check-rdb --extract-slots and, on a thread of its own, by
 * CLUSTER RESTORE-SLOTS.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "slot_rdb.h"

#define PIECE (256*1024)            /* bytes copied at once */
#define OLDEST 12                   /* RDB version; older ones had no slots */

/* Can this file's sections be read here, and what does it have of these slots? */
int slotRdbChoose(slotRdbFile *f, const slotSet *slots, struct slotRdbExtracted *e) {
    memset(e,0,sizeof(*e));
    if (f->version < OLDEST || f->version > RDB_VERSION) {
        snprintf(f->why,sizeof(f->why),"It is an RDB of version %d, this program reads %d to %d: use a newer one.",
            f->version,OLDEST,RDB_VERSION);
        return 0;
    }
    for (int i = 0; i < f->index.count; i++) {
        const slotRdbSection *s = f->index.sections+i;
        if (!slotSetHas(slots,s->slot)) continue;
        e->slots++;
        e->keys += s->keys;
        e->expires += s->expires;
        e->bytes += s->bytes;
    }
    return 1;
}

static int copySection(slotRdbFile *f, const slotRdbSection *s, slotRdbWriter *w, char *buf) {
    slotRdbSectionOpen(w,s->slot,s->keys,s->expires);
    for (uint64_t at = 0, len; at < s->bytes; at += len) {
        len = s->bytes-at < PIECE ? s->bytes-at : PIECE;
        if (!slotRdbRead(f,s->offset+at,buf,len) || rioWrite(w->rdb,buf,len) == 0) return 0;
    }
    slotRdbSectionEnd(w);
    return slotRdbCheckSum(f,s,w->section.crc);
}

/* The rio sums what is written to it. */
int slotRdbExtract(slotRdbFile *f, const slotSet *slots, rio *out, int fields) {
    struct slotRdbExtracted e;
    slotRdbWriter w;
    f->why[0] = '\0';
    if (!slotRdbChoose(f,slots,&e)) return 0;
    slotRdbWriterInit(&w,out,out->processed_bytes);
    char *buf = zmalloc(PIECE);
    int ok = slotRdbHead(out,e.keys,e.expires) != -1;
    for (int i = 0; ok && i < f->index.count; i++) {
        const slotRdbSection *s = f->index.sections+i;
        if (!slotSetHas(slots,s->slot)) continue;
        ok = copySection(f,s,&w,buf) && (!fields || slotRdbWriteSectionAux(&w,0) != -1);
    }
    ok = ok && slotRdbWriteEnd(&w) != -1;
    zfree(buf);
    slotRdbWriterFree(&w);
    return ok;
}
