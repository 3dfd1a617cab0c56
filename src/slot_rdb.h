/* slot_rdb.h -- the slot-sectioned RDB, see slot_rdb.c for the format.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#ifndef SLOT_RDB_H
#define SLOT_RDB_H

#include <stdint.h>
#include "sds.h"
#include "rio.h"

#define SLOT_RDB_VERSION 1
#define SLOT_RDB_AUX_SECTION "slot-section"
#define SLOT_RDB_AUX_INDEX "slot-index"
#define SLOT_RDB_AUX_TRAILER "slot-index-at"
#define SLOT_RDB_MAGIC "SLOTINDX"
#define SLOT_RDB_TRAILER_LEN 60     /* of the trailer's value */

typedef struct slotRdbSection {
    int slot;
    uint64_t offset, bytes;         /* of the section, from the first byte of the RDB */
    uint64_t keys, expires;
    uint64_t crc;                   /* CRC-64 of the section's bytes, 0 when sums are off */
    int64_t point;                  /* snapshot point; in a section's AUX field only */
} slotRdbSection;

/* An index under construction, by a writer or by a reader as it goes. */
typedef struct slotRdbIndex {
    slotRdbSection *sections;
    int count, room;
} slotRdbIndex;

void slotRdbIndexInit(slotRdbIndex *ix);
void slotRdbIndexAdd(slotRdbIndex *ix, const slotRdbSection *s);
void slotRdbIndexFree(slotRdbIndex *ix);
sds slotRdbIndexText(const slotRdbIndex *ix);

/* ---- the writer: slot_rdb.c ----
 * Call in this order on a rio that starts the RDB at `start` (its processed_bytes
 * then). All return -1 on a write error. Owned by one thread. */
typedef struct slotRdbWriter {
    rio *rdb;
    uint64_t start;
    uint64_t outer_crc;             /* of the file up to the open section */
    slotRdbSection section;         /* the open one */
    slotRdbIndex index;
    uint64_t paused_at, paused_crc;
} slotRdbWriter;

void slotRdbWriterInit(slotRdbWriter *w, rio *rdb, uint64_t start);
int slotRdbHead(rio *rdb, uint64_t keys, uint64_t expires);     /* what stands before the first section */
int slotRdbSectionHead(rio *rdb, int slot, uint64_t keys, uint64_t expires);
void slotRdbSectionOpen(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires);   /* the bytes that follow are it, with its head */
int slotRdbSectionBegin(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires);
int slotRdbSectionEnd(slotRdbWriter *w);
int slotRdbSectionPut(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires, const char *bytes, size_t len);  /* one that was serialized elsewhere, with its head */
int slotRdbWriteSectionAux(slotRdbWriter *w, int64_t point);  /* optional, after SectionEnd */
int slotRdbWriteIndex(slotRdbWriter *w);    /* index and trailer; then nothing but EOF and checksum */
int slotRdbWriteEnd(slotRdbWriter *w);      /* these two as well */
void slotRdbWriterPause(slotRdbWriter *w);      /* between sections; its rio may go */
void slotRdbWriterResume(slotRdbWriter *w, rio *rdb);    /* on another, in the same place of the file */
void slotRdbWriterFree(slotRdbWriter *w);
int slotRdbWriteAux(rio *rdb, const char *name, const char *value, size_t len);

/* ---- the reader: slot_rdb_read.c ----
 * Needs neither a server nor its configuration, only crc64_init(). Any thread. What
 * it reads may be anything at all: no number is used before it was checked. */

/* 0 when the text is not what slot_rdb.c describes. */
int slotRdbParseSection(const char *text, size_t len, slotRdbSection *s);

typedef struct slotRdbTrailer {
    uint64_t offset, bytes, crc;    /* of the index's value */
} slotRdbTrailer;

/* These return NULL, or in a few words what is wrong. Sections that are no section, or
 * lie outside [0, limit), or over each other, are wrong. The index is to be freed either way. */
const char *slotRdbParseTrailer(const char *text, size_t len, slotRdbTrailer *t);
const char *slotRdbParseIndex(const char *text, size_t len, uint64_t limit, slotRdbIndex *ix);

/* The index of a file that begins with the RDB and ends with it. */
typedef struct slotRdbFile {
    int fd;                         /* the caller's, who closes it; its position is not used */
    uint64_t size;                  /* bytes of the file */
    int version;                    /* of the RDB */
    uint64_t crc;                   /* that the file says it has; 0: sums were off */
    slotRdbIndex index;
    char why[160];                  /* one sentence: why the state is not GOOD */
} slotRdbFile;

enum slotRdbState {
    SLOT_RDB_GOOD,                  /* every entry fits what stands at its offset */
    SLOT_RDB_WRONG,                 /* no RDB, or cut off, or the index contradicts itself or the file */
    SLOT_RDB_NONE                   /* an RDB without an index */
};

/* Reads the tail and the head of each section, none of the keys. slotRdbClose() after any state. */
int slotRdbOpen(slotRdbFile *f, int fd);
void slotRdbClose(slotRdbFile *f);
int slotRdbRead(slotRdbFile *f, uint64_t offset, void *buf, size_t len);        /* 0: not readable, see why */
int slotRdbSum(slotRdbFile *f, uint64_t offset, uint64_t bytes, uint64_t *crc); /* the same */
int slotRdbCheckSum(slotRdbFile *f, const slotRdbSection *s, uint64_t crc);     /* 0: it is not the section's, see why */

/* ---- some sections of a file: slot_rdb_extract.c ----
 * The file is GOOD. 0: see why; when that is "" then the output failed, and errno tells. Any thread. */
struct slotSet;
struct slotRdbExtracted { int slots; uint64_t keys, expires, bytes; };      /* that are in the file, of those asked for */
int slotRdbChoose(slotRdbFile *f, const struct slotSet *slots, struct slotRdbExtracted *e);
int slotRdbExtract(slotRdbFile *f, const struct slotSet *slots, rio *out, int fields);  /* `fields`: a slot-section behind each, as in a snapshot */

uint64_t slotRdbCombineCrc(uint64_t crc1, uint64_t crc2, uint64_t len2);

#endif
