# A node that hangs for longer than the node timeout in the middle of a hand-off of its:
# no acknowledged write is lost, and what can go on goes on.

source tests/support/slot_migration.tcl

proc seen_as_failing {by n} {
    foreach node [get_cluster_nodes $by] {
        if {[dict get $node id] eq $::id_of_node($n)} {return [cluster_has_flag $node fail]}
    }
    return 0
}

start_cluster 4 0 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {
    # What hangs, how, and in which phase.
    foreach {end n how phase} {
        target 2 SIGSTOP       preparing
        target 2 SIGSTOP       prepared
        target 2 SIGSTOP       committed
        source 0 SIGSTOP       preparing
        source 0 SIGSTOP       prepared
        source 0 SIGSTOP       bound
        target 2 "DEBUG SLEEP" prepared
        source 0 "DEBUG SLEEP" prepared
    } {
        test "A $end that hangs for longer than the node timeout ($how) while a job is $phase: no acknowledged write is lost" {
            home
            fill_moving 0
            set before [slots_dump 0 {5 6 7}]
            set pids [node_pids]
            foreach m {0 1 2 3} {set ::id_of_node($m) [node_id $m]}
            R 0 set [key_in 5 waits] 0
            set id [hold_in_phase $phase 0 2 5 7]
            # Writes that wait for the fence, or are sent on by it.
            set writers {}
            if {$phase ni {committed bound}} {
                for {set i 0} {$i < 3} {incr i} {lappend writers [send_command 0 incr [key_in 5 waits]]}
            }
            foreach m {0 1 2 3} {
                if {$phase ni {committed bound} || $m != $n} {R $m config set cluster-node-timeout 1000}
            }
            if {$how eq "DEBUG SLEEP"} {
                set sleeper [send_command $n debug sleep 4]
            } elseif {$phase ni {committed bound}} {
                pause_process [node_pid $n]
            }
            wait_for_condition 1500 10 {[seen_as_failing 1 $n]} else {fail "nobody notices: [R 1 cluster nodes]"}
            if {$how eq "DEBUG SLEEP"} {
                assert_equal OK [$sleeper read]
                $sleeper close
            } elseif {$phase ni {committed bound}} {
                resume_process [node_pid $n]
            }
            set ::held_timeout 1000
            let_go $phase 0 2
            set states [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
            set acked 0
            foreach rd $writers {
                if {![catch {$rd read} reply]} {incr acked} else {assert_match "MOVED 5 *:[node_port 2]" $reply}
                $rd close
            }
            if {$states eq {done done}} {
                set owner 2
            } else {
                assert_equal {failed failed} $states
                # Only what did not commit can fail, and it says what it was.
                assert {$phase in {preparing prepared}}
                foreach m {0 2} {
                    assert {[regexp {is marked as failing|the cluster is down as this node sees it|link to the target is lost} [job_field $m $id last-error]]}
                }
                if {$end eq "target"} {assert_match "the target $::id_of_node(2)*is marked as failing" [job_field 0 $id last-error]}
                set owner 0
            }
            wait_cluster_agrees
            assert_equal $acked [R $owner getdel [key_in 5 waits]]
            assert_equal $owner [assert_one_owner {5 6 7} $before $pids]
            if {$owner == 0} {
                move_slots 0 2 5 7
                assert_equal 2 [assert_one_owner {5 6 7} $before $pids]
            }
        }
    }

    test "PEERS 7: a source that hangs in the handshake, and a target, end the job within repl-timeout, with the reason" {
        home
        fill_moving 0
        set before [slots_dump 0 {5 6 7}]
        set pids [node_pids]
        with_config {0 {repl-timeout 2} 2 {repl-timeout 2}} {
            # The target hangs before it can answer the offer: refused by time.
            set id [hold_in_phase offered 0 2 5 7]
            assert_equal failed [wait_job_ended 0 $id]
            assert_match "*no answer within repl-timeout*" [job_field 0 $id last-error]
            assert_match "*no answer within repl-timeout*" [let_go offered 0 2]
            # Both hang; the target, who hears of the offer first, finds no source.
            set id [hold_in_phase offered 0 2 5 7]
            pause_process [node_pid 0]
            resume_process [node_pid 2]
            wait_for_condition 1500 10 {![catch {job 2 $id}]} else {fail "no offer"}
            assert_equal failed [wait_job_ended 2 $id]
            assert_match "*cannot attach to the source*no answer within repl-timeout*" [job_field 2 $id last-error]
            exec kill -CONT [node_pid 0]
            assert_equal failed [wait_job_ended 0 $id]
            catch {$::held_request read}
            $::held_request close
        }
        assert_equal 0 [assert_one_owner {5 6 7} $before $pids]
        move_slots 0 2 5 7
        assert_equal 2 [assert_one_owner {5 6 7} $before $pids]
    }
}
