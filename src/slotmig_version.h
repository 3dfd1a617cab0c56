/* The version of this fork's own part; upstream's stands in version.h. */
#ifndef SLOTMIG_VERSION_H
#define SLOTMIG_VERSION_H
#define SLOTMIG_VERSION "0.1.0"
#endif
