# Nodes that leave the cluster, forget each other or become replicas while a job of
# theirs is in any of its phases: no node dies, both ends end with a true reason, and
# each slot has one owner, with all its keys.

source tests/support/slot_migration.tcl

start_cluster 4 0 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {
    # ---- FORGET ----

    # That a node was forgotten goes round, and is believed for a minute: what must be
    # true is looked at while they are apart.
    foreach {who n forgotten end} {
        source 0 2 source   target 2 0 target   "a third node" 1 0 target   "another node" 3 2 source
    } {
        foreach phase [phases_of $end] {
            # A third node's word comes when it comes; these it finds held.
            if {$n in {1 3} && $phase ni {streaming preparing prepared trimming}} continue
            test "PEERS 34: a [expr {$forgotten ? "target" : "source"}] that $who forgets while a job is $phase: every slot has one owner, with its keys" {
                home
                foreach m {0 1 2 3} {R $m config set cluster-require-full-coverage no}
                fill_moving 0
                set before [slots_dump 0 {5 6 7}]
                set pids [node_pids]
                set name [node_id $forgotten]
                set other [expr {2-$forgotten}]
                set id [hold_in_phase $phase 0 2 5 7]
                assert_equal OK [R $n cluster forget $name]
                wait_for_condition 1500 10 {[string first $name [R $other cluster nodes]] < 0} else {fail "node $other does not hear of it"}
                # Past the commit, or bound by it, the two can only complete the job.
                set completes [expr {$phase in {committed trimming} || ($phase eq "prepared" && $forgotten == 0)}]
                if {$phase ni {offered committed bound trimming} && !$completes} {wait_job_ended $other $id}
                let_go $phase 0 2
                if {$phase eq "bound"} {
                    # It cannot ask the source any more, and says what to do.
                    wait_for_condition 1500 10 {[string match "*the source was forgotten*CLUSTER MEET*" [job_field 2 $id reason]]} else {fail "[job 2 $id]"}
                    wait_for_condition 1500 10 {[string match "*has not taken over yet*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
                    assert_equal {committed prepared} [list [job_field 0 $id state] [job_field 2 $id state]]
                    assert_equal 1 [R 2 cluster cancel-slot-migrations id $id force]
                    assert_equal {failed cancelled} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
                } elseif {$completes} {
                    assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
                } else {
                    assert_equal failed [wait_job_ended 0 $id]
                    # A target that refused, or never heard of it, has no job.
                    if {$phase ne "offered"} {assert_equal failed [wait_job_ended 2 $id]}
                    assert_match "*not known*" [job_field $other $id last-error]
                }
                foreach m {0 1 2 3} {
                    wait_for_condition 1500 10 {[jobs_running $m] == 0} else {fail "node $m goes on: [R $m cluster slot-migrations]"}
                }
                set owner [expr {$completes ? 2 : 0}]
                foreach m {0 1 2 3} {
                    # By what it claims itself.
                    assert_equal [expr {$m == $owner}] [claims $m 5 7] "node $m: [cluster_get_myself $m]"
                    if {$m != $owner} {assert_equal {} [keys_in_slots $m {5 6 7}]}
                    assert {[is_alive [lindex $pids $m]]}
                }
                assert_same_dump $before [slots_dump $owner {5 6 7}]
                assert_equal 1 [R $owner incr [key_in 5 probe]]
            }
        }
    }

    # ---- RESET, REPLICATE and FLUSHSLOTS of an empty node ----

    # What must be true when the target leaves: the source has all, unless the target
    # had taken it.
    proc assert_source_keeps {id command before pids {states {failed failed}}} {
        assert_equal $states [list [wait_job_ended 0 $id] [wait_job_ended 3 $id]] "[job 0 $id] [job 3 $id]"
        foreach n {0 1 2 3} {
            wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
            assert {[is_alive [lindex $pids $n]]}
        }
        assert_equal {1 0 0 0} [list [claims 0 5 7] [claims 1 5 7] [claims 2 5 7] [claims 3 5 7]]
        assert_same_dump $before [slots_dump 0 {5 6 7}]
        assert_equal 1 [R 0 incr [key_in 5 probe]]
        foreach n {1 2} {assert_equal 0 [slot_owner $n 5]}
        foreach n {1 2 3} {assert_equal {} [keys_in_slots $n {5 6 7}]}
    }

    foreach command {{reset soft} {reset hard} {replicate THIRD}} why {"CLUSTER RESET" "CLUSTER RESET" "not a master|is a replica|no longer|discarded the hand-off"} {
        foreach phase {waiting snapshot streaming preparing prepared bound} {
            test "[string toupper [lindex $command 0]] [lindex $command 1] of a target without slots while a job is $phase: the source keeps them" {
                home
                fill_moving 0
                set before [slots_dump 0 {5 6 7}]
                set pids [node_pids]
                set third [node_id 1]
                set id [hold_in_phase $phase 0 3 5 7]
                assert_equal OK [R 3 cluster {*}[string map [list THIRD $third] $command]]
                if {$command ne {replicate THIRD}} {wait_job_ended 3 $id}
                let_go $phase 0 3
                if {$phase eq "bound" && $command eq {reset hard}} {
                    # Nobody has the name any more by which the source must ask.
                    wait_for_condition 1500 10 {[string match "*asking the target*no address of it is known*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
                    assert_equal 1 [R 0 cluster cancel-slot-migrations id $id force]
                }
                assert_source_keeps $id $command $before $pids
                assert {[regexp $why [job_field 3 $id last-error]]}
            }
        }
    }

    foreach phase {waiting snapshot streaming preparing prepared bound} {
        test "FLUSHSLOTS at a target without slots while a job is $phase does nothing, and it ends well" {
            home
            fill_moving 0
            set before [slots_dump 0 {5 6 7}]
            set pids [node_pids]
            set id [hold_in_phase $phase 0 3 5 7]
            assert_equal OK [R 3 cluster flushslots]
            let_go $phase 0 3
            assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 3 $id]]
            assert_equal 3 [assert_one_owner {5 6 7} $before $pids]
        }
    }

    foreach {command why} {{reset soft} "CLUSTER RESET of this node" {reset hard} "CLUSTER RESET of this node" flushslots "slot * is not assigned*"} {
        foreach phase [phases_of source] {
            test "[string toupper [lindex $command 0]] [lindex $command 1] of a source without keys while a job of its last slots is $phase: nobody has them twice" {
                home
                move_slots 0 3 5 7
                set pids [node_pids]
                set id [hold_in_phase $phase 3 0 5 7]
                assert_equal OK [R 3 cluster {*}$command]
                let_go $phase 3 0
                # Past the commit the target has them, whatever its source does.
                set taken [expr {$phase in {committed trimming}}]
                set at_source [expr {$taken && $command eq "flushslots" ? "done" : "failed"}]
                assert_equal $at_source [wait_job_ended 3 $id] [job_field 3 $id last-error]
                if {$at_source eq "failed"} {assert_match $why [job_field 3 $id last-error]}
                if {$phase ne "offered"} {assert_equal [expr {$taken ? "done" : "failed"}] [wait_job_ended 0 $id] [job_field 0 $id last-error]}
                foreach n {0 1 2 3} {
                    wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
                    assert {[is_alive [lindex $pids $n]]}
                    assert_equal [expr {$taken && $n == 0}] [claims $n 5 7] "node $n"
                }
                if {$taken} {
                    wait_for_condition 500 10 {![catch {R 0 incr [key_in 5 probe]}]} else {fail "node 0 does not serve: [R 0 cluster info]"}
                } else {
                    # Who is asked says that nobody serves them, and to nobody it gives keys.
                    assert {[catch {R 0 set [key_in 5 probe] x} reply]}
                    assert_equal {} [keys_in_slots 0 {5 6 7}]
                }
            }
        }
    }
}
