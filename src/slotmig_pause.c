/* slotmig_pause.c -- for how long hand-offs make writers wait: kept and shown.
 *
 *   write-pause       source: from the fence until the commit
 *   discarded-pause   source: from the fence until the attempt was given up
 *   take-over         target: from COMMIT until the slots are served and the
 *                     clients that came early are released
 *   fsync             target: from then until nodes.conf is known to be on the
 *                     disk. Only TAKEN waits for it, no client
 *   hand-off          source: from the fence until TAKEN, less the time for which
 *                     the target has served the slots by then (it waits for the
 *                     disk and its replicas). One clock measures it, so it has what
 *                     lies between the nodes too: no write waited longer for the two
 *
 * A histogram has what this node has measured: over all nodes each hand-off is in
 * each of them once. A job has the other node's numbers too, which come in COMMIT
 * and TAKEN; where the other node's word came by ASK instead they stay unknown.
 *
 * The histograms are like those of the commands: in nanoseconds, made when there is
 * something to record, shown by LATENCY HISTOGRAM and INFO latencystats as
 * slot-migration|NAME, emptied by CONFIG RESETSTAT. CLUSTER INFO has them too. The
 * event "slot-migration" of LATENCY is another thing: the watch of slotmig_job.c.
 *
 * Main thread only.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#include "slotmig_job.h"
#include "hdr_histogram.h"

#define CONTAINER "slot-migration"      /* LATENCY HISTOGRAM of this name shows all, as of a command with subcommands */
#define SHORTEST 1000LL                 /* ns, and a bit less than the precision */
#define LONGEST (3600*1000000000LL)     /* what is longer counts as this */

typedef enum { SPAN_WRITE_PAUSE, SPAN_DISCARDED_PAUSE, SPAN_TAKE_OVER, SPAN_FSYNC, SPAN_HAND_OFF, SPAN_COUNT } span;

static struct { const char *name, *field; struct hdr_histogram *histogram; } spans[SPAN_COUNT] = {
    { CONTAINER "|write-pause", "write_pause", NULL },
    { CONTAINER "|discarded-pause", "discarded_pause", NULL },
    { CONTAINER "|take-over", "take_over", NULL },
    { CONTAINER "|fsync", "fsync", NULL },
    { CONTAINER "|hand-off", "hand_off", NULL },
};

/* upstream's, not declared in its headers */
void fillCommandCDF(client *c, struct hdr_histogram *histogram);
sds fillPercentileDistributionLatencies(sds info, const char *histogram_name, struct hdr_histogram *histogram);

static void record(span what, long long us) {
    struct hdr_histogram **h = &spans[what].histogram;
    if (*h == NULL) hdr_init(SHORTEST,LONGEST,LATENCY_HISTOGRAM_PRECISION,h);
    hdr_record_value(*h,us < LONGEST/1000 ? us*1000 : LONGEST);
}

static long long since(monotime then) {
    return getMonotonicUs() - then;
}

/* ---- what happened ---- */

/* By the commit, which has measured it, or with an attempt that is over. */
void slotmigPauseFenceDown(slotMigJob *job, monotime fenced_at) {
    int committed = job->state == SLOTMIG_COMMITTED;
    if (!committed) job->write_pause_us = since(fenced_at);
    record(committed ? SPAN_WRITE_PAUSE : SPAN_DISCARDED_PAUSE,job->write_pause_us);
}

void slotmigPauseServed(slotMigJob *job, monotime commit_at) {
    job->served_at = getMonotonicUs();
    job->take_over_us = job->served_at - commit_at;
    record(SPAN_TAKE_OVER,job->take_over_us);
}

void slotmigPauseDurable(slotMigJob *job) {
    job->fsync_us = since(job->served_at);
    record(SPAN_FSYNC,job->fsync_us);
}

void slotmigPauseTaken(slotMigJob *job, monotime fenced_at, uint64_t take_over_us, uint64_t fsync_us, uint64_t served_us) {
    uint64_t all = since(fenced_at);
    job->take_over_us = take_over_us < all ? take_over_us : all;
    job->fsync_us = fsync_us < all ? fsync_us : all;
    job->hand_off_us = all - (served_us < all ? served_us : all);
    record(SPAN_HAND_OFF,job->hand_off_us);
}

void slotmigPauseReset(void) {
    for (int i = 0; i < SPAN_COUNT; i++) {
        if (spans[i].histogram) hdr_close(spans[i].histogram);
        spans[i].histogram = NULL;
    }
}

/* ---- seen from outside ---- */

/* Adds to the reply those that `name` means (NULL: all) and that are not empty; how many. */
int slotmigPauseHistograms(client *c, const char *name) {
    int n = 0;
    for (int i = 0; i < SPAN_COUNT; i++) {
        if (spans[i].histogram == NULL) continue;
        if (name && strcasecmp(name,CONTAINER) && strcasecmp(name,spans[i].name)) continue;
        addReplyBulkCString(c,spans[i].name);
        fillCommandCDF(c,spans[i].histogram);
        n++;
    }
    return n;
}

sds slotmigPauseInfoLatency(sds info) {
    for (int i = 0; i < SPAN_COUNT; i++)
        if (spans[i].histogram) info = fillPercentileDistributionLatencies(info,spans[i].name,spans[i].histogram);
    return info;
}

sds slotmigPauseInfo(sds info) {
    for (int i = 0; i < SPAN_COUNT; i++) {
        struct hdr_histogram *h = spans[i].histogram;
        info = sdscatprintf(info,"cluster_slot_migration_%s_usec:p50=%lld,p99=%lld,p99.9=%lld,max=%lld,count=%lld\r\n",
            spans[i].field,
            h ? (long long)hdr_value_at_percentile(h,50)/1000 : 0,
            h ? (long long)hdr_value_at_percentile(h,99)/1000 : 0,
            h ? (long long)hdr_value_at_percentile(h,99.9)/1000 : 0,
            h ? (long long)hdr_max(h)/1000 : 0,
            h ? (long long)h->total_count : 0);
    }
    return info;
}
