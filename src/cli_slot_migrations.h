/* cli_slot_migrations.h -- what the hooks in redis-cli.c may call.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#ifndef CLI_SLOT_MIGRATIONS_H
#define CLI_SLOT_MIGRATIONS_H

struct clusterManagerNode;

/* The command line. */
static int slotMigrationsOption(int argc, char **argv, int *i);
typedef int slotMigrationsCommand(int argc, char **argv);
static int slotMigrationsRun(slotMigrationsCommand *proc, const char *command, int argc, char **argv);
static int slotMigrationsColor(void);
static redisContext *slotMigrationsConnect(const char *ip, int port);

/* --rdb-slots (cli_slot_backup.c). The mode ends the program; without the option it returns. */
static int slotBackupOption(int argc, char **argv, int *i);
static void slotBackupMode(void);

/* New commands. */
static int clusterManagerCommandMigrateSlots(int argc, char **argv);
static int clusterManagerCommandSlotMigrations(int argc, char **argv);

/* reshard */
static int slotMigrationsDryRun(list *table, struct clusterManagerNode *target, int *result);
static int slotMigrationsMoveTable(list *table, struct clusterManagerNode *target);

/* rebalance */
static int slotMigrationsPlan(list *table, struct clusterManagerNode *target);
static int slotMigrationsMovePlanned(void);
static int slotMigrationsRebalance(list *involved, float total_weight, int *result);

/* add-node, del-node */
static int slotMigrationsFillNode(struct clusterManagerNode *ref, struct clusterManagerNode *added);
static int slotMigrationsEmptyNode(char **argv, struct clusterManagerNode **node);

/* check, fix, del-node */
static void slotMigrationsCheck(void);
static int slotMigrationsKeepSlot(int slot);
static int slotMigrationsKeepNode(struct clusterManagerNode *node);

#endif
