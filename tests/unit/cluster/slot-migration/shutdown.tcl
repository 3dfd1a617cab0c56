# A node that is shut down in order, in each phase of a job of its, and started again:
# every slot has one owner, with all keys, and both ends know why.

source tests/support/slot_migration.tcl

proc shut_down {n} {
    catch {R $n shutdown save}
    wait_node_dead $n
}

start_cluster 4 0 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no cluster-slot-migration-timeout 0}} {
    foreach {end n} {source 0 target 2 "third node" 1} {
        foreach phase [expr {$n == 1 ? {snapshot prepared} : [phases_of $end]}] {
            test "SHUTDOWN of the $end while a job is $phase, and its restart: every slot has one owner, with its keys" {
                home
                fill_moving 0
                set before [slots_dump 0 {5 6 7}]
                set id [hold_in_phase $phase 0 2 5 7]
                shut_down $n
                # A target that hangs gets the commit from a source that has been restarted since.
                if {$phase in {committed bound}} {start_node_again $n}
                foreach m {0 1 2 3} {
                    if {[is_alive [node_pid $m]]} {
                        exec kill -CONT [node_pid $m]
                        failpoints_off $m
                    }
                }
                if {![is_alive [node_pid $n]]} {start_node_again $n}
                set_node_timeouts 3000
                set taken [expr {$n == 1 || $phase in {trimming committed}}]
                foreach {m other} {0 target 2 source} {
                    if {$m == $n || ($phase eq "offered" && $m == 2)} continue
                    assert_equal [expr {$taken ? "done" : "failed"}] [wait_job_ended $m $id] [job_field $m $id last-error]
                    if {!$taken} {assert_match "*$other*" [job_field $m $id last-error]}
                }
                assert_equal [expr {$taken ? 2 : 0}] [assert_one_owner {5 6 7} $before [node_pids]]
                if {!$taken} {
                    move_slots 0 2 5 7
                    assert_equal 2 [assert_one_owner {5 6 7} $before [node_pids]]
                }
            }
        }
    }
}

# With a time-out the same is a restart like any other.
start_cluster 4 0 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no appendonly yes}} {
    foreach {end n} {source 0 target 2} {
        foreach phase {waiting snapshot streaming preparing prepared} {
            test "SHUTDOWN of the $end while a job is $phase, and its restart within the time-out: the job goes on" {
                home
                fill_moving 0
                set before [slots_dump 0 {5 6 7}]
                set id [hold_in_phase $phase 0 2 5 7]
                shut_down $n
                foreach m {0 2} {if {$m != $n} {failpoints_off $m}}
                assert_equal 0 [job_ended [job_field [expr {2-$n}] $id state]]
                start_node_again $n
                set_node_timeouts 3000
                wait_for_condition 2000 10 {![catch {job_field 0 $id state} state] && [job_ended $state]} else {fail "no end: [job 0 $id]"}
                assert_equal done [job_field 0 $id state] [job_field 0 $id last-error]
                assert_equal 2 [assert_one_owner {5 6 7} $before [node_pids]]
            }
        }
    }

    test "SHUTDOWN of a source whose job the target has not accepted: it is gone, at both ends" {
        home
        fill_moving 0
        set before [slots_dump 0 {5 6 7}]
        set id [hold_in_phase offered 0 2 5 7]
        shut_down 0
        exec kill -CONT [node_pid 2]
        start_node_again 0
        set_node_timeouts 3000
        assert_equal 0 [assert_one_owner {5 6 7} $before [node_pids]]
        assert_error "*Unknown slot migration*" {job 0 $id}
    }
}
