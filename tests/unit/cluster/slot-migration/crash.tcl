# A node of a migration dies at each step of the protocol. The other one decides
# as the protocol says, the slots have exactly one owner, and no acknowledged
# write is lost that the dead node had saved.

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

proc fill {} {
    foreach slot $::slots {
        R 0 set [key_in $slot big] [string repeat 0123456789 20000]
        R 0 hset [key_in $slot hash] f v g w
        R 0 hpexpire [key_in $slot hash] 100000000 fields 1 f
    }
    fill_strings 0 $::slots 1000
    R 0 save
}

# After a crash of one of them: all agree on one owner, whose slots are as they
# were, and nobody else has keys of them.
proc assert_owned_by {owner before} {
    foreach n {0 1 2} {
        wait_for_condition 2000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
    }
    wait_cluster_agrees
    foreach slot {3 10} {assert_equal $owner [slot_owner 1 $slot]}
    assert_same_dump $before [slots_dump $owner $::slots]
    foreach n {0 1 2} {
        if {$n != $owner} {assert_equal 0 [R $n dbsize] "keys at node $n"}
    }
    foreach slot $::slots {assert_equal 1 [R $owner append [key_in $slot probe] x]}
    foreach slot $::slots {R $owner del [key_in $slot probe]}
}

proc wait_ended {n id} {
    wait_for_condition 1500 10 {[job_ended [job_field $n $id state]]} else {fail "no end at node $n: [job $n $id]"}
    job_field $n $id state
}

start_cluster 3 0 {tags {external:skip cluster} overrides {cluster-slot-migration-timeout 0}} {
    foreach point {target_before_load target_before_section target_before_apply target_before_prepared target_prepared target_before_takeover} {
        test "The target dies at $point: the source keeps the slots and all keys" {
            fresh
            fill
            R 2 save
            set base [footprint 0]
            set before [slots_dump 0 $::slots]
            if {$point eq "target_before_apply"} {failpoint 0 source_before_cut pause}
            failpoint 2 $point crash
            set id [migrate 0 2 3 10]
            if {$point eq "target_before_apply"} {
                wait_job_state 0 $id streaming
                set key [key_in 3 streamed]
                R 0 set $key 1
            }
            wait_node_dead 2
            # A source that has heard PREPARED has committed by then: it waits for
            # the target's word, and gets its slots back when that knows nothing.
            if {$point ni {target_prepared target_before_takeover}} {
                assert_equal failed [wait_ended 0 $id]
                assert_match "*the link to the target is lost*" [job_field 0 $id last-error]
                # Served again before the target is back.
                assert_equal OK [R 0 set [key_in 4 k1] changed]
                R 0 set [key_in 4 k1] [lindex [split [R 0 get [key_in 4 k1]]] 0]
            }
            start_node_again 2
            failpoint 0 source_before_cut off
            assert_equal failed [wait_ended 0 $id]
            foreach slot $::slots {R 0 del [key_in $slot streamed]}
            R 0 set [key_in 4 k1] x
            dict set before [key_in 4 k1] [dict get [slots_dump 0 4] [key_in 4 k1]]
            assert_owned_by 0 $before
            wait_no_leftovers 0 $base
            move_slots 0 2 3 10
            assert_same_dump $before [slots_dump 2 $::slots]
        }
    }

    test "The target dies with all it had after it took over: the source still has the keys, and serves them again" {
        fresh
        fill
        R 2 save
        set before [slots_dump 0 $::slots]
        failpoint 2 target_after_takeover crash
        set id [migrate 0 2 3 10]
        wait_node_dead 2
        # Not served here any more, not given up either.
        assert_equal committed [wait_job_state 0 $id committed]
        assert_error "MOVED*" {R 0 get [key_in 3 big]}
        assert_morethan [R 0 dbsize] 1000
        start_node_again 2
        assert_equal failed [wait_ended 0 $id]
        assert_match "*did not take over*lost the job*" [job_field 0 $id last-error]
        assert_owned_by 0 $before
    }

    foreach point {source_before_attach source_before_fork source_before_cut source_before_commit source_after_commit} {
        test "The source dies at $point: the target gives up, the restarted source serves" {
            fresh
            fill
            set base [footprint 2]
            set before [slots_dump 0 $::slots]
            failpoint 0 $point crash
            # The target may be quicker with its connections than the source with its answer.
            catch {migrate 0 2 3 10}
            wait_node_dead 0
            set id [dict get [lindex [R 2 cluster slot-migrations] 0] id]
            start_node_again 0
            assert_equal failed [wait_ended 2 $id]
            assert_not_equal "" [job_field 2 $id last-error]
            assert_owned_by 0 $before
            wait_no_leftovers 2 $base
            move_slots 0 2 3 10
            assert_same_dump $before [slots_dump 2 $::slots]
        }
    }

    test "The source dies before it trims: the target has the slots, the restarted source drops its copy" {
        fresh
        fill
        set before [slots_dump 0 $::slots]
        failpoint 0 source_before_trim crash
        set id [migrate 0 2 3 10]
        wait_node_dead 0
        wait_job_state 2 $id done
        start_node_again 0
        assert_owned_by 2 $before
    }

    foreach {state point at} {
        snapshot target_before_section 2
        streaming source_before_cut 0
        fenced target_before_prepared 2
    } {
        foreach {victim other name} {0 2 source 2 0 target} {
            test "kill -9 of the $name while $state: the slots stay at the source, the next move succeeds" {
                fresh
                fill
                R 2 save
                set before [slots_dump 0 $::slots]
                failpoint $at $point pause
                set id [migrate 0 2 3 10]
                wait_job_state 0 $id $state
                set child [node_children 0]
                kill_node $victim
                assert_equal failed [wait_ended $other $id]
                start_node_again $victim
                failpoints_off $at
                assert_owned_by 0 $before
                move_slots 0 2 3 10
                assert_same_dump $before [slots_dump 2 $::slots]
            }
        }
    }

    test "The target hangs while prepared: no write is lost, whoever decides" {
        fresh
        fill
        R 0 config set cluster-slot-migration-write-pause-timeout 500
        set writers [start_writers 2 {3 4 12000 7000}]
        wait_writers_go_on $writers
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id prepared
        pause_process [node_pid 2]
        wait_job_state 0 $id {streaming failed}
        resume_process [node_pid 2]
        failpoint 0 source_before_commit off
        wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]]} else {fail "no end: [job 0 $id]"}
        wait_cluster_agrees
        wait_writers_go_on $writers
        set seen [stop_writers $writers]
        assert_equal 0 [expr {[dict get $seen ask]+[dict get $seen tryagain]}]
        R 0 config set cluster-slot-migration-write-pause-timeout 10000
    }
}
