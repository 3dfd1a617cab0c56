# A replica of the target that copies everything in the middle of a job has what its
# master has of it, and goes on; one of the source that did so goes on in its master's
# place. Masters are nodes 0 to 2, the replica of node n is n+3.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10 11}     ;# the last one is empty until the second writes

proc fill {} {
    foreach slot [lrange $::slots 0 end-1] {fill_all_types 0 $slot}
    fill_strings 0 [lrange $::slots 0 end-1] 8000 100
}

proc full_syncs {n} {status [Rn $n] sync_full}

# Whatever the replica of node n has, it is not a part of its master's history any more.
proc copy_anew {n} {
    set before [full_syncs $n]
    R $n debug change-repl-id
    R $n client kill type replica
    wait_for_condition 1000 10 {[full_syncs $n] > $before} else {fail "no full synchronization of node $n's replica"}
}

proc wait_copied {n} {
    wait_for_condition 1000 10 {[status [Rn [expr {$n+3}]] master_link_status] eq "up"} else {fail "the replica of node $n does not come back"}
}

# Part of the snapshot is there: slots in the shadow, slots on their way, slots to come.
proc migrate_half {} {
    set id [lindex [R 0 cluster migrate-slots slotsrange 3 11 node [node_id 2] rate 400000 hold] 0]
    wait_for_condition 1000 10 {[job_field 2 $id keys-done] >= 3000} else {fail "[job 2 $id]"}
    R 2 cluster alter-slot-migration id $id pause
    assert_lessthan [job_field 2 $id keys-done] 8000
    wait_for_condition 1000 10 {[job_field 5 $id keys-done] >= 1000} else {fail "[job 5 $id]"}
    return $id
}

proc write_some {i} {
    foreach slot $::slots {
        if {$slot == 11 && $i < 2} continue
        R 0 set [key_in $slot new$i] $i
        R 0 append [key_in $slot grows] "$i."
        R 0 hset [key_in $slot hash] field $i
        R 0 hpexpire [key_in $slot hash] 1000000000 fields 1 field
        R 0 rpush [key_in $slot list] $i
    }
}

proc release {id} {
    R 2 cluster alter-slot-migration id $id rate 0 resume
    R 2 cluster alter-slot-migration id $id release
    wait_migrated 0 2 $id
}

proc assert_all_same {before} {
    assert_same_dump $before [slots_dump 2 $::slots]
    wait_shard_agrees 0 $::slots
    wait_shard_agrees 2 $::slots
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save "" repl-diskless-sync-delay 0 cluster-slot-migration-handoff-max-lag-bytes 1mb}} {
    wait_replicas_up

    foreach {how settings} {
        "by disk"           {repl-diskless-sync no}
        "without a disk"    {repl-diskless-sync yes repl-diskless-load disabled}
        "into a second database" {repl-diskless-sync yes repl-diskless-load swapdb}
        "by a channel of its own" {repl-diskless-sync yes repl-rdb-channel yes}
        "with an append-only file" {repl-diskless-sync yes appendonly yes}
    } {
        with_config [list 2 $settings 5 $settings] {
            test "The target's replica copies everything $how while the target follows: it has the slots, nobody begins anew" {
                fresh_shards $::slots
                fill
                set id [lindex [R 0 cluster migrate-slots slotsrange 3 11 node [node_id 2] hold] 0]
                wait_job_state 2 $id following
                wait_job_state 5 $id following
                write_some 1
                # The copy does not end before there were writes in its course.
                failpoint 2 target_before_apply pause
                write_some 2
                R 2 config set rdb-key-save-delay 100
                R 2 set [key_in 16383 own] value
                copy_anew 2
                write_some 3
                failpoint 2 target_before_apply off
                R 2 config set rdb-key-save-delay 0
                wait_copied 2
                wait_job_state 5 $id following
                write_some 4
                set syncs [full_syncs 2]
                set before [slots_dump 0 $::slots]
                release $id
                assert_equal 0 [job_field 2 $id interruptions]
                assert_equal $syncs [full_syncs 2]
                assert_equal done [job_field 5 $id state]
                assert_all_same $before
            }

            test "The target's replica copies everything $how in the middle of the snapshot: what it has of it is not sent again" {
                fresh_shards $::slots
                fill
                set id [migrate_half]
                set said [count_log_message -2 "what it has not got comes anew"]
                write_some 1
                copy_anew 2
                write_some 2
                wait_copied 2
                wait_for_condition 1000 10 {[job_field 2 $id interruptions] == 1} else {fail "[job 2 $id]"}
                assert_equal [expr {$said+1}] [count_log_message -2 "what it has not got comes anew"]
                set kept [job_field 2 $id keys-done]
                assert_morethan $kept 2000
                write_some 3
                set syncs [full_syncs 2]
                set before [slots_dump 0 $::slots]
                release $id
                assert_equal 1 [job_field 2 $id interruptions]
                assert_equal $syncs [full_syncs 2]
                assert_equal done [job_field 5 $id state]
                assert_all_same $before
            }
        }
    }

    # The same of the source's shard; then the replica takes its master's place. By default
    # each way has a turn, with SLOTMIG_MATRIX=all both moments of each.
    set turn 0
    foreach {how settings} {
        "by disk"           {repl-diskless-sync no}
        "without a disk"    {repl-diskless-sync yes repl-diskless-load disabled}
        "into a second database" {repl-diskless-sync yes repl-diskless-load swapdb}
        "by a channel of its own" {repl-diskless-sync yes repl-rdb-channel yes}
    } {
        # So little that who is away for a moment copies everything.
        with_config [list 0 [concat $settings {repl-backlog-size 16kb cluster-slot-migration-backlog-size 16kb}] 3 $settings] {
            incr turn
            foreach when {"while the target follows" "in the middle of the snapshot"} index {0 1} {
                if {$turn % 2 != $index && !([info exists ::env(SLOTMIG_MATRIX)] && $::env(SLOTMIG_MATRIX) eq "all")} continue
                test "The source's replica copies everything $how $when, and replaces it: the job goes on, no slot comes twice" {
                    fresh_shards $::slots
                    fill
                    if {$when eq "in the middle of the snapshot"} {
                        set id [migrate_half]
                    } else {
                        set id [lindex [R 0 cluster migrate-slots slotsrange 3 11 node [node_id 2] hold] 0]
                        wait_job_state 2 $id following
                    }
                    write_some 1
                    set syncs [full_syncs 0]
                    R 3 config set masterauth wrong
                    R 0 client kill type replica
                    wait_for_condition 1000 10 {[status [Rn 0] connected_slaves] == 0} else {fail "the replica keeps its link"}
                    for {set i 0} {$i < 100} {incr i} {R 0 set [key_in 100 big] [string repeat x 1000]}
                    R 3 config set masterauth ""
                    wait_for_condition 1500 10 {[full_syncs 0] > $syncs} else {fail "no full synchronization of node 0's replica"}
                    write_some 2
                    wait_copied 0
                    write_some 3
                    wait_shard_in_step 0
                    set kept [job_field 2 $id keys-done]
                    set anew [count_log_message -2 "slots come anew"]
                    set_failover_timeouts 1000
                    assert_equal OK [R 3 cluster failover]
                    wait_promoted 3
                    wait_for_condition 1000 10 {[status [Rn 0] role] eq "slave"} else {fail "node 0 does not follow"}
                    set_failover_timeouts 3000
                    R 2 cluster alter-slot-migration id $id rate 0 resume
                    wait_for_condition 1500 10 {![catch {job_field 3 $id state} state] && $state eq "streaming"} else {fail "[R 3 cluster slot-migrations] [job 2 $id]"}
                    wait_job_state 2 $id following
                    foreach slot $::slots {R 3 rpush [key_in $slot list] behind}
                    set before [slots_dump 3 $::slots]
                    R 2 cluster alter-slot-migration id $id release
                    foreach n {2 3} {wait_job_state $n $id done}
                    wait_cluster_agrees
                    assert_equal 1 [job_field 2 $id interruptions]
                    assert_equal $anew [count_log_message -2 "slots come anew"]
                    assert_morethan_equal [job_field 2 $id keys-done] $kept
                    wait_copied 2
                    assert_same_dump $before [slots_dump 2 $::slots]
                    foreach n {0 2} {wait_shard_agrees $n $::slots}
                    foreach n {0 3} {assert_equal {} [keys_in_slots $n $::slots]}
                }
            }
        }
    }

    test "Commands that a section contains already are not carried: none is applied twice" {
        fresh_shards $::slots
        fill
        R 0 config set cluster-slot-migration-snapshot fork
        set id [migrate_half]
        # What was written while the two had lost each other comes from the backlog, also of
        # slots that are still to come.
        failpoint 0 source_before_attach fail
        failpoint 2 target_cuts_links fail
        wait_for_condition 1000 10 {[job_field 2 $id interruptions] == 1} else {fail "no interruption: [job 2 $id]"}
        for {set i 0} {$i < 10} {incr i} {
            foreach slot $::slots {R 0 incr [key_in $slot counter]}
        }
        failpoint 2 target_before_apply pause
        R 2 cluster alter-slot-migration id $id rate 0 resume
        failpoint 0 source_before_attach off
        wait_job_state 2 $id following
        copy_anew 2
        failpoint 2 target_before_apply off
        wait_copied 2
        wait_job_state 5 $id following
        set before [slots_dump 0 $::slots]
        release $id
        R 0 config set cluster-slot-migration-snapshot auto
        assert_all_same $before
    }

    test "A carried slot that arrives damaged in the middle holds nobody up" {
        fresh_shards $::slots
        fill
        fill_strings 0 [lrange $::slots 0 end-1] 40000 100
        set id [lindex [R 0 cluster migrate-slots slotsrange 3 11 node [node_id 2] hold] 0]
        wait_job_state 2 $id following
        wait_for_condition 1000 10 {![catch {job 5 $id}]} else {fail "node 5 has no job"}
        wait_job_state 5 $id following
        failpoint 2 source_damages_section fail 5
        copy_anew 2
        wait_copied 2
        failpoint 2 source_damages_section off
        set before [slots_dump 0 $::slots]
        release $id
        assert_all_same $before
    }

    test "A master that is shut down and comes back without the job: its replica, which goes on with its stream, drops it" {
        fresh_shards $::slots
        fill
        set id [lindex [R 0 cluster migrate-slots slotsrange 3 11 node [node_id 2] hold timeout 0] 0]
        wait_job_state 2 $id following
        wait_for_condition 1000 10 {![catch {job 5 $id}]} else {fail "node 5 has no job"}
        wait_job_state 5 $id following
        # It does not hear of the end.
        R 5 config set masterauth wrong
        R 2 client kill type replica
        wait_for_condition 1000 10 {[status [Rn 2] connected_slaves] == 0} else {fail "the replica keeps its link"}
        catch {R 2 shutdown save now}
        wait_node_dead 2
        start_node_again 2
        wait_job_state 0 $id failed
        assert_equal following [job_field 5 $id state]
        R 5 config set masterauth ""
        wait_copied 2
        assert_equal 0 [full_syncs 2]
        wait_job_state 5 $id failed
        assert_equal 0 [R 5 dbsize]
        wait_cluster_agrees
        set before [slots_dump 0 $::slots]
        move_slots 0 2 3 11
        assert_all_same $before
    }
}
