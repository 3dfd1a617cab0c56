/* Results, as one JSON object or as lines "path.of.names value".
 *
 * SPDX-License-Identifier: AGPL-3.0-only
 *
 * The second form is for shell scripts: `awk '$1 == "total.moved" {print $2}'`
 * reads it without a JSON parser. Both come from the same calls. */

#include <string.h>

#include "slotload.h"

#define MAX_DEPTH 8

static FILE *out;
static reportFormat form;
static const char *path[MAX_DEPTH];
static int depth;
static int first;

/* Start a member: its name, and what separates it from the one before. */
static void startMember(const char *name) {
    if (form == REPORT_JSON) {
        fprintf(out, "%s\n%*s\"%s\": ", first ? "" : ",", 2*depth+2, "", name);
        first = 0;
    } else {
        for (int i = 0; i < depth; i++) fprintf(out, "%s.", path[i]);
        fprintf(out, "%s ", name);
    }
}

static void endMember(void) {
    if (form == REPORT_FLAT) fputc('\n', out);
}

void reportBegin(FILE *to, reportFormat format) {
    out = to;
    form = format;
    depth = 0;
    first = 1;
    if (form == REPORT_JSON) fputc('{', out);
}

void reportOpen(const char *name) {
    if (depth == MAX_DEPTH) die("report: nested too deep at %s", name);
    if (form == REPORT_JSON) {
        startMember(name);
        fputc('{', out);
        first = 1;
    }
    path[depth++] = name;
}

void reportClose(void) {
    depth--;
    if (form == REPORT_JSON) {
        if (first) fputc('}', out);
        else fprintf(out, "\n%*s}", 2*depth+2, "");
        first = 0;
    }
}

void reportInteger(const char *name, long long value) {
    startMember(name);
    fprintf(out, "%lld", value);
    endMember();
}

void reportReal(const char *name, double value) {
    startMember(name);
    fprintf(out, "%.3f", value);
    endMember();
}

void reportString(const char *name, const char *value) {
    startMember(name);
    if (form == REPORT_JSON) {
        fputc('"', out);
        for (const unsigned char *p = (const unsigned char*)value; *p; p++) {
            if (*p == '"' || *p == '\\') fprintf(out, "\\%c", *p);
            else if (*p < 32 || *p > 126) fprintf(out, "\\u%04x", *p);
            else fputc(*p, out);
        }
        fputc('"', out);
    } else {
        fputs(value, out);
    }
    endMember();
}

void reportEnd(void) {
    if (form == REPORT_JSON) fprintf(out, "\n}\n");
    fflush(out);
}
