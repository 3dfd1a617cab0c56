# Whatever fails, and whoever dies, where a job must not wait for the other node to come
# back (cluster-slot-migration-timeout 0): both nodes are back where they were, say
# why, hold nothing of the job, and the next migration succeeds.

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

# Some megabytes in the moving slots, so that a shadow left behind would show.
proc fill {} {
    foreach slot $::slots {
        R 0 set [key_in $slot big] [string repeat 0123456789 100000]
        R 0 hset [key_in $slot hash] f v g w
        R 0 hpexpire [key_in $slot hash] 100000000 fields 1 f
        R 0 set [key_in $slot ttl] x ex 100000
    }
    fill_strings 0 $::slots 2000
}

# What is to be the same after a job that did not succeed.
proc state_before {} {
    set state {}
    wait_cluster_agrees
    for {set n 0} {$n < 3} {incr n} {
        wait_lazyfree_done [Rn $n]
        dict set state footprint$n [footprint $n]
        dict set state keyspace$n [regsub {,avg_ttl=\d+} [keyspace $n] ""]
    }
    dict set state dump [slots_dump 0 $::slots]
    # Epochs reserved and not used are no change.
    dict set state view [cluster_view 0]
    return $state
}

proc assert_state {before} {
    wait_cluster_agrees
    assert_equal [dict get $before view] [cluster_view 0]
    assert_same_dump [dict get $before dump] [slots_dump 0 $::slots]
    for {set n 0} {$n < 3} {incr n} {
        assert_equal [dict get $before keyspace$n] [regsub {,avg_ttl=\d+} [keyspace $n] ""] "keyspace of node $n"
        wait_no_leftovers $n [dict get $before footprint$n]
        assert_equal 0 [jobs_running $n]
    }
    # The slots take reads and writes at the source at once.
    foreach slot $::slots {
        assert_equal 1 [R 0 incr [key_in $slot probe]]
        assert_equal 1 [R 0 del [key_in $slot probe]]
        assert_error "MOVED*" {R 2 get [key_in $slot ttl]}
    }
}

proc wait_job_failed {n id why} {
    wait_for_condition 1500 10 {[job_ended [job_field $n $id state]]} else {
        fail "the job does not end at node $n: [job $n $id]"
    }
    assert_equal failed [job_field $n $id state] "state at node $n"
    assert_match $why [job_field $n $id last-error]
    assert_equal [job_field $n $id last-error] [job_field $n $id reason]
}

proc assert_next_succeeds {} {
    set before [slots_dump 0 $::slots]
    move_slots 0 2 3 10
    assert_same_dump $before [slots_dump 2 $::slots]
    assert_equal 0 [R 0 dbsize]
}

start_cluster 3 0 {tags {external:skip cluster} overrides {cluster-slot-migration-timeout 0}} {
    foreach {point node at_source at_target} {
        source_before_attach 0 "*cannot attach to the source*source_before_attach*" "*cannot attach*source_before_attach*"
        source_before_fork   0 "*cannot start the snapshot's thread*"              "at the source: *cannot start the snapshot's thread*"
        source_in_child      0 "*"                                                  "*"
        target_before_load   2 "at the target: fail point target_before_load"       "fail point target_before_load"
        target_before_section 2 "at the target: fail point target_before_section"   "fail point target_before_section"
        target_before_prepared 2 "at the target: fail point target_before_prepared" "fail point target_before_prepared"
        target_before_takeover 2 "*did not take over*target_before_takeover*"       "fail point target_before_takeover"
    } {
        test "A failure at $point leaves both nodes as they were and says why" {
            fresh
            fill
            set before [state_before]
            failpoint $node $point fail
            set id [migrate 0 2 3 10]
            wait_job_failed 0 $id $at_source
            wait_job_failed 2 $id $at_target
            failpoint $node $point off
            if {$point eq "target_before_takeover"} {
                # The slots are taken back with an epoch above the one that was given away.
                set epochs [lmap node [dict get $before view] {lindex $node 4}]
                assert_morethan [dict get [cluster_get_myself 0] config_epoch] [tcl::mathfunc::max {*}$epochs]
                wait_cluster_agrees
                dict set before view [cluster_view 0]
            }
            assert_state $before
            assert_next_succeeds
        }
    }

    test "A command of the stream that the target cannot apply fails the job, and no key is lost" {
        fresh
        fill
        set before [state_before]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id streaming
        failpoint 2 target_before_apply fail
        R 0 append [key_in 5 big] x
        wait_job_failed 0 $id "at the target: *append*"
        wait_job_failed 2 $id "*append*"
        failpoint 2 target_before_apply off
        failpoint 0 source_before_cut off
        R 0 setrange [key_in 5 big] 0 [string repeat 0123456789 100000]
        R 0 set [key_in 5 big] [string repeat 0123456789 100000]
        assert_state $before
        assert_next_succeeds
    }

    test "A target that refuses is named with its reason, and there is no job" {
        fresh
        fill
        set before [state_before]
        failpoint 2 target_before_accept fail
        assert_error "*the target [node_id 2]*refuses: fail point target_before_accept*" {migrate 0 2 3 10}
        failpoint 2 target_before_accept off
        assert_state $before
        assert_next_succeeds
    }

    test "An attempt that fails at source_before_commit is discarded, a later one succeeds" {
        fresh
        fill
        set before [slots_dump 0 $::slots]
        failpoint 0 source_before_commit fail
        set id [migrate 0 2 3 10]
        wait_for_condition 1000 10 {[job_field 0 $id attempt] >= 3} else {fail "no further attempts: [job 0 $id]"}
        assert_equal 0 [slot_owner 1 5]
        R 0 set [key_in 5 between] attempts
        failpoint 0 source_before_commit off
        wait_migrated 0 2 $id
        dict set before [key_in 5 between] [dict get [slots_dump 2 5] [key_in 5 between]]
        assert_same_dump $before [slots_dump 2 $::slots]
        assert_equal attempts [R 2 get [key_in 5 between]]
    }

    foreach {point node} {source_after_commit 0 target_after_takeover 2} {
        test "A word lost at $point is asked for: the move ends well and no write is lost" {
            fresh
            fill
            set base [footprint 0]
            set before [slots_dump 0 $::slots]
            set writers [start_writers 2 {20 21 12000}]
            wait_writers_go_on $writers
            failpoint $node $point fail
            set id [migrate 0 2 3 30]
            wait_migrated 0 2 $id
            wait_writers_go_on $writers
            failpoint $node $point off
            set seen [stop_writers $writers]
            assert_equal {} [dict get $seen errors]
            assert_equal 0 [expr {[dict get $seen ask]+[dict get $seen tryagain]}]
            assert_same_dump $before [slots_dump 2 $::slots]
            assert_equal 0 [R 0 dbsize]
            wait_no_leftovers 0 $base
        }
    }

    foreach {state point node at} {
        waiting   source_before_fork     0 0
        snapshot  target_before_section  2 0
        streaming source_before_cut      0 0
        fenced    target_before_prepared 2 0
        loading   target_before_section  2 2
        following source_before_cut      0 2
        preparing target_before_prepared 2 2
    } {
        test "A job cancelled at node $at while $state leaves both nodes as they were" {
            fresh
            fill
            set before [state_before]
            failpoint $node $point pause
            set id [migrate 0 2 3 10]
            wait_job_state $at $id $state
            if {$state eq "waiting"} {
                wait_for_condition 500 10 {[job_field 2 $id reason] eq "waiting for the source's snapshot"} else {fail "[job 2 $id]"}
            }
            assert_equal 1 [R $at cluster cancel-slot-migrations id $id]
            foreach n {0 2} {
                wait_for_condition 500 10 {[job_ended [job_field $n $id state]]} else {fail "not cancelled: [job $n $id]"}
                assert_equal cancelled [job_field $n $id state] "state at node $n"
                assert_match *cancelled* [job_field $n $id reason]
            }
            failpoint $node $point off
            assert_state $before
            assert_equal 0 [R $at cluster cancel-slot-migrations id $id]
            assert_next_succeeds
        }
    }

    test "A job past its commit cannot be cancelled, and completes" {
        fresh
        fill
        failpoint 0 source_before_trim pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id trimming
        assert_error "*$id is trimming*" {R 0 cluster cancel-slot-migrations id $id}
        assert_equal 0 [R 0 cluster cancel-slot-migrations all]
        failpoint 0 source_before_trim off
        wait_migrated 0 2 $id
        assert_equal 0 [R 0 dbsize]
    }

    test "FLUSHALL in the middle: at the target the moving keys stay, at the source none comes back" {
        fresh
        fill
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id streaming
        set before [slots_dump 0 $::slots]
        R 2 flushall
        assert_equal streaming [job_field 0 $id state]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_same_dump $before [slots_dump 2 $::slots]

        fresh
        fill
        set base [footprint 2]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id streaming
        R 0 flushall
        R 0 set [key_in 3 new] 1
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal [list [key_in 3 new]] [R 2 keys *]
        assert_equal 0 [R 0 dbsize]
        R 2 flushall
        wait_no_leftovers 2 $base
    }

    test "Keys that are replaced in the middle, but not by a command, fail the job" {
        fresh
        fill
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id streaming
        set before [slots_dump 0 $::slots]
        R 0 debug reload
        wait_job_failed 0 $id *replaced*
        wait_job_failed 2 $id *replaced*
        failpoint 0 source_before_cut off
        assert_same_dump $before [slots_dump 0 $::slots]
        assert_next_succeeds
    }

    test "The snapshot's child, when all is sent, may live on or be killed: it does not matter" {
        R 0 config set cluster-slot-migration-snapshot fork
        foreach point {source_before_cut source_before_commit} {
            fresh
            fill
            set before [state_before]
            failpoint 0 source_in_child pause
            failpoint 0 $point pause
            set id [migrate 0 2 3 10]
            wait_job_state 0 $id {streaming fenced}
            if {$point eq "source_before_commit"} {wait_job_state 0 $id fenced}
            exec kill -9 [node_children 0]
            wait_for_condition 500 10 {[node_children 0] eq ""} else {fail "the child is not collected"}
            failpoint 0 $point off
            wait_migrated 0 2 $id
            assert_same_dump [dict get $before dump] [slots_dump 2 $::slots]
        }
        # One that does not end by itself: the job, and the next one, do not wait for it.
        fresh
        fill
        set before [slots_dump 0 $::slots]
        failpoint 0 source_in_child pause
        set id [migrate 0 2 3 10]
        wait_migrated 0 2 $id
        failpoint 0 source_in_child off
        wait_for_condition 500 10 {[node_children 0] eq ""} else {fail "the child lives on"}
        assert_same_dump $before [slots_dump 2 $::slots]
        # Nor does the source when the target has committed slots and does not answer.
        fresh
        fill
        failpoint 0 source_in_child pause
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id prepared
        stop_node 2
        failpoint 0 source_before_commit off
        wait_job_state 0 $id committed
        exec kill -9 [node_children 0]
        wait_for_condition 500 10 {[node_children 0] eq ""} else {fail "the child is not collected"}
        assert_equal committed [job_field 0 $id state]
        continue_node 2
        wait_migrated 0 2 $id
        assert_equal 2 [slot_owner 0 5]
        failpoint 0 source_in_child off
        R 0 config set cluster-slot-migration-snapshot auto
    }

    test "The snapshot's child is killed: the job fails and says so, nothing stays" {
        fresh
        fill
        # More than sockets' buffers take: the child waits for the stopped target.
        R 0 set [key_in 9 huge] [string repeat x 60000000]
        set before [state_before]
        failpoint 0 source_before_fork pause
        R 0 config set cluster-slot-migration-snapshot fork
        set id [migrate 0 2 3 10]
        wait_for_condition 500 10 {[job_field 0 $id reason] eq "paused before the fork"} else {fail "[job 0 $id]"}
        R 0 config set cluster-slot-migration-snapshot auto
        wait_for_condition 500 10 {[job_field 2 $id reason] eq "waiting for the source's snapshot"} else {fail "[job 2 $id]"}
        stop_node 2
        failpoint 0 source_before_fork off
        wait_for_condition 500 10 {[node_children 0] ne ""} else {fail "no child"}
        exec kill -9 [node_children 0]
        continue_node 2
        wait_job_failed 0 $id "*child process was ended by signal 9*"
        wait_job_failed 2 $id "*"
        assert_state $before
        assert_next_succeeds
    }
}
