# A master of either side dies at each step of the hand-off, and its replica is
# promoted: it asks before it serves slots in doubt, there is one owner in the end,
# no write is lost that replication had carried, nobody is left with a job.
# Masters are nodes 0 (source), 1, 2 (target); their replicas 3, 4, 5.

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

proc wait_up {} {
    for {set n 0} {$n < 6} {incr n} {
        if {[status [Rn $n] role] eq "slave"} {
            wait_for_condition 1000 20 {[status [Rn $n] master_link_status] eq "up"} else {fail "replica $n is not up"}
        }
    }
}

# As slot_owner, but asks no node that may be dead.
proc owner_seen_by {n slot} {
    foreach range [R $n cluster slots] {
        if {$slot < [lindex $range 0] || $slot > [lindex $range 1]} continue
        return [lsearch -exact $::ids [lindex $range 2 2]]
    }
    return -1
}

proc quick_failover {} {
    set ::ids {}
    for {set n 0} {$n < 6} {incr n} {lappend ::ids [node_id $n]}
    for {set n 0} {$n < 6} {incr n} {
        R $n config set cluster-node-timeout 1000
        R $n config set cluster-replica-validity-factor 0
    }
}

# Everything is replicated: a crash loses nothing.
proc wait_replicated {n replica} {
    wait_for_condition 1000 10 {[R $n debug digest] eq [R $replica debug digest]} else {fail "replica $replica does not follow"}
}

proc master_of_shard {n} {
    foreach m [list $n [expr {$n+3}]] {
        if {[is_alive [node_pid $m]] && [status [Rn $m] role] eq "master"} {return $m}
    }
    return -1
}

# All nodes that live agree on one owner of the slots, a node of this shard, and its
# keys are as they were; nobody else has any, no job is open.
proc assert_ends {owners before dead} {
    set alive {}
    for {set n 0} {$n < 6} {incr n} {if {$n != $dead} {lappend alive $n}}
    foreach n $alive {
        wait_for_condition 2000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
    }
    wait_for_condition 3000 10 {[lsearch -integer $owners [owner_seen_by 1 3]] != -1 && [owner_seen_by 1 3] != $dead} else {
        fail "slot 3 is at node [owner_seen_by 1 3], expected one of $owners: [R 1 cluster nodes]"
    }
    set owner [owner_seen_by 1 3]
    foreach n $alive {
        foreach slot {3 7 10} {
            wait_for_condition 1000 10 {[owner_seen_by $n $slot] == $owner} else {
                fail "node $n sees slot $slot at node [owner_seen_by $n $slot], expected $owner"
            }
        }
    }
    foreach slot $::slots {
        wait_for_condition 1000 10 {![catch {R $owner append [key_in $slot probe] x} error]} else {fail "slot $slot at node $owner: $error"}
        R $owner del [key_in $slot probe]
    }
    assert_same_dump $before [slots_dump $owner $::slots]
    foreach n $alive {
        if {[status [Rn $n] role] ne "master" || $n == $owner} continue
        foreach slot $::slots {assert_equal 0 [R $n cluster countkeysinslot $slot] "slot $slot at node $n"}
    }
    return $owner
}

# The node that died comes back as a replica and ends with what its master has.
proc assert_returns {dead} {
    start_node_again $dead
    wait_for_condition 3000 10 {[status [Rn $dead] role] eq "slave" && [status [Rn $dead] master_link_status] eq "up"} else {
        fail "node $dead does not come back as a replica"
    }
    set master [master_of_shard [expr {$dead % 3}]]
    wait_for_condition 2000 10 {[R $dead debug digest] eq [R $master debug digest] && [R $dead dbsize] == [R $master dbsize]} else {
        fail "node $dead has [R $dead dbsize] keys, its master $master [R $master dbsize]"
    }
    assert_equal 0 [jobs_running $dead]
}

proc begin {} {
    wait_up
    quick_failover
    # Not what a replica has otherwise: consumers' times, levels of a random graph.
    foreach slot $::slots {
        fill_all_types 0 $slot
        foreach key [R 0 cluster getkeysinslot $slot 1000] {
            if {[R 0 type $key] in {stream vectorset}} {R 0 del $key}
        }
    }
    fill_strings 0 $::slots 1000
    wait_replicated 0 3
    slots_dump 0 $::slots
}

# point and action; who has it; who dies; who must own the slots then
foreach {::what ::node ::point ::action ::dies ::owners} {
    "before the cut the source"                                0 source_before_cut pause      0 {3}
    "prepared, before the commit, the source"                  0 source_before_commit pause   0 {3}
    "as it commits, its word lost, the source"                 0 source_after_commit crash    0 {3}
    "committed and not taken yet, the target"                  2 target_before_takeover crash 2 {5}
    "that took over, its word lost, the target"                2 target_after_takeover crash  2 {5}
    "when it is prepared the target"                           2 target_prepared crash        2 {0 5}
    "before it is prepared the target"                         2 target_before_prepared crash 2 {0}
} {
    start_cluster 3 3 {tags {external:skip cluster}} {
        test "Dies $::what: its replica is promoted, one shard has the slots and all keys" {
            set before [begin]
            failpoint $::node $::point $::action
            set id [migrate 0 2 3 10]
            if {$::action eq "pause"} {
                if {$::point eq "source_before_commit"} {wait_job_state 2 $id prepared} else {wait_job_state 0 $id streaming}
                kill_node $::dies
            } else {
                wait_node_dead $::dies
            }
            set replica [expr {$::dies+3}]
            wait_for_condition 3000 10 {[status [Rn $replica] role] eq "master"} else {fail "replica $replica is not promoted"}
            set owner [assert_ends $::owners $before $::dies]
            assert_returns $::dies
            # The next migration is as if nothing had been.
            wait_up
            set from $owner
            set to [master_of_shard [expr {$owner % 3 == 2 ? 0 : 2}]]
            wait_for_condition 1000 10 {![catch {set id [migrate $from $to 3 10]} error]} else {fail $error}
            wait_migrated $from $to $id
            assert_same_dump $before [slots_dump $to $::slots]
        }
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "The last slots of a shard move: its nodes follow the target when they have let go, not before" {
        set before [begin]
        failpoint 0 source_before_trim pause
        set id [migrate 0 2 0 5461]
        wait_job_state 0 $id trimming
        wait_job_state 2 $id done
        assert_equal master [status [Rn 0] role]
        failpoint 0 source_before_trim off
        wait_job_state 0 $id done
        foreach n {0 3} {
            wait_for_condition 2000 10 {[dict get [cluster_get_myself $n] slaveof] eq [node_id 2]} else {fail "node $n: [cluster_get_myself $n]"}
        }
        wait_up
        assert_same_dump $before [slots_dump 2 $::slots]
        foreach n {0 3 5} {wait_replicated 2 $n}
        wait_cluster_agrees
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "The source's whole shard dies before the commit: the prepared target takes over when the operator says so" {
        set before [begin]
        for {set n 0} {$n < 6} {incr n} {R $n config set cluster-require-full-coverage no}
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id prepared
        assert_error "*is alive: it decides*" {R 2 cluster alter-slot-migration id $id takeover}
        assert_error "*only a prepared target*" {R 0 cluster alter-slot-migration id $id takeover}
        kill_node 3
        kill_node 0
        foreach n {0 3} {
            wait_for_condition 2000 10 {[regexp "[lindex $::ids $n]\[^\n\]* (master|slave|myself),fail(,| )" [R 2 cluster nodes]]} else {fail [R 2 cluster nodes]}
        }
        assert_equal prepared [job_field 2 $id state]
        assert_equal OK [R 2 cluster alter-slot-migration id $id takeover]
        wait_job_state 2 $id done
        foreach n {1 2 4 5} {
            wait_for_condition 1000 10 {[owner_seen_by $n 3] == 2} else {fail "node $n sees slot 3 at node [owner_seen_by $n 3]"}
        }
        assert_same_dump $before [slots_dump 2 $::slots]
        wait_replicated 2 5
        # The source comes back: it has a record, asks, and gives them up.
        start_node_again 0
        wait_for_condition 2000 10 {[owner_seen_by 0 3] == 2 && [jobs_running 0] == 0} else {fail "[R 0 cluster slot-migrations]"}
        foreach slot $::slots {assert_equal 0 [R 0 cluster countkeysinslot $slot]}
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "The target's whole shard dies after the commit: the source takes the slots back when the operator says so, not before" {
        set before [begin]
        for {set n 0} {$n < 6} {incr n} {R $n config set cluster-require-full-coverage no}
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id prepared
        failpoint 2 target_before_takeover crash
        kill_node 5
        failpoint 0 source_before_commit off
        wait_node_dead 2
        wait_job_state 0 $id committed
        assert_error "*can only be completed*" {R 0 cluster cancel-slot-migrations id $id}
        assert_error "MOVED*" {R 0 get [key_in 5 x]}
        assert_equal 1 [R 0 cluster cancel-slot-migrations id $id force]
        wait_job_state 0 $id failed
        assert_same_dump $before [slots_dump 0 $::slots]
        assert_equal 1 [R 0 incr [key_in 5 probe]]
        wait_replicated 0 3
        # The target comes back without the copy, and knows whose they are.
        start_node_again 2
        wait_for_condition 2000 10 {[owner_seen_by 2 3] == 0 && [jobs_running 2] == 0} else {fail "[R 2 cluster nodes]"}
        foreach slot $::slots {assert_equal 0 [R 2 cluster countkeysinslot $slot]}
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "A replica that missed the end of a hand-off, and copied everything anew, does not act on its record" {
        begin
        set records {exec sh -c "grep -c slotmig-handoff [lindex [R 3 config get dir] 1]/nodes*.conf || true"}
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id prepared
        assert_equal 1 [eval $records]
        kill_node 3
        wait_for_condition 2000 10 {[regexp "[lindex $::ids 3]\[^\n\]* slave,fail " [R 0 cluster nodes]]} else {fail [R 0 cluster nodes]}
        failpoint 0 source_before_commit off
        wait_job_state 0 $id done
        R 0 config set repl-backlog-size 16384
        fill_strings 0 {100 101 102} 2000 100
        start_node_again 3
        wait_up
        wait_for_condition 1000 10 {[eval $records] == 0} else {fail "the record stays"}
        # The slots come back, and their master dies.
        wait_for_condition 1000 10 {![catch {set id [migrate 2 0 3 10]} error]} else {fail $error}
        wait_job_state 2 $id done
        wait_replicated 0 3
        set before [slots_dump 0 $::slots]
        R 3 config set cluster-replica-validity-factor 0 cluster-node-timeout 1000
        kill_node 0
        wait_for_condition 3000 10 {[status [Rn 3] role] eq "master"} else {fail "replica 3 is not promoted"}
        assert_equal 3 [assert_ends 3 $before 0]
    }
}
