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
