# In every phase of a job, at both ends and their replicas: rewrites of the append-only file,
# such as end in the phase and such as are still at work when the job goes on, and loading it
# again. What is written holds a node's own keys and nothing that is on its way, as an
# unpatched server reads it; the job goes on; in the end each node's file is what it has.
# (What goes into the file without rewrites: aof.tcl. Saves: persistence-mid.tcl.)
# Masters are nodes 0 (source), 1, 2 (target); the replica of node n is n+3.
#
# SLOTMIG_MATRIX=all runs all rows, else each action, phase, node and kind of base has a turn.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}
set ::all_rows [expr {[info exists ::env(SLOTMIG_MATRIX)] && $::env(SLOTMIG_MATRIX) eq "all"}]

# Node n's append-only files are what it has.
proc assert_written {n} {
    assert_equal [list [R $n debug digest] [R $n dbsize]] [loaded_by_vanilla [aof_dir $n]] "append-only files of node $n"
}

proc wait_rewrite_begun {n} {
    wait_for_condition 1000 10 {[status [Rn $n] aof_rewrite_in_progress] == 1} else {fail "no rewrite at node $n: [R $n info persistence]"}
}

# What is done at node n, and what follows when the job has ended.
proc act {what n} {
    set ::rewrites [status [Rn $n] aof_rewrites]
    switch $what {
        BGREWRITEAOF {
            R $n bgrewriteaof
            wait_rewritten $n
            assert_equal [expr {$::rewrites+1}] [status [Rn $n] aof_rewrites]
            assert_equal ok [status [Rn $n] aof_last_bgrewrite_status]
            assert_written $n
        }
        "A long BGREWRITEAOF" {
            # The source's ends by itself, behind the job; the target's would never.
            R $n config set rdb-key-save-delay [expr {$n % 3 == 0 ? 6000 : 100000000}]
            R $n bgrewriteaof
            wait_rewrite_begun $n
            R $n config set rdb-key-save-delay 0
        }
        "DEBUG LOADAOF" {
            set had [list [R $n debug digest] [R $n dbsize]]
            R $n debug loadaof
            assert_equal $had [list [R $n debug digest] [R $n dbsize]]
        }
    }
}

proc after_the_job {what n} {
    if {$what ne "A long BGREWRITEAOF"} return
    # One that would drop what the node has taken over is begun anew.
    if {$n % 3 == 0} {wait_rewrite_begun $n}
    wait_rewritten $n
    assert_equal ok [status [Rn $n] aof_last_bgrewrite_status]
    assert_equal [expr {$::rewrites + ($n % 3 == 0 ? 1 : 2)}] [status [Rn $n] aof_rewrites]
}

# A node of a shard dies and comes back, nobody takes its place.
proc assert_loads_what_it_had {n} {
    set had [list [R $n debug digest] [R $n dbsize]]
    set_failover_timeouts 60000
    kill_node $n
    start_node_again $n
    assert_equal $had [list [R $n debug digest] [R $n dbsize]] "node $n, restarted"
}

set ::named {0 "the source" 2 "the target" 3 "the source's replica" 5 "the target's replica"}

proc run_row {what phase n preamble} {
    fresh_shards $::slots
    foreach m {0 2 3 5} {
        R $m config set aof-use-rdb-preamble $preamble
        wait_rewritten $m
        wait_for_condition 500 10 {[node_children $m] eq ""} else {fail "node $m has a child"}
    }
    fill_strings 0 $::slots 400 100
    foreach slot $::slots {
        R 0 hset [key_in $slot hash] a 1 b 2
        R 0 hpexpire [key_in $slot hash] 100000000 fields 1 a
        R 0 set [key_in $slot expires] x px 100000000
    }
    foreach m {0 1 2} {R $m set [key_in [expr {$m*5461+20}] own] $m}
    set id [hold_in_phase $phase 0 2 3 10]
    if {$phase ne "trimming"} {wait_job_state 5 $id [dict get {snapshot {loading following} streaming following prepared prepared} $phase]}
    foreach m {0 2} {wait_shard_in_step $m}
    if {$phase ne "trimming"} {assert_equal 1 [R 5 dbsize]}
    act $what $n
    # Behind what was rewritten.
    foreach m {0 2} {R $m append [key_in [expr {$m*5461+20}] own] .}
    if {$phase in {snapshot streaming}} {
        foreach slot $::slots {
            R 0 rpush [key_in $slot list] a b
            R 0 del [key_in $slot expires]
        }
    }
    if {$phase ne "trimming"} {set before [slots_dump 0 $::slots]} else {set before [slots_dump 2 $::slots]}
    let_go $phase 0 2
    wait_job_state 0 $id done
    wait_job_state 2 $id done
    wait_cluster_agrees
    assert_equal 0 [job_field 2 $id interruptions]
    assert_same_dump $before [slots_dump 2 $::slots]
    foreach m {0 1 2} {assert_equal $m[expr {$m == 1 ? "" : "."}] [R $m get [key_in [expr {$m*5461+20}] own]]}
    after_the_job $what $n
    foreach m {0 2} {wait_shard_agrees $m $::slots}
    foreach slot $::slots {assert_equal 0 [R 0 cluster countkeysinslot $slot]}
    wait_rewritten $n
    assert_written $n
    if {$n == 2 && $what ne "DEBUG LOADAOF"} {
        assert_loads_what_it_had $n
        wait_cluster_agrees
        assert_same_dump $before [slots_dump 2 $::slots]
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save "" appendonly yes appendfsync no auto-aof-rewrite-percentage 0 cluster-allow-replica-migration no}} {
    wait_replicas_up
    set turn 0
    foreach {what phase nodes few} {
        BGREWRITEAOF          snapshot  {0 2 3 5} {2 5}
        BGREWRITEAOF          streaming {0 2 3 5} {0 2}
        BGREWRITEAOF          prepared  {0 2 3 5} {2 5}
        BGREWRITEAOF          trimming  {0 2 3 5} {0 3}
        "A long BGREWRITEAOF" streaming {0 3 5}   {0 5}
        "A long BGREWRITEAOF" prepared  {0 2 3 5} {2 3 5}
        "DEBUG LOADAOF"       snapshot  {2 3 5}   {2}
        "DEBUG LOADAOF"       streaming {2 3 5}   {5}
        "DEBUG LOADAOF"       prepared  {2 3 5}   {2 5}
        "DEBUG LOADAOF"       trimming  {2 3 5}   {3}
    } {
        foreach n [expr {$::all_rows ? $nodes : $few}] {
            incr turn
            foreach preamble {yes no} {
                if {!$::all_rows && $turn % 2 == ($preamble eq "yes")} continue
                test "$what of [dict get $::named $n] while the job is in $phase, aof-use-rdb-preamble $preamble" {
                    run_row $what $phase $n $preamble
                }
            }
        }
    }

    test "DEBUG LOADAOF of the source ends the job by name, and nothing else" {
        foreach phase {snapshot streaming prepared} {
            fresh_shards $::slots
            fill_strings 0 $::slots 400 100
            set before [slots_dump 0 $::slots]
            set id [hold_in_phase $phase 0 2 3 10]
            R 0 debug loadaof
            wait_job_ended 0 $id
            let_go $phase 0 2
            wait_job_ended 2 $id
            assert_equal {failed failed} [list [job_field 0 $id state] [job_field 2 $id state]]
            assert_match "*not by a command*" [job_field 0 $id last-error]
            assert_match "*not by a command*" [job_field 2 $id last-error]
            assert_same_dump $before [slots_dump 0 $::slots]
            wait_shard_agrees 0 $::slots
            assert_equal {} [keys_in_slots 2 $::slots]
        }
    }
}
