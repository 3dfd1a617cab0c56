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
foreach {::what ::node ::point ::action ::dies ::owner} {
    "while the snapshot is loaded, the source"                 2 target_before_section pause  0 2
    "before the cut the source"                                0 source_before_cut pause      0 2
    "prepared, before the commit, the source"                  0 source_before_commit pause   0 2
    "as it commits, its word lost, the source"                 0 source_after_commit crash    0 2
    "while the snapshot is loaded, the target"                 2 target_before_section pause  2 5
    "committed and not taken yet, the target"                  2 target_before_takeover crash 2 5
    "that took over, its word lost, the target"                2 target_after_takeover crash  2 5
    "when it is prepared the target"                           2 target_prepared crash        2 5
    "before it is prepared the target"                         2 target_before_prepared crash 2 5
} {
    start_cluster 3 3 {tags {external:skip cluster}} {
        test "Dies $::what: its replica is promoted, the migration goes on, one shard has the slots and all keys" {
            set before [begin]
            failpoint $::node $::point $::action
            set id [migrate 0 2 3 10]
            if {$::action eq "pause"} {
                switch $::point {
                    source_before_commit {wait_job_state 2 $id prepared}
                    target_before_section {wait_job_state 2 $id loading}
                    default {wait_job_state 0 $id streaming}
                }
                kill_node $::dies
                failpoints_off [expr {2-$::dies}]
            } else {
                wait_node_dead $::dies
            }
            set replica [expr {$::dies+3}]
            wait_for_condition 3000 10 {[status [Rn $replica] role] eq "master"} else {fail "replica $replica is not promoted"}
            set owner [assert_ends $::owner $before $::dies]
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
            wait_for_condition 2000 10 {![catch {dict get [cluster_get_myself $n] slaveof} of] && $of eq [node_id 2]} else {fail "node $n follows $of"}
        }
        wait_up
        assert_same_dump $before [slots_dump 2 $::slots]
        foreach n {0 3 5} {wait_replicated 2 $n}
        wait_cluster_agrees
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "The last slots of a shard move to two nodes: its nodes stay while one hand-off is in doubt" {
        set before [begin]
        failpoint 2 target_after_takeover pause
        set ids [R 0 cluster migrate-slots slotsrange 11 5461 node [node_id 1] slotsrange 0 10 node [node_id 2]]
        wait_job_state 0 [lindex $ids 0] done
        wait_job_state 2 [lindex $ids 1] taken
        foreach slot {3 100} node {2 1} {wait_for_condition 1000 10 {[slot_owner 0 $slot] == $node && [slot_owner 3 $slot] == $node} else {fail [R 3 cluster nodes]}}
        set pings [CI 3 cluster_stats_messages_sent]
        wait_for_condition 1000 10 {[CI 3 cluster_stats_messages_sent] > $pings+20} else {fail "no pings"}
        assert_equal {master slave} [list [status [Rn 0] role] [status [Rn 3] role]]
        assert_equal [node_port 0] [status [Rn 3] master_port]
        assert_equal committed [job_field 0 [lindex $ids 1] state]
        failpoint 2 target_after_takeover off
        wait_job_state 0 [lindex $ids 1] done
        foreach n {0 3} {
            wait_for_condition 2000 10 {[status [Rn $n] role] eq "slave" && [status [Rn $n] master_port] eq [node_port 2]} else {fail "node $n follows nobody: [R $n cluster nodes]"}
        }
        assert_same_dump $before [slots_dump 2 $::slots]
    }
}

# A shard without slots of its own to claim: nobody is told by a claim that it was replaced.
foreach {::sleeps ::what} {0 "is there" 1 "sleeps"} {
    start_cluster 3 3 {tags {external:skip cluster} overrides {save ""}} {
        test "A replica takes over from a master that gave its last slot away and has others coming, which $::what: one has them, the other follows" {
            begin
            R 2 set [key_in 10923 x] 1
            failpoint 2 source_before_commit pause
            failpoint 0 source_before_trim pause
            set in [R 2 cluster migrate-slots slotsrange 10923 10930 node [node_id 0] hold]
            foreach n {0 3} {wait_job_state $n $in following}
            set out [migrate 0 1 0 5461]
            wait_job_state 0 $out trimming
            wait_for_condition 1000 10 {[owner_seen_by 3 100] == 1} else {fail [R 3 cluster nodes]}
            R 2 cluster alter-slot-migration id $in release
            wait_job_state 0 $in prepared
            assert_equal [node_port 0] [status [Rn 3] master_port]
            assert_equal OK [R 3 cluster failover takeover]
            if {$::sleeps} {exec kill -STOP [node_pid 0]}
            failpoint 2 source_before_commit off
            if {$::sleeps} {
                wait_for_condition 1000 10 {[regexp "[lindex $::ids 0]\[^\\n\]*master,fail " [R 2 cluster nodes]]} else {fail [R 2 cluster nodes]}
                exec kill -CONT [node_pid 0]
            }
            failpoint 0 source_before_trim off
            foreach n {0 1 2 3} {
                wait_for_condition 2000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
            }
            wait_for_condition 3000 10 {[lsort [list [status [Rn 0] role] [status [Rn 3] role]]] eq {master slave}} else {fail [R 0 cluster nodes]}
            wait_up
            set owner [master_of_shard 0]
            assert_equal [node_port $owner] [status [Rn [expr {3-$owner}]] master_port]
            foreach n {0 1 2 3} {wait_for_condition 1000 10 {[owner_seen_by $n 10923] == $owner} else {fail "node $n: [R $n cluster nodes]"}}
            assert_equal 1 [R $owner get [key_in 10923 x]]
            wait_cluster_agrees
        }
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

foreach ::paused {"" ", its clients being paused"} {
    start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {
        test "A target that is replaced by its replica, which has more slots than it had, follows it$::paused" {
            set before [begin]
            R 2 config set cluster-node-timeout 20000       ;# it defends for four of these
            move_slots 0 2 3 10
            wait_replicated 2 5
            if {$::paused ne ""} {R 2 client pause 1000000 write}
            # The replica claims one slot that its master has given up.
            R 2 config set cluster-require-full-coverage no
            R 2 cluster delslots 16000
            assert_equal OK [R 5 cluster failover takeover]
            wait_for_condition 1000 10 {[owner_seen_by 2 3] == 5} else {fail [R 2 cluster nodes]}
            wait_for_condition 1000 10 {[status [Rn 2] role] eq "slave"} else {fail "it stays a master: [R 2 cluster nodes]"}
            R 2 client unpause
            wait_up
            assert_same_dump $before [slots_dump 5 $::slots]
            wait_replicated 5 2
        }
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "A promoted replica is restarted with a file of before its shard gave slots away: their keys are dropped" {
        set before [begin]
        R 0 set [key_in 100 stays] 1
        wait_replicated 0 3
        R 3 save
        move_slots 0 2 3 10
        wait_replicated 0 3
        assert_equal OK [R 3 cluster failover]
        wait_for_condition 2000 10 {[status [Rn 3] role] eq "master" && [status [Rn 0] role] eq "slave"} else {fail "no failover"}
        wait_cluster_agrees
        # Nobody takes its place meanwhile: it comes back as the master, with what the file has.
        pause_process [node_pid 0]
        kill_node 3
        start_node_again 3
        assert_equal {} [lsearch -all -inline [R 3 cluster nodes] {\[*}]
        assert_equal 1 [R 3 dbsize]
        assert_equal 1 [R 3 cluster countkeysinslot 100]
        assert_equal 1 [count_log_message -3 "Dropped \[0-9\]* keys of slots that this node handed over before it was restarted: 3-10"]
        resume_process [node_pid 0]
        wait_cluster_agrees
        assert_same_dump $before [slots_dump 2 $::slots]
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "A shard is restarted with files of before it gave slots away: the replica drops their keys, too" {
        begin
        R 0 set [key_in 100 stays] 1
        R 0 config set repl-ping-replica-period 3600
        wait_replicated 0 3
        # The same place in the stream: the replica could go on from there.
        foreach n {0 3} {R $n save}
        move_slots 0 2 3 10
        foreach n {3 0} {kill_node $n}
        foreach n {0 3} {start_node_again $n}
        wait_for_condition 3000 10 {[status [Rn 3] master_link_status] eq "up"} else {fail [R 3 info replication]}
        assert_equal 1 [count_log_message 0 "Dropped \[0-9\]* keys of slots that this node handed over before it was restarted: 3-10"]
        assert_equal {1 1} [list [R 0 dbsize] [R 3 dbsize]]
        assert_equal [R 0 debug digest] [R 3 debug digest]
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "A target that its replica replaced, and that copied everything from that one, is promoted: the hand-off is history" {
        set before [begin]
        failpoint 2 target_before_takeover pause
        set id [migrate 0 2 3 10]
        foreach n {0 2 5} state {committed prepared prepared} {wait_job_state $n $id $state}
        assert_equal OK [R 5 cluster failover takeover]
        wait_for_condition 3000 10 {[status [Rn 2] role] eq "slave" && [status [Rn 2] master_link_status] eq "up"} else {fail [R 2 info replication]}
        foreach n {5 0} {wait_job_state $n $id done}
        # Who could tell it how that ended is gone.
        kill_node 0
        wait_for_condition 3000 10 {[status [Rn 3] role] eq "master"} else {fail "replica 3 is not promoted"}
        failpoint 2 target_before_takeover off
        wait_for_condition 1000 10 {[count_log_message -2 "synchronizes anew"] > 0} else {fail [job 2 $id]}
        wait_for_condition 1000 10 {[string match "prepared; the source neither knows*" [job_field 2 $id reason]]} else {fail [job 2 $id]}
        start_node_again 0
        wait_replicated 5 2
        kill_node 5
        wait_for_condition 3000 10 {[status [Rn 2] role] eq "master"} else {fail "replica 2 is not promoted"}
        wait_job_state 2 $id done
        # Nor does the one that copies from it take the job for one that is under way.
        start_node_again 5
        wait_for_condition 3000 10 {[status [Rn 5] master_link_status] eq "up"} else {fail [R 5 info replication]}
        wait_replicated 2 5
        kill_node 2
        wait_for_condition 3000 10 {[status [Rn 5] role] eq "master"} else {fail "replica 5 is not promoted"}
        assert_equal 0 [count_log_message -5 "it does not serve"]
        wait_for_condition 1000 10 {[catch {slots_dump 5 $::slots} dump] == 0} else {fail $dump}
        assert_same_dump $before $dump
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {
    test "A source in doubt that was replaced, and whose successor gave slots away since, follows it" {
        set before [begin]
        failpoint 2 target_before_takeover pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id committed
        R 0 save
        kill_node 0
        wait_for_condition 3000 10 {[status [Rn 3] role] eq "master"} else {fail "replica 3 is not promoted"}
        foreach n {1 3} {wait_for_condition 1000 10 {[CI $n cluster_state] eq "ok"} else {fail [R $n cluster info]}}
        wait_job_state 3 [migrate 3 1 5000 5000] done
        # It is in doubt, too, and hears of the successor first, of the last slot's owner then.
        exec kill -STOP [node_pid 1]
        start_node_again 0
        wait_for_condition 1000 10 {[owner_seen_by 0 100] == 3} else {fail [R 0 cluster nodes]}
        wait_for_condition 1000 10 {[owner_seen_by 0 5000] == 1} else {fail [R 0 cluster nodes]}
        exec kill -CONT [node_pid 1]
        wait_for_condition 3000 10 {[status [Rn 0] role] eq "slave" && [status [Rn 0] master_link_status] eq "up"} else {
            fail "node 0 has [R 0 dbsize] keys: [R 0 cluster nodes]"
        }
        failpoint 2 target_before_takeover off
        assert_ends {2 3} $before -1
    }
}

# A client that writes to the slots at this node: nothing is acknowledged there for as long as the
# source may still have the only good copy.
proc assert_no_stray_writes {n id} {
    set n_writes 0
    while 1 {
        set stray [catch {R $n set [key_in 3 stray[incr n_writes]] x} error]
        if {[job_field 0 $id state] ne "committed"} break
        assert {$stray}
        assert_lessthan $n_writes 1000000 "the source does not hear of the end: [job 0 $id]"
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save ""}} {
    test "A replica that could not take over is promoted before it has copied everything: it serves none of the slots" {
        set before [begin]
        failpoint 5 target_replica_takeover fail
        R 2 config set rdb-key-save-delay 10000
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id taken
        wait_for_condition 1000 10 {[count_log_message -5 "synchronizes anew"] > 0} else {fail "[job 5 $id]"}
        kill_node 2
        assert_no_stray_writes 5 $id
        assert_morethan [count_log_message -5 "it does not serve 3-10"] 0
        failpoint 5 target_replica_takeover off
        assert_ends {0 5} $before 2
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save ""}} {
    test "What such a replica does not serve it does not serve after a restart either" {
        set before [begin]
        failpoint 5 target_replica_takeover fail
        R 5 config set cluster-replica-no-failover yes
        R 2 config set rdb-key-save-delay 10000
        failpoint 0 source_before_ask pause
        set id [migrate 0 2 3 10]
        wait_job_state 2 $id taken
        wait_for_condition 1000 10 {[count_log_message -5 "synchronizes anew"] > 0} else {fail "[job 5 $id]"}
        assert_error "*has no copy yet of the slots 3-10*" {R 5 cluster failover takeover}
        kill_node 2
        # There is nobody else now: it is promoted as it is.
        wait_for_condition 1000 10 {[catch {R 5 cluster failover takeover} error] == 0} else {fail $error}
        R 5 config set cluster-replica-no-failover no
        wait_for_condition 1000 10 {[owner_seen_by 1 3] == 5} else {fail [R 1 cluster nodes]}
        foreach round {promoted restarted} {
            wait_for_condition 1000 10 {[CI 5 cluster_state] eq "ok"} else {fail [R 5 cluster info]}
            assert_error "CLUSTERDOWN Hash slot not served*" {R 5 get [key_in 3 probe]}
            assert_error "CLUSTERDOWN Hash slot not served*" {R 5 set [key_in 10 probe] x}
            # Nor is it served by what does not say so.
            R 5 cluster setslot 3 stable
            assert_error "*Unknown node*" {R 5 cluster setslot 3 node nonsense}
            assert_error "*already busy*" {R 5 cluster addslots 3}
            assert_error "*Slot 3 is not served here*" {R 5 cluster setslot 3 migrating [node_id 1]}
            assert_error "CLUSTERDOWN Hash slot not served*" {R 5 set [key_in 3 probe] x}
            if {$round eq "promoted"} {kill_node 5; start_node_again 5}
        }
        assert_equal committed [job_field 0 $id state]
        # Who copies everything from it has no copy either.
        start_node_again 2
        wait_for_condition 1000 10 {[status [Rn 2] role] eq "slave" && [status [Rn 2] master_link_status] eq "up"} else {fail [R 2 cluster nodes]}
        assert_equal OK [R 2 cluster failover takeover]
        wait_for_condition 1000 10 {[status [Rn 2] role] eq "master" && [CI 2 cluster_state] eq "ok"} else {fail [R 2 cluster nodes]}
        assert_error "CLUSTERDOWN Hash slot not served*" {R 2 set [key_in 3 probe] x}
        wait_for_condition 1000 10 {[status [Rn 5] role] eq "slave" && [status [Rn 5] master_link_status] eq "up"} else {fail [R 5 cluster nodes]}
        wait_for_condition 1000 10 {[llength [R 2 cluster replicas [node_id 2]]] == 1} else {fail [R 2 cluster nodes]}
        kill_node 5
        R 2 config set cluster-slot-migration-wait-replicas 0   ;# the job goes on from the start, and its replica is dead
        # It gives them up, and says so as often as it is asked: the first answer may be lost.
        failpoint 0 source_before_take_back fail
        failpoint 0 source_before_ask off
        wait_for_condition 2000 10 {[reached 0 source_before_take_back] > 2} else {fail "[job 0 $id]"}
        failpoint 0 source_before_take_back off
        assert_ends {0 2} $before 5
        assert_equal 0 [string match *slotmig-lacking* [exec cat [lindex [R 2 config get dir] 1]/[lindex [R 2 config get cluster-config-file] 1]]]
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save ""}} {
    test "A replica with an append-only file that was carried, and prepared, is promoted: it has the slots or the source has them" {
        set before [begin]
        R 5 config set appendonly yes
        set id [lindex [R 0 cluster migrate-slots slotsrange 3 10 node [node_id 2] hold] 0]
        wait_job_state 2 $id following
        set syncs [status [Rn 2] sync_full]
        R 2 debug change-repl-id
        R 2 client kill type replica
        wait_for_condition 1000 10 {[status [Rn 2] sync_full] > $syncs && [status [Rn 5] master_link_status] eq "up"} else {fail "no full synchronization"}
        wait_for_condition 1000 10 {[status [Rn 5] aof_rewrite_in_progress] == 0 && [status [Rn 5] aof_rewrite_scheduled] == 0} else {fail "node 5 rewrites for ever"}
        wait_job_state 5 $id following
        failpoint 0 source_before_commit pause
        R 0 cluster alter-slot-migration id $id release
        wait_job_state 5 $id prepared
        pause_process [node_pid 5]
        R 2 client kill type replica
        failpoint 0 source_before_commit off
        wait_job_state 2 $id taken
        kill_node 2
        resume_process [node_pid 5]
        # Whoever acknowledges a write keeps it.
        set acknowledged {}
        for {set i 0} {![job_ended [job_field 0 $id state]]} {incr i} {
            foreach n {0 5} {if {![catch {R $n set [key_in 3 during$i:$n] x}]} {lappend acknowledged [key_in 3 during$i:$n]}}
            assert_lessthan $i 100000 "the source does not hear of the end: [job 0 $id]"
        }
        assert_morethan [llength $acknowledged] 0
        wait_for_condition 1000 10 {[owner_seen_by 1 3] in {0 5}} else {fail [R 1 cluster nodes]}
        foreach key $acknowledged {assert_equal 1 [R [owner_seen_by 1 3] del $key] $key}
        assert_ends {0 5} $before 2
    }
}
