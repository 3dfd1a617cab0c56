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
 * encoding, whatever the configuration says.
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
#include "cluster.h"
#include "crc64.h"
#include "crcspeed.h"
#include "crccombine.h"
#include "slot_rdb.h"

#define SLOT_RDB_MAGIC "SLOTINDX"

uint64_t slotRdbCombineCrc(uint64_t crc1, uint64_t crc2, uint64_t len2) {
    return crc64_combine(crc1,crc2,len2,UINT64_C(0x95ac9329ac4bc9b5),64);
}

/* ---- the index ---- */

void slotRdbIndexInit(slotRdbIndex *ix) {
    memset(ix,0,sizeof(*ix));
}

void slotRdbIndexAdd(slotRdbIndex *ix, const slotRdbSection *s) {
    if (ix->count == ix->room) {
        ix->room = ix->room ? ix->room*2 : 64;
        ix->sections = zrealloc(ix->sections,sizeof(*s)*ix->room);
    }
    ix->sections[ix->count++] = *s;
}

void slotRdbIndexFree(slotRdbIndex *ix) {
    zfree(ix->sections);
    slotRdbIndexInit(ix);
}

sds slotRdbIndexText(const slotRdbIndex *ix) {
    sds text = sdsempty();
    text = sdsMakeRoomFor(text,(size_t)ix->count*64);
    for (int i = 0; i < ix->count; i++) {
        const slotRdbSection *s = ix->sections+i;
        char buf[128];
        int len = snprintf(buf,sizeof(buf),"%x:%llx:%llx:%llx:%llx:%llx;",s->slot,
            (unsigned long long)s->offset,(unsigned long long)s->bytes,
            (unsigned long long)s->keys,(unsigned long long)s->expires,
            (unsigned long long)s->crc);
        text = sdscatlen(text,buf,len);
    }
    return text;
}

/* ---- the writer ---- */

/* An AUX field whose bytes do not depend on the configuration. */
static int writeRawAux(rio *rdb, const char *name, const char *value, size_t len) {
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

/* The rio sums one section at a time; the file's own sum is put together from
 * the sections' when they end, so nothing is read twice. */
int slotRdbSectionBegin(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires) {
    w->section = (slotRdbSection){ .slot = slot, .keys = keys, .expires = expires,
        .offset = w->rdb->processed_bytes - w->start };
    w->outer_crc = w->rdb->cksum;
    w->rdb->cksum = 0;
    if (rdbSaveType(w->rdb,RDB_OPCODE_SLOT_INFO) == -1) return -1;
    if (rdbSaveLen(w->rdb,slot) == -1) return -1;
    if (rdbSaveLen(w->rdb,keys) == -1) return -1;
    if (rdbSaveLen(w->rdb,expires) == -1) return -1;
    return 0;
}

int slotRdbSectionEnd(slotRdbWriter *w) {
    w->section.bytes = w->rdb->processed_bytes - w->start - w->section.offset;
    w->section.crc = w->rdb->cksum;
    w->rdb->cksum = slotRdbCombineCrc(w->outer_crc,w->section.crc,w->section.bytes);
    slotRdbIndexAdd(&w->index,&w->section);
    return 0;
}

int slotRdbWriteSectionAux(slotRdbWriter *w, int64_t point) {
    char buf[128];
    const slotRdbSection *s = &w->section;
    int len = snprintf(buf,sizeof(buf),"%x:%llx:%llx:%llx:%llx:%llx;",s->slot,
        (unsigned long long)s->bytes,(unsigned long long)s->keys,
        (unsigned long long)s->expires,(unsigned long long)s->crc,
        (unsigned long long)point);
    return writeRawAux(w->rdb,SLOT_RDB_AUX_SECTION,buf,len);
}

int slotRdbWriteIndex(slotRdbWriter *w) {
    sds text = slotRdbIndexText(&w->index);
    int res = writeRawAux(w->rdb,SLOT_RDB_AUX_INDEX,text,sdslen(text));
    if (res == 0) {
        char buf[SLOT_RDB_TRAILER_LEN+1];
        snprintf(buf,sizeof(buf),SLOT_RDB_MAGIC "%04x%016llx%016llx%016llx",SLOT_RDB_VERSION,
            (unsigned long long)(w->rdb->processed_bytes - w->start - sdslen(text)),
            (unsigned long long)sdslen(text),
            (unsigned long long)crc64(0,(unsigned char*)text,sdslen(text)));
        res = writeRawAux(w->rdb,SLOT_RDB_AUX_TRAILER,buf,SLOT_RDB_TRAILER_LEN);
    }
    sdsfree(text);
    return res;
}

void slotRdbWriterFree(slotRdbWriter *w) {
    slotRdbIndexFree(&w->index);
}

/* ---- the readers ---- */

/* One hexadecimal number of at most 16 digits that ends with `stop`. */
static const char *parseHex(const char *p, const char *end, char stop, uint64_t *v) {
    int digits = 0;
    for (*v = 0; p < end && *p != stop; p++, digits++) {
        int d = (*p >= '0' && *p <= '9') ? *p-'0' : (*p >= 'a' && *p <= 'f') ? *p-'a'+10 : -1;
        if (d < 0 || digits == 16) return NULL;
        *v = *v<<4 | d;
    }
    return (p < end && digits) ? p+1 : NULL;
}

int slotRdbParseSection(const char *text, size_t len, slotRdbSection *s) {
    const char *p = text, *end = text+len;
    uint64_t slot, point;
    memset(s,0,sizeof(*s));
    if ((p = parseHex(p,end,':',&slot)) == NULL || slot >= CLUSTER_SLOTS) return 0;
    if ((p = parseHex(p,end,':',&s->bytes)) == NULL) return 0;
    if ((p = parseHex(p,end,':',&s->keys)) == NULL) return 0;
    if ((p = parseHex(p,end,':',&s->expires)) == NULL) return 0;
    if ((p = parseHex(p,end,':',&s->crc)) == NULL) return 0;
    if ((p = parseHex(p,end,';',&point)) == NULL || p != end) return 0;
    s->slot = slot;
    s->point = point;
    return 1;
}

int slotRdbParseTrailer(const char *text, size_t len, uint64_t *offset, uint64_t *bytes, uint64_t *crc) {
    char buf[SLOT_RDB_TRAILER_LEN+2];
    uint64_t version;
    if (len != SLOT_RDB_TRAILER_LEN || memcmp(text,SLOT_RDB_MAGIC,8)) return 0;
    memcpy(buf,text,len);
    struct { int at, digits; uint64_t *v; } part[] =
        {{8,4,&version},{12,16,offset},{28,16,bytes},{44,16,crc}};
    for (int i = 0; i < 4; i++) {
        char number[18];
        memcpy(number,buf+part[i].at,part[i].digits);
        number[part[i].digits] = ';';
        if (parseHex(number,number+part[i].digits+1,';',part[i].v) == NULL) return 0;
    }
    return version == SLOT_RDB_VERSION;
}
