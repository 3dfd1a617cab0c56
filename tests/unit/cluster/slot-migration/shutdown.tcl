# A node that is shut down in order, in each phase of a job of its, and started again:
# every slot has one owner, with all keys, and both ends know why.

source tests/support/slot_migration.tcl

proc shut_down {n} {
    catch {R $n shutdown save}
    wait_node_dead $n
}

# Node 2 has taken the slots over from node 0, which has not heard of it, and has a write that
# node 0 has not. The job is `taken` there, or `done`, and node 0 does not ask; its id. `dump`:
# the slots before.
proc hold_taken {{state taken} {dump dump}} {
    upvar $dump before
    home
    fill_moving 0
    set before [slots_dump 0 {5 6 7}]
    failpoint 2 target_after_takeover [expr {$state eq "taken" ? "pause" : "fail"}]
    failpoint 0 source_before_ask pause
    set id [migrate 0 2 5 7]
    wait_job_state 2 $id $state
    wait_job_state 0 $id committed
    write_late
    R 2 del [key_in 6 hash]
    return $id
}

proc write_late {} {
    wait_for_condition 1000 10 {[CI 2 cluster_state] eq "ok"} else {fail "the cluster is down at node 2"}
    R 2 incr [key_in 5 late]
}

proc nodes_conf {n} {
    file join [lindex [R $n config get dir] 1] [lindex [R $n config get cluster-config-file] 1]
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

    test "SHUTDOWN of a target that has taken the slots over and written its append-only file anew, and its restart: the source hears of it" {
        set id [hold_taken]
        R 2 bgrewriteaof
        wait_rewritten 2
        write_late
        set after [slots_dump 2 {5 6 7}]
        shut_down 2
        start_node_again 2
        failpoints_off 0
        assert_equal done [wait_job_ended 0 $id]
        assert_equal 2 [assert_one_owner {5 6 7} $after [node_pids]]
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

# A target waits for its replicas, which are to have all that it has said. Shards are of nodes 0 and 3, 1 and 4, 2 and 5.
start_cluster 3 3 {tags {external:skip cluster} overrides {save "" cluster-allow-replica-migration no shutdown-timeout 600 repl-timeout 600 repl-ping-replica-period 600 cluster-node-timeout 600000}} {
    set slots {5 6 7}

    # Whatever a test before has left.
    proc start_over {} {
        exec kill -CONT [node_pid 5]
        catch {R 2 shutdown abort}
        foreach n {0 2} {R $n cluster cancel-slot-migrations all}
        foreach n {0 2} {wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n has jobs that do not end"}}
        wait_replicas_up
        if {[slot_owner 2 5] == 2} {move_slots 2 0 5 7}
        R 0 flushall
    }

    # SHUTDOWN at node 2, which waits.
    proc start_shutdown {} {
        set rd [send_command 2 shutdown]
        wait_for_condition 1000 10 {[status [Rn 2] shutdown_in_milliseconds] ne ""} else {fail "no shutdown waits"}
        return $rd
    }

    foreach {what target} {snapshot loading stream following} {
        test "SHUTDOWN of a target that waits for a replica relays no more of the $what, and the job goes on after SHUTDOWN ABORT" {
            start_over
            fill_strings 0 $slots 3000 1000
            set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node [node_id 2] rate [expr {$what eq "snapshot" ? 200000 : 0}] hold] 0]
            wait_job_state 2 $id $target
            # It has been told of the job, and answers.
            wait_for_condition 1000 10 {[job_field 2 $id bytes-done] > 0 && ![catch {job 5 $id}]} else {fail "[job 2 $id]"}
            pause_process [node_pid 5]
            set shutdown [start_shutdown]
            set offset [status [Rn 2] master_repl_offset]
            if {$what eq "snapshot"} {
                set bytes [job_field 2 $id bytes-done]
                wait_for_condition 1000 10 {[job_field 2 $id bytes-done] > $bytes + 100000} else {fail "[job 2 $id]"}
            } else {
                # Turns of both nodes, in which it would have come.
                for {set i 0} {$i < 200} {incr i} {
                    R 0 rpush [key_in 5 list] $i
                    R 2 ping
                }
                assert_morethan [job_field 0 $id stream-lag-bytes] 0
            }
            assert_equal $offset [status [Rn 2] master_repl_offset]
            if {$what eq "stream"} {
                wait_for_condition 1000 10 {[string match "*shuts down*" [job_field 2 $id reason]]} else {fail "[job 2 $id]"}
            }
            assert_equal OK [R 2 shutdown abort]
            assert_error "*Errors trying to SHUTDOWN*" {$shutdown read}
            $shutdown close
            resume_process [node_pid 5]
            set before [slots_dump 0 $slots]
            R 0 cluster alter-slot-migration id $id rate 0 release
            wait_migrated 0 2 $id
            assert_equal 0 [job_field 0 $id interruptions]
            assert_same_dump $before [slots_dump 2 $slots]
            wait_shard_agrees 2 $slots
        }
    }

    test "A target that is prepared and waits in a SHUTDOWN leaves the commit unread: after its restart the job goes on" {
        start_over
        fill_strings 0 $slots 300 100
        set before [slots_dump 0 $slots]
        R 0 config set cluster-slot-migration-write-pause-timeout 600000
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 5 7]
        wait_job_state 2 $id prepared
        wait_job_state 0 $id fenced
        pause_process [node_pid 5]
        set shutdown [start_shutdown]
        set offset [status [Rn 2] master_repl_offset]
        failpoint 0 source_before_commit off
        wait_job_state 0 $id committed
        for {set i 0} {$i < 200} {incr i} {R 2 ping}
        assert_equal [list prepared $offset] [list [job_field 2 $id state] [status [Rn 2] master_repl_offset]]
        resume_process [node_pid 5]
        wait_for_condition 3000 10 {![is_alive [node_pid 2]]} else {fail "it waits for ever"}
        $shutdown close
        start_node_again 2
        wait_job_state 0 $id done
        wait_cluster_agrees
        assert_equal 2 [slot_owner 0 5]
        assert_same_dump $before [slots_dump 2 $slots]
        wait_shard_agrees 2 $slots
    }

    test "SHUTDOWN of a target into which writers' commands stream comes to its end, and loses nothing" {
        start_over
        set writers [start_writers 2 $slots]
        wait_writers_go_on $writers
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node [node_id 2] hold] 0]
        wait_job_state 2 $id following
        set from [count_log_lines -2]
        set shutdown [start_shutdown]
        wait_writers_go_on $writers
        wait_for_condition 3000 10 {![is_alive [node_pid 2]]} else {fail "it waits for ever"}
        $shutdown close
        verify_log_message -2 "*1 of 1 replicas are in sync when shutting down*" $from
        start_node_again 2
        wait_job_state 0 $id streaming
        R 0 cluster alter-slot-migration id $id release
        wait_migrated 0 2 $id
        wait_writers_go_on $writers
        assert_equal {} [dict get [stop_writers $writers] errors]
        wait_shard_agrees 2 $slots
    }
}

# What node 2 took is in the file that its shutdown has left.
start_cluster 4 0 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no save "" appendonly no}} {
    foreach {state times} {taken 1 done 1 taken 2} {
        test "SHUTDOWN of a target that has taken the slots over ($state), and its restart ($times): the source hears of it, no write is lost" {
            set id [hold_taken $state]
            set conf [nodes_conf 2]
            for {set j 0} {$j < $times} {incr j} {
                write_late
                set after [slots_dump 2 {5 6 7}]
                shut_down 2
                assert_match "*slotmig-taken rdb-*$id*" [read_file $conf]
                start_node_again 2
                assert_no_match "*slotmig-taken*" [read_file $conf]
            }
            assert_equal committed [job_field 0 $id state]
            failpoints_off 0
            assert_equal done [wait_job_ended 0 $id]
            assert_equal 2 [assert_one_owner {5 6 7} $after [node_pids]]
        }
    }

    foreach what {"with an older file" "after NOSAVE" "after a save that failed" "with a mark that is damaged" "after a crash since"} {
        test "A target that has taken the slots over and comes back $what: an operator decides, the source keeps its copy" {
            set id [hold_taken taken before]
            set copy [keys_in_slots 0 {5 6 7}]
            lassign [list [dump_file 2] [nodes_conf 2]] dump conf
            R 2 save
            set older [read_file $dump]
            write_late
            switch $what {
                "after NOSAVE" {
                    catch {R 2 shutdown nosave}
                    wait_node_dead 2
                }
                "after a save that failed" {
                    file delete $dump
                    file mkdir $dump/not-empty
                    catch {R 2 shutdown save force}
                    wait_node_dead 2
                    file delete -force $dump
                    write_file $dump $older
                }
                default {
                    shut_down 2
                    assert_match "*slotmig-taken*$id*" [read_file $conf]
                }
            }
            switch $what {
                "with an older file" {write_file $dump $older}
                "with a mark that is damaged" {write_file $conf [string map [list :$id :[string range $id 1 end]] [read_file $conf]]}
                "after a crash since" {
                    start_node_again 2
                    write_late
                    kill_node 2
                }
            }
            start_node_again 2
            assert_no_match "*slotmig-taken*" [read_file $conf]
            failpoints_off 0
            wait_for_condition 1000 10 {[string match "the target was restarted, owns the slots and has keys in them*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            assert_equal committed [job_field 0 $id state]
            assert_equal $copy [keys_in_slots 0 {5 6 7}]
            assert_equal 1 [R 0 cluster cancel-slot-migrations id $id force]
            wait_job_state 0 $id failed
            assert_equal 0 [assert_one_owner {5 6 7} $before [node_pids]]
        }
    }
}

# The replica of node 2 is node 5: it is gone when the slots are taken over.
start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no save "" appendonly no}} {
    foreach way {"it is back" "an operator asks for none"} {
        test "SHUTDOWN of a target that waits for a replica, and its restart: the source keeps its copy until $way" {
            fresh_shards {5 6 7} stay
            fill_moving 0
            failpoint 2 target_before_takeover pause
            set id [migrate 0 2 5 7]
            wait_job_state 0 $id committed
            kill_node 5
            failpoint 2 target_before_takeover off
            wait_job_state 2 $id taken
            set copy [keys_in_slots 0 {5 6 7}]
            write_late
            set after [slots_dump 2 {5 6 7}]
            shut_down 2
            start_node_again 2
            wait_for_condition 3000 10 {[string match "*: 0 of 1 replicas have the slots since it was restarted*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            assert_equal committed [job_field 0 $id state]
            assert_equal $copy [keys_in_slots 0 {5 6 7}]
            if {$way eq "it is back"} {start_node_again 5} else {R 2 config set cluster-slot-migration-wait-replicas 0}
            assert_equal done [wait_job_ended 0 $id]
            if {![is_alive [node_pid 5]]} {start_node_again 5}
            wait_replicas_up
            wait_cluster_agrees
            assert_equal 2 [slot_owner 0 5]
            assert_same_dump $after [slots_dump 2 {5 6 7}]
            foreach n {0 2} {wait_shard_agrees $n {5 6 7}}
            R 2 config set cluster-slot-migration-wait-replicas 1
        }
    }
}
