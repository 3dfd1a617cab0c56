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

/* Writer: call in this order on a rio that starts the RDB at `start` (its
 * processed_bytes then). All return -1 on a write error. Owned by one thread. */
typedef struct slotRdbWriter {
    rio *rdb;
    uint64_t start;
    uint64_t outer_crc;             /* of the file up to the open section */
    slotRdbSection section;         /* the open one */
    slotRdbIndex index;
} slotRdbWriter;

void slotRdbWriterInit(slotRdbWriter *w, rio *rdb, uint64_t start);
int slotRdbSectionBegin(slotRdbWriter *w, int slot, uint64_t keys, uint64_t expires);
int slotRdbSectionEnd(slotRdbWriter *w);
int slotRdbWriteSectionAux(slotRdbWriter *w, int64_t point);  /* optional, after SectionEnd */
int slotRdbWriteIndex(slotRdbWriter *w);    /* index and trailer; then nothing but EOF and checksum */
void slotRdbWriterFree(slotRdbWriter *w);

/* Readers of the values; 0 when the text is not what slot_rdb.c describes. */
int slotRdbParseSection(const char *text, size_t len, slotRdbSection *s);
int slotRdbParseTrailer(const char *text, size_t len, uint64_t *offset, uint64_t *bytes, uint64_t *crc);

uint64_t slotRdbCombineCrc(uint64_t crc1, uint64_t crc2, uint64_t len2);

#endif
