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

    test "A SHUTDOWN that cannot save ends the snapshot's child: the jobs go on with another one" {
        home
        fill_moving 0
        # More than sockets' buffers take: the child waits for the slow targets.
        foreach slot {6 7} {R 0 set [key_in $slot huge] [string repeat x 30000000]}
        set before [slots_dump 0 {5 6 7}]
        foreach n {0 1 2} {R $n config set repl-timeout 600}
        R 0 config set cluster-slot-migration-snapshot fork
        file delete [dump_file 0]
        file mkdir [dump_file 0]/in-the-way
        set ids [R 0 cluster migrate-slots slotsrange 5 6 node [node_id 2] slotsrange 7 7 node [node_id 1] rate 100000]
        foreach id $ids to {2 1} {
            wait_job_state $to $id loading
            wait_job_state 0 $id snapshot
        }
        assert_not_equal "" [node_children 0]
        assert_error "*Errors trying to SHUTDOWN*" {R 0 shutdown save}
        foreach id $ids {
            wait_for_condition 1000 10 {[job_field 0 $id interruptions] == 1} else {fail "it stands still: [job 0 $id]"}
            R 0 cluster alter-slot-migration id $id rate 0
        }
        foreach id $ids to {2 1} {wait_migrated 0 $to $id}
        verify_log_message 0 "*the snapshot's child process was ended*" 0
        assert_same_dump $before [dict merge [slots_dump 2 {5 6}] [slots_dump 1 {7}]]
        wait_for_condition 500 10 {[node_children 0] eq ""} else {fail "a child stays"}
        file delete -force [dump_file 0]
        R 0 config set cluster-slot-migration-snapshot auto
        foreach n {0 1 2} {R $n config set repl-timeout 60}
    }

    test "What is wanted of a job just before SHUTDOWN, in the same turn, outlives it" {
        home
        fill_moving 0
        set before [slots_dump 0 {5 6 7}]
        set id [hold_in_phase streaming 0 2 5 7]
        set conf [lindex [R 0 config get dir] 1]/nodes.conf
        set rd [redis_deferring_client 0]
        $rd write "[formatCommand cluster alter-slot-migration id $id hold rate 123456789][formatCommand shutdown nosave]"
        $rd flush
        wait_node_dead 0
        $rd close
        assert_match "*slotmig-control $id:1,123456789,-1,-1,0,1*" [read_file $conf]
        start_node_again 0
        wait_for_condition 1000 10 {![catch {job 0 $id}]} else {fail "node 0 does not know the job"}
        assert_equal {123456789 1} [list [job_field 0 $id rate-limit] [job_field 0 $id held]]
        wait_job_state 0 $id streaming
        R 0 cluster alter-slot-migration id $id release
        wait_migrated 0 2 $id
        assert_equal 2 [assert_one_owner {5 6 7} $before [node_pids]]
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
