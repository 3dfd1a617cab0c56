# Many jobs at a time: one fork for all that wait, and a queue at the target.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

proc forks {n} {status [Rn $n] total_forks}

proc migrate_held {from to slot} {
    lindex [R $from cluster migrate-slots slotsrange $slot $slot node [node_id $to] hold] 0
}

proc wait_held {n id} {
    wait_for_condition 500 10 {[job_field $n $id held-for] > 0} else {fail "[job $n $id]"}
}

# Jobs from node 0 that have to wait for a child of another kind.
proc with_child {n body} {
    R $n config set rdb-key-save-delay 100000000
    R $n bgsave
    uplevel 1 $body
    exec kill -9 [node_children $n]
    R $n config set rdb-key-save-delay 0
}

start_cluster 3 0 {tags {external:skip cluster} overrides {save "" cluster-slot-migration-snapshot fork}} {
    R 0 config set stop-writes-on-bgsave-error no

    test "One command for several targets: the node forks once" {
        fresh
        fill_strings 0 [slots_of {0 19}] 4000
        set before [forks 0]
        set ids [R 0 cluster migrate-slots slotsrange 0 9 node [node_id 1] slotsrange 10 19 node [node_id 2]]
        wait_migrated 0 1 [lindex $ids 0]
        wait_migrated 0 2 [lindex $ids 1]
        assert_equal 1 [expr {[forks 0]-$before}]
        assert_equal {0 2000 2000} [list [R 0 dbsize] [R 1 dbsize] [R 2 dbsize]]
    }

    test "Jobs that waited for another child share one snapshot, and what is written meanwhile arrives" {
        fresh
        fill_strings 0 [slots_of {0 19}] 4000
        set writers [start_writers 2 [slots_of {0 19}]]
        set ids {}
        with_child 0 {
            for {set i 0} {$i < 5} {incr i} {
                lappend ids [migrate 0 [expr {1+$i%2}] [expr {$i*4}] [expr {$i*4+3}]]
                wait_for_condition 500 10 {[string match "another child process runs (RDB)*" [job_field 0 [lindex $ids $i] reason]]} else {
                    fail "[job 0 [lindex $ids $i]]"
                }
            }
            set before [forks 0]
        }
        for {set i 0} {$i < 5} {incr i} {wait_migrated 0 [expr {1+$i%2}] [lindex $ids $i]}
        assert_equal 1 [expr {[forks 0]-$before}]
        wait_writers_go_on $writers
        stop_writers $writers
        assert_equal 0 [R 0 dbsize]
    }

    foreach {what why} {
        killed     "*child process was ended by signal 9*"
        cancelled  "*"
        paused     ""
        "at a target that dies" ""
    } {
        test "One snapshot for three jobs, one of which is $what: the others do not notice" {
            fresh
            # More than sockets' buffers take.
            foreach slot {0 5 10} {R 0 set [key_in $slot huge] [string repeat x 60000000]}
            set digest [R 0 debug digest]
            set ids {}
            set before [forks 0]
            failpoint 0 source_before_fork pause
            foreach {slot to} {0 1 5 2 10 1} {
                set id [migrate 0 $to $slot [expr {$slot+4}]]
                lappend ids $id
                wait_for_condition 500 10 {[job_field 0 $id reason] eq "paused before the fork"} else {fail "[job 0 $id]"}
            }
            set it [lindex $ids 1]
            foreach n {1 2} {failpoint $n target_before_section pause}
            if {$what eq "paused"} {R 0 cluster alter-slot-migration id $it pause}
            failpoint 0 source_before_fork off
            foreach id $ids {
                if {$what ne "paused" || $id ne $it} {wait_job_state 0 $id snapshot}
            }
            set all [expr {$what eq "paused" ? 2 : 3}]
            wait_for_condition 500 10 {![catch {exec pgrep -P [node_children 0]} children] && [llength $children] == $all} else {
                fail "the child's children: $children"
            }
            switch $what {
                killed {exec kill -9 [lindex [lsort -integer $children] 1]}
                cancelled {assert_equal 1 [R 0 cluster cancel-slot-migrations id $it]}
                "at a target that dies" {
                    kill_node 2
                    start_node_again 2
                    wait_migrated 0 2 $it
                }
            }
            foreach n {1 2} {failpoint $n target_before_section off}
            foreach id $ids to {1 2 1} {if {$id ne $it} {wait_migrated 0 $to $id}}
            switch $what {
                killed {
                    wait_job_ended 0 $it
                    assert_match $why [job_field 0 $it last-error]
                }
                cancelled {assert_equal cancelled [job_field 0 $it state]}
                paused {
                    assert_equal waiting [job_field 0 $it state]
                    assert_equal 1 [expr {[forks 0]-$before}]
                    R 0 cluster alter-slot-migration id $it resume
                    wait_migrated 0 2 $it
                }
            }
            if {$what in {killed cancelled}} {move_slots 0 2 5 9}
            move_slots 1 0 0 4 10 14
            move_slots 2 0 5 9
            assert_equal $digest [R 0 debug digest]
            wait_for_condition 500 10 {[node_children 0] eq ""} else {fail "a child stays"}
        }
    }

    test "A save that waited for a snapshot comes before the next one" {
        fresh
        R 0 set [key_in 0 huge] [string repeat x 60000000]
        R 0 set [key_in 5 k] x
        failpoint 2 target_before_section pause
        set id [migrate 0 2 0 4]
        wait_job_state 0 $id snapshot
        assert_match "*scheduled*" [R 0 bgsave schedule]
        set next [migrate 0 1 5 9]
        wait_for_condition 500 10 {[string match "another child process runs*" [job_field 0 $next reason]]} else {fail "[job 0 $next]"}
        R 0 config set rdb-key-save-delay 100000000
        failpoint 2 target_before_section off
        wait_job_state 0 $id done
        wait_for_condition 500 10 {[status [Rn 0] rdb_bgsave_in_progress]} else {fail "the save does not run: [job 0 $next]"}
        assert_equal waiting [job_field 0 $next state]
        exec kill -9 [node_children 0]
        R 0 config set rdb-key-save-delay 0
        wait_migrated 0 1 $next
    }

    test "A fork that fails is tried again, the job says why it waits" {
        fresh
        fill_strings 0 [slots_of {0 9}] 100
        failpoint 0 source_before_fork fail
        set id [migrate 0 2 0 9]
        wait_for_condition 500 10 {[string match "cannot fork the snapshot's child process*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
        assert_equal waiting [job_field 0 $id state]
        failpoint 0 source_before_fork off
        wait_migrated 0 2 $id
    }

    # A node takes part in seven as a target (one number of a hash's field TTLs for each).
    test "More migrations to one node than it takes at a time wait in the order in which they came, from all sources" {
        fresh
        fill_strings 0 [slots_of {0 19}] 400
        fill_strings 1 {8000 8001} 20
        set running {}
        for {set i 0} {$i < 7} {incr i} {lappend running [migrate_held 0 2 $i]}
        foreach id $running {wait_held 0 $id}
        # One after the other: the queue is in the order of these.
        set waiting {}
        foreach {from slot} {0 10 1 8000 0 11} place {0 1 2} {
            set id [migrate_held $from 2 $slot]
            lappend waiting $from $id
            assert_equal waiting [job_field $from $id state]
            assert_match "the target takes part in as many migrations as it can: $place other* before this one" [job_field $from $id reason]
        }
        assert_equal 7 [jobs_running 2]
        assert_equal 0 [R 2 dbsize]
        # Each that ends makes room for the first in the queue, and for no other.
        foreach {from id} $waiting {
            set done [lindex $running 0]
            set running [lrange $running 1 end]
            R 0 cluster alter-slot-migration id $done release
            wait_migrated 0 2 $done
            wait_held $from $id
            assert_equal 7 [jobs_running 2]
        }
        foreach id $running {R 0 cluster alter-slot-migration id $id release}
        foreach {from id} $waiting {R $from cluster alter-slot-migration id $id release}
        foreach id $running {wait_migrated 0 2 $id}
        foreach {from id} $waiting {wait_migrated $from 2 $id}
    }

    test "Who leaves the queue does not hold it up: a cancelled one, a source that is gone" {
        fresh
        fill_strings 0 [slots_of {0 19}] 400
        set running {}
        for {set i 0} {$i < 7} {incr i} {lappend running [migrate_held 0 2 $i]}
        foreach id $running {wait_held 0 $id}
        set a [migrate 0 2 10 10]
        set b [migrate 1 2 8000 8000]
        set c [migrate 0 2 11 11]
        assert_match "*: 2 others come before*" [job_field 0 $c reason]
        assert_equal 1 [R 0 cluster cancel-slot-migrations id $a]
        stop_node 1
        wait_for_condition 500 10 {[string match "*: 0 others come before*" [job_field 0 $c reason]]} else {fail "[job 0 $c]"}
        R 0 cluster alter-slot-migration id [lindex $running 0] release
        wait_job_state 0 $c done
        continue_node 1
        wait_migrated 1 2 $b
        foreach id [lrange $running 1 end] {R 0 cluster alter-slot-migration id $id release}
        foreach id $running {wait_migrated 0 2 $id}
    }

    test "A source that is restarted while its job is in the queue goes on with it" {
        fresh
        fill_strings 0 [slots_of {0 19}] 400
        set running {}
        for {set i 0} {$i < 7} {incr i} {lappend running [migrate_held 0 2 $i]}
        foreach id $running {wait_held 0 $id}
        R 1 set [key_in 8000 k] x
        set id [migrate 1 2 8000 8000]
        assert_match "*: 0 others come before*" [job_field 1 $id reason]
        R 1 save
        kill_node 1
        start_node_again 1
        wait_for_condition 1000 10 {[string match "*: 0 others come before*" [job_field 1 $id reason]]} else {fail "[job 1 $id]"}
        foreach j $running {R 0 cluster alter-slot-migration id $j release}
        foreach j $running {wait_migrated 0 2 $j}
        wait_migrated 1 2 $id
        assert_equal x [R 2 get [key_in 8000 k]]
    }
}
