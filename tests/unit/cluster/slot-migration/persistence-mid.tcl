# In every phase of a job, at both ends and their replicas: saves, reloads, lost replication
# links, full synchronizations. What is written holds a node's own keys and nothing that
# is on its way, as an unpatched server reads it; the job goes on, and nothing differs
# in the end. (Append-only files: aof.tcl. Copies of the target's replica: full-sync.tcl.)
# Masters are nodes 0 (source), 1, 2 (target); the replica of node n is n+3.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

proc assert_saved {n} {
    set file [file join [lindex [R $n config get dir] 1] [lindex [R $n config get dbfilename] 1]]
    assert_equal [list [R $n debug digest] [R $n dbsize]] [loaded_by_vanilla $file] "dump.rdb of node $n"
}

# What is done at node n.
proc act {what n} {
    switch $what {
        SAVE {
            R $n save
            assert_saved $n
        }
        BGSAVE {
            # A child of the test before may still end; the snapshot's stays.
            for {set i 0} {$i < 100 && [node_children $n] ne ""} {incr i} {after 10}
            set before [status [Rn $n] rdb_saves]
            if {[node_children $n] ne ""} {
                assert_match "*scheduled*" [R $n bgsave schedule]
            } else {
                R $n bgsave
                wait_for_condition 1000 10 {[status [Rn $n] rdb_saves] > $before} else {fail "no save: [R $n info persistence]"}
                assert_saved $n
            }
        }
        "DEBUG RELOAD" {
            set had [list [R $n debug digest] [R $n dbsize]]
            R $n debug reload
            assert_equal $had [list [R $n debug digest] [R $n dbsize]]
        }
        "a lost link" {
            set syncs [status [Rn $n] sync_full]
            R $n client kill type replica
            wait_link_up $n
            assert_equal $syncs [status [Rn $n] sync_full]
        }
        "a full synchronization" {
            set syncs [status [Rn $n] sync_full]
            R $n debug change-repl-id
            R $n client kill type replica
            # While the node's child is busy with a snapshot the replica has to wait.
            wait_for_condition 1000 10 {[status [Rn $n] sync_full] > $syncs} else {fail "no full synchronization at node $n"}
        }
    }
}

proc wait_link_up {n} {
    wait_for_condition 1500 10 {[getInfoProperty [R $n info replication] connected_slaves] == 1 &&
                                [status [Rn [shard_mate $n]] master_link_status] eq "up"} else {fail "the replica of node $n does not come back"}
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save "" repl-diskless-sync-delay 0}} {
    wait_replicas_up
    foreach {phase what nodes} {
        waiting   SAVE   {0 2 3 5}
        waiting   "DEBUG RELOAD" {2 3 5}
        snapshot  SAVE   {2 3 5}
        snapshot  BGSAVE {0 2 3 5}
        snapshot  "DEBUG RELOAD" {2 3 5}
        snapshot  "a lost link" {0 2}
        snapshot  "a full synchronization" {0 2}
        streaming SAVE   {0 2 3 5}
        streaming BGSAVE {0 2 3 5}
        streaming "DEBUG RELOAD" {2 3 5}
        streaming "a lost link" {0 2}
        streaming "a full synchronization" {0 2}
        preparing BGSAVE {0 2 3 5}
        prepared  SAVE   {0 2 3 5}
        prepared  BGSAVE {0 2 3 5}
        prepared  "a lost link" {0 2}
        prepared  "a full synchronization" {0 2}
        trimming  SAVE   {2 3 5}
        trimming  BGSAVE {0 2 3 5}
        trimming  "a lost link" {0 2}
        trimming  "a full synchronization" {0 2}
    } {
        foreach node $nodes {
            test "$what of [dict get {0 {the source} 2 {the target} 3 {the source's replica} 5 {the target's replica}} $node] while the job is in $phase" {
                fresh_shards $::slots
                fill_strings 0 $::slots 400 100
                foreach slot $::slots {
                    R 0 hset [key_in $slot hash] a 1 b 2
                    R 0 hpexpire [key_in $slot hash] 100000000 fields 1 a
                    R 0 set [key_in $slot expires] x px 100000000
                }
                foreach n {0 1 2} {R $n set [key_in [expr {$n*5461+20}] own] $n}
                set before [slots_dump 0 $::slots]
                set id [hold_in_phase $phase 0 2 3 10]
                act $what $node
                let_go $phase 0 2
                wait_job_state 0 $id done
                wait_job_state 2 $id done
                wait_cluster_agrees
                assert_same_dump $before [slots_dump 2 $::slots]
                foreach n {0 1 2} {
                    assert_equal $n [R $n get [key_in [expr {$n*5461+20}] own]]
                    wait_link_up $n
                    wait_shard_agrees $n $::slots
                }
                foreach slot $::slots {assert_equal 0 [R 0 cluster countkeysinslot $slot]}
            }
        }
    }

    test "DEBUG RELOAD of the source ends the job by name, and nothing else" {
        foreach phase {snapshot streaming prepared} {
            fresh_shards $::slots
            fill_strings 0 $::slots 400 100
            set before [slots_dump 0 $::slots]
            set id [hold_in_phase $phase 0 2 3 10]
            R 0 debug reload
            wait_job_ended 0 $id
            let_go $phase 0 2
            wait_job_ended 2 $id
            assert_equal failed [job_field 0 $id state]
            assert_match "*not by a command*" [job_field 0 $id last-error]
            assert_same_dump $before [slots_dump 0 $::slots]
            wait_shard_agrees 0 $::slots
            assert_equal {} [keys_in_slots 2 $::slots]
        }
    }
}
