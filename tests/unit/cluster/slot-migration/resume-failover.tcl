# The migration survives its nodes: either side's master dies or is replaced, in any phase,
# under writes that are replicated before they count. It goes on by itself,
# with what has arrived where that is still good. (All kinds of CLUSTER FAILOVER:
# manual-failover.tcl. Restarts without replicas: restarts.tcl.)
# Masters are nodes 0 (source), 1, 2 (target); their replicas 3, 4, 5.

source tests/support/slot_migration.tcl

proc wait_up {} {
    for {set n 0} {$n < 6} {incr n} {
        if {[status [Rn $n] role] ne "slave"} continue
        wait_for_condition 1000 20 {[status [Rn $n] master_link_status] eq "up"} else {fail "replica $n is not up"}
    }
}

proc master_of {shard} {
    foreach n [list $shard [expr {$shard+3}]] {
        if {[is_alive [node_pid $n]] && [status [Rn $n] role] eq "master"} {return $n}
    }
    return -1
}

# Each slot has one owner, a master of the shard, with these keys; its replicas have the same.
proc assert_moved {shard slots before} {
    wait_for_condition 3000 10 {[master_of $shard] != -1 && [jobs_running [master_of $shard]] == 0} else {fail "shard $shard goes on"}
    set owner [master_of $shard]
    for {set n 0} {$n < 6} {incr n} {
        wait_for_condition 3000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
    }
    wait_cluster_agrees
    foreach slot $slots {
        wait_for_condition 1000 10 {[slot_owner 1 $slot] == $owner} else {fail "slot $slot is at node [slot_owner 1 $slot], not at $owner: [R $owner cluster slot-migrations]"}
    }
    assert_same_dump $before [slots_dump $owner $slots]
    wait_up
    for {set n 0} {$n < 6} {incr n} {
        if {[status [Rn $n] role] eq "master"} {
            if {$n != $owner} {assert_equal {} [keys_in_slots $n $slots]}
        } else {
            set m [lsearch -exact [lmap i {0 1 2 3 4 5} {node_id $i}] [dict get [cluster_get_myself $n] slaveof]]
            wait_for_condition 1000 10 {[R $n debug digest] eq [R $m debug digest]} else {fail "replica $n is not as its master $m"}
        }
    }
}

set ::slots {5 6 7 8 9 10 11 12}

proc prepare_cluster {} {
    wait_up
    for {set n 0} {$n < 6} {incr n} {R $n config set cluster-replica-validity-factor 0 cluster-node-timeout 2000}
    fill_strings 0 $::slots 4000 100
    wait_for_condition 1000 10 {[R 0 debug digest] eq [R 3 debug digest]} else {fail "the replica does not follow"}
    slots_dump 0 $::slots
}

proc prepare_slots {n replica} {
    for {set i 0} {$i < 6} {incr i} {R $i config set cluster-replica-validity-factor 0 cluster-node-timeout 2000}
    fill_strings $n $::slots 4000 100
    R $n del [key_in 6 list]
    R $n rpush [key_in 6 list] 1 2
    wait_for_condition 1000 10 {[R $n debug digest] eq [R $replica debug digest]} else {fail "the replica does not follow"}
}

foreach {::side ::shard} {source 0 target 2} {
    foreach {::phase ::point ::at ::state} {
        "loading the snapshot" target_before_section 2 loading
        following              source_before_cut     0 following
    } {
        start_cluster 3 3 {tags {external:skip cluster}} {
            test "CLUSTER FAILOVER of the $::side while $::phase: the migration goes on at the new master" {
                set before [prepare_cluster]
                failpoint $::at $::point pause
                set id [migrate 0 2 5 12]
                wait_job_state 2 $id $::state
                assert_equal OK [R [expr {$::shard+3}] cluster failover]
                wait_for_condition 2000 10 {[status [Rn [expr {$::shard+3}]] role] eq "master"} else {fail "no failover"}
                wait_for_condition 2000 10 {[status [Rn $::shard] role] eq "slave"} else {fail "node $::shard does not follow"}
                failpoint $::at $::point off
                assert_moved 2 $::slots $before
                set job [job [master_of 2] $id]
                assert_equal done [dict get $job state]
            }
        }
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "The source's replica is promoted while the target follows: no slot comes twice" {
        set before [prepare_cluster]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 12]
        wait_job_state 2 $id following
        R 0 set [key_in 6 late] 1
        R 0 wait 1 0
        set before [slots_dump 0 $::slots]
        set bytes [job_field 2 $id bytes-done]
        kill_node 0
        wait_for_condition 3000 10 {[status [Rn 3] role] eq "master"} else {fail "replica 3 is not promoted"}
        wait_job_state 2 $id done
        assert_equal $bytes [job_field 2 $id bytes-done]
        assert_morethan_equal [job_field 2 $id interruptions] 1
        start_node_again 0
        assert_moved 2 $::slots $before
    }
}

# What the target and its replica have of the source that died, and its successor has not,
# goes: these slots come anew, to both.
start_cluster 3 3 {tags {external:skip cluster}} {
    test "The source's replica is promoted and lacks a write that the target has: its slot comes anew to the target's replica, too" {
        set before [prepare_cluster]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 12]
        wait_job_state 2 $id following
        wait_job_state 5 $id following
        R 3 config set masterauth wrong
        R 0 client kill type replica
        wait_for_condition 1000 10 {[status [Rn 0] connected_slaves] == 0} else {fail "the replica keeps its link"}
        R 0 set [key_in 6 late] 1
        foreach n {2 5} {
            wait_for_condition 1000 10 {[job_field $n $id stream-bytes] > 0} else {fail "node $n: [job $n $id]"}
        }
        kill_node 0
        wait_for_condition 3000 10 {[status [Rn 3] role] eq "master"} else {fail "replica 3 is not promoted"}
        R 3 config set masterauth ""
        wait_job_state 2 $id done
        start_node_again 0
        assert_moved 2 $::slots $before
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    foreach ::promoted {0 1} {
        test "A slot comes anew while the target's replica still takes in the snapshot[expr {$::promoted ? {, and is promoted} : {}}]" {
            if {$::promoted} {
                # The first time has moved them to node 2, whose source was node 3.
                lassign {2 5 3 0} from from_replica to to_replica
            } else {
                lassign {0 3 2 5} from from_replica to to_replica
            }
            wait_up
            prepare_slots $from $from_replica
            failpoint $from source_before_cut pause
            failpoint $from_replica source_before_cut pause
            failpoint $to_replica target_before_section pause
            set id [migrate $from $to 5 12]
            wait_job_state $to $id following
            after 300       ;# the replica's loader has all of it
            pause_process [node_pid $from_replica]
            R $from client kill type replica
            R $from rpush [key_in 6 list] lost
            after 200
            kill_node $from
            resume_process [node_pid $from_replica]
            wait_for_condition 3000 10 {[status [Rn $from_replica] role] eq "master"} else {fail "replica $from_replica is not promoted"}
            wait_for_condition 2000 10 {[job_field $from_replica $id state] eq "streaming" && [job_field $to $id state] eq "following"} else {
                fail "[job $from_replica $id] [job $to $id]"
            }
            R $from_replica rpush [key_in 6 list] 3
            after 300
            if {$::promoted} {
                kill_node $to
                wait_for_condition 3000 10 {[status [Rn $to_replica] role] eq "master"} else {fail "replica $to_replica is not promoted"}
            }
            failpoint $to_replica target_before_section off
            failpoint $from_replica source_before_cut off
            set owner [expr {$::promoted ? $to_replica : $to}]
            wait_job_state $owner $id done
            start_node_again $from
            if {$::promoted} {start_node_again $to}
            assert_equal {1 2 3} [R $owner lrange [key_in 6 list] 0 -1]
            assert_moved [expr {$to%3}] $::slots [slots_dump $owner $::slots]
            # It went on; it did not begin anew.
            if {!$::promoted} {assert_equal 1 [job_field $owner $id interruptions]}
        }
    }
}
