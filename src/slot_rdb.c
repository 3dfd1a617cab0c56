/* slot_rdb.c -- the slot-sectioned RDB: sections, index, trailer.
 *
 * In cluster mode upstream writes an RDB slot by slot and heads each slot with
 * a SLOT_INFO opcode. We call the bytes from that opcode to the slot's last key
 * a *section*. At the end of the file, as the last two AUX fields before the
 * EOF opcode, stand the *index* of all sections and the *trailer*, which tells
 * where the index is. A server that does not know them skips AUX fields, so
 * such a file is an ordinary RDB of version 12 to it.
 *
 *   "REDIS0012" AUX* [functions] SELECTDB 0 RESIZEDB n m
 *   { SLOT_INFO slot keys expires  (key record)*  [AUX slot-section] }*
 *   AUX slot-index  AUX slot-index-at  EOF  CRC-64
 *
 * Offsets count from the 'R' of "REDIS". All numbers in the values below are
 * lower-case hexadecimal text, so that redis-check-rdb, which prints AUX
 * fields, stays readable. The values are written raw: no LZF, no integer
 * encoding, whatever the configuration says. A node whose checksums are off
 * writes 0 for the sections' CRC.
 *
 * slot-index: for each section, in the file's order
 *       slot ':' offset ':' bytes ':' keys ':' expires ':' crc ';'
 *   without leading zeros. crc is CRC-64 (as the RDB's own: Jones polynomial,
 *   initial value 0) over the section's bytes.
 *
 * slot-index-at: exactly 60 characters
 *       "SLOTINDX" version(4) offset(16) bytes(16) crc(16)
 *   with leading zeros. offset and bytes are of the index's *value*; crc is its
 *   CRC-64. As this field's name and value have fixed lengths its record is
 *   always 76 bytes (0xFA, 0x0D "slot-index-at", 0x3C value), and stands at
 *   (size of the file) - 9 - 76.
 *
 * slot-section: only in a migration's snapshot, behind each section, so that
 * the receiver can check a section when it has arrived and not at the end
 *       slot ':' bytes ':' keys ':' expires ':' crc ':' point ';'
 *   point is the offset in the source's replication stream up to which writes
 *   to the slot are contained in the section.
 *
 * Version 1. A later version may append members to an entry of the index; it
 * must then raise the version. A reader that meets another version, or an index
 * that contradicts itself, treats the file as an ordinary RDB.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "server.h"
#include "crc64.h"
#include "slot_rdb.h"
#include "slotmig_job.h"

/* upstream's, not declared in its headers */
int rdbSaveInfoAuxFields(rio *rdb, int rdbflags, rdbSaveInfo *rsi);

/* ---- the writer ---- */

/* An AUX field whose bytes do not depend on the configuration. */
int slotRdbWriteAux(rio *rdb, const char *name, const char *value, size_t len) {
    if (rdbSaveType(rdb,RDB_OPCODE_AUX) == -1) return -1;
    if (rdbSaveLen(rdb,strlen(name)) == -1) return -1;
    if (rioWrite(rdb,name,strlen(name)) == 0) return -1;
    if (rdbSaveLen(rdb,len) == -1) return -1;
    if (len && rioWrite(rdb,value,len) == 0) return -1;
    return 0;
}

void slotRdbWriterInit(slotRdbWriter *w, rio *rdb, uint64_t start) {
    memset(w,0,sizeof(*w));
    w->rdb = rdb;
    w->start = start;
    slotRdbIndexInit(&w->index);
}

/* Up to the first section. */
int slotRdbHead(rio *rdb, uint64_t keys, uint64_t expires) {
    char magic[10];
    snprintf(magic,sizeof(magic),"REDIS%04d",RDB_VERSION);
    if (rdbWriteRaw(rdb,magic,9) == -1 || rdbSaveInfoAuxFields(rdb,0,NULL) == -1) return -1;
    if (keys == 0) return 0;
    if (rdbSaveType(rdb,RDB_OPCODE_SELECTDB) == -1 || rdbSaveLen(rdb,0) == -1) return -1;
    return rdbSaveType(rdb,RDB_OPCODE_RESIZEDB) == -1 || rdbSaveLen(rdb,keys) == -1 || rdbSaveLen(rdb,expires) == -1 ? -1 : 0;
}

/* What a section begins with. */
int slotRdbSectionHead(rio *rdb, int slot, uint64_t keys, uint64_t expires) {
    if (rdbSaveType(rdb,RDB_OPCODE_SLOT_INFO) == -1) return -1;
    if (rdbSaveLen(rdb,slot) == -1) return -1;
    if (rdbSaveLen(rdb,keys) == -1) return -1;
    return rdbSaveLen(rdb,expires) == -1 ? -1 : 0;
}

/* An RDB is written in pieces of a few bytes, and a sum costs least of many at once. Those of
 * the section that is open and not summed yet; each thread writes one section at a time. */
static __thread struct {
    size_t n;
    unsigned char bytes[4096];
} unsummed;

static void sumRest(rio *rdb) {
    slotmigGiveWay();
    rdb->cksum = crc64(rdb->cksum,unsummed.bytes,unsummed.n);
    unsummed.n = 0;
}

static void sumLater(rio *rdb, const void *p, size_t len) {
    if (len > sizeof(unsummed.bytes) - unsummed.n) sumRest(rdb);
    if (len >= sizeof(unsummed.bytes)) {
        rdb->cksum = crc64(rdb->cksum,p,len);
    } else {
        memcpy(unsummed.bytes+unsummed.n,p,len);
        unsummed.n += len;
    }
}

/* The rio sums one section at a time; the file's own sum is put together from
 * the sections' when they end, so nothing is read twice. Within a section the
 * rio's sum is behind. */
void slotRdbSectionOpen(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires) {
    w->section = (slotRdbSection){ .slot = slot, .keys = keys, .expires = expires,
        .offset = w->rdb->processed_bytes - w->start };
    w->outer_crc = w->rdb->cksum;
    w->rdb->cksum = 0;
    unsummed.n = 0;
    if (w->rdb->update_cksum == rioGenericUpdateChecksum) w->rdb->update_cksum = sumLater;
}

int slotRdbSectionBegin(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires) {
    slotRdbSectionOpen(w,slot,keys,expires);
    return slotRdbSectionHead(w->rdb,slot,keys,expires);
}

int slotRdbSectionEnd(slotRdbWriter *w) {
    if (w->rdb->update_cksum == sumLater) {
        sumRest(w->rdb);
        w->rdb->update_cksum = rioGenericUpdateChecksum;
    }
    w->section.bytes = w->rdb->processed_bytes - w->start - w->section.offset;
    w->section.crc = w->rdb->cksum;
    w->rdb->cksum = slotRdbCombineCrc(w->outer_crc,w->section.crc,w->section.bytes);
    slotRdbIndexAdd(&w->index,&w->section);
    return 0;
}

int slotRdbSectionPut(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires, const char *bytes, size_t len) {
    slotRdbSectionOpen(w,slot,keys,expires);
    if (rioWrite(w->rdb,bytes,len) == 0) return -1;
    return slotRdbSectionEnd(w);
}

int slotRdbWriteSectionAux(slotRdbWriter *w, int64_t point) {
    char buf[128];
    const slotRdbSection *s = &w->section;
    int len = snprintf(buf,sizeof(buf),"%x:%llx:%llx:%llx:%llx:%llx;",s->slot,
        (unsigned long long)s->bytes,(unsigned long long)s->keys,
        (unsigned long long)s->expires,(unsigned long long)s->crc,
        (unsigned long long)point);
    return slotRdbWriteAux(w->rdb,SLOT_RDB_AUX_SECTION,buf,len);
}

int slotRdbWriteIndex(slotRdbWriter *w) {
    sds text = slotRdbIndexText(&w->index);
    int res = slotRdbWriteAux(w->rdb,SLOT_RDB_AUX_INDEX,text,sdslen(text));
    if (res == 0) {
        char buf[SLOT_RDB_TRAILER_LEN+1];
        snprintf(buf,sizeof(buf),SLOT_RDB_MAGIC "%04x%016llx%016llx%016llx",SLOT_RDB_VERSION,
            (unsigned long long)(w->rdb->processed_bytes - w->start - sdslen(text)),
            (unsigned long long)sdslen(text),
            (unsigned long long)crc64(0,(unsigned char*)text,sdslen(text)));
        res = slotRdbWriteAux(w->rdb,SLOT_RDB_AUX_TRAILER,buf,SLOT_RDB_TRAILER_LEN);
    }
    sdsfree(text);
    return res;
}

int slotRdbWriteEnd(slotRdbWriter *w) {
    if (slotRdbWriteIndex(w) == -1 || rdbSaveType(w->rdb,RDB_OPCODE_EOF) == -1) return -1;
    uint64_t sum = w->rdb->cksum;
    memrev64ifbe(&sum);
    return rioWrite(w->rdb,&sum,8) == 0 || rioFlush(w->rdb) == 0 ? -1 : 0;
}

void slotRdbWriterPause(slotRdbWriter *w) {
    w->paused_at = w->rdb->processed_bytes;
    w->paused_crc = w->rdb->cksum;
    w->rdb = NULL;
}

void slotRdbWriterResume(slotRdbWriter *w, rio *rdb) {
    w->rdb = rdb;
    rdb->processed_bytes = w->paused_at;
    rdb->cksum = w->paused_crc;
}

void slotRdbWriterFree(slotRdbWriter *w) {
    slotRdbIndexFree(&w->index);
}

/* ---- every RDB of a cluster node: hooks in rdb.c ---- */

/* A process writes one RDB at a time. It stands open from one key to the next, so the
 * section that is open is known here and not in rdb.c. */
static slotRdbWriter saving;
static int section_open;

void slotRdbSaveBegin(rio *rdb) {
    slotRdbWriterFree(&saving);     /* of one that failed */
    slotRdbWriterInit(&saving,rdb,rdb->processed_bytes);
    section_open = 0;
}

/* Bytes written, -1: a write error. */
ssize_t slotRdbSaveSlot(int slot, uint64_t keys, uint64_t expires) {
    slotRdbSaveSlotEnd();
    size_t before = saving.rdb->processed_bytes;
    if (slotRdbSectionBegin(&saving,slot,keys,expires) == -1) return -1;
    section_open = 1;
    return saving.rdb->processed_bytes - before;
}

void slotRdbSaveSlotEnd(void) {
    if (section_open) slotRdbSectionEnd(&saving);
    section_open = 0;
}

int slotRdbSaveIndex(void) {
    int res = server.cluster_enabled ? slotRdbWriteIndex(&saving) : 0;
    slotRdbWriterFree(&saving);
    return res;
}

/* The keys are loaded by what stands before them, so an index that is wrong is told and
 * does no harm. What of its value can be checked when the trailer comes is kept. */
int slotRdbLoadAux(rio *rdb, const char *name, const char *value, size_t len) {
    static slotRdbTrailer found;
    static const char *wrong;
    if (!strcmp(name,SLOT_RDB_AUX_SECTION)) return 1;
    if (!strcmp(name,SLOT_RDB_AUX_INDEX)) {
        slotRdbIndex ix;
        found = (slotRdbTrailer){ .offset = rdb->processed_bytes-len, .bytes = len,
            .crc = crc64(0,(const unsigned char*)value,len) };
        wrong = slotRdbParseIndex(value,len,found.offset,&ix);
        slotRdbIndexFree(&ix);
        return 1;
    }
    if (strcmp(name,SLOT_RDB_AUX_TRAILER)) return 0;
    slotRdbTrailer said;
    const char *why = slotRdbParseTrailer(value,len,&said);
    if (!why && (said.offset != found.offset || said.bytes != found.bytes)) why = "it is not where the trailer says";
    if (!why && said.crc != found.crc) why = "its CRC is wrong";
    if (!why) why = wrong;
    if (why) serverLog(LL_WARNING,"The index of slots in the RDB is of no use: %s. All keys are loaded, as without one.",why);
    memset(&found,0,sizeof(found));
    wrong = NULL;
    return 1;
}
