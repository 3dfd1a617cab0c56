# CLUSTER FAILOVER, FORCE and TAKEOVER of either side, in any phase of a migration: it goes
# on with the new masters, the slots have one owner, and whatever the replica had when it
# was told is there. (With writers that go on: rivals-replicas.tcl, "PEERS 31".)
# The shards are of nodes 0 and 3 (source), 1 and 4, 2 and 5 (target).
#
# SLOTMIG_MATRIX=all runs all rows, else each phase of each side has a turn with one kind.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}
set ::all_rows [expr {[info exists ::env(SLOTMIG_MATRIX)] && $::env(SLOTMIG_MATRIX) eq "all"}]

# A phase, the states of source and target in it, and the fail point that holds it.
set ::held_by {
    waiting   waiting   connecting source source_before_fork
    loading   snapshot  loading    target target_before_section
    following streaming following  source source_before_cut
    prepared  fenced    prepared   source source_before_commit
    committed committed prepared   target target_before_takeover
    taken     committed taken      target target_after_takeover
    trimming  trimming  done       source source_before_trim
}

# Until it is the master: who has voted for one of its shard may refuse for a while.
proc fail_over {n kind} {
    set mate [shard_mate $n]
    set over {[status [Rn $n] role] eq "master" && [status [Rn $mate] role] eq "slave"}
    for {set tries 0} {$tries < 4 && ![expr $over]} {incr tries} {
        catch {R $n cluster failover {*}$kind}
        for {set i 0} {$i < 550 && ![expr $over]} {incr i} {after 10}
    }
    wait_promoted $n
    wait_for_condition 2000 10 {[status [Rn $mate] role] eq "slave"} else {fail "node $mate does not follow: [R $mate cluster nodes]"}
}

# As node n knows it, and no other is asked: some stand still.
proc owner_id {n slot} {
    foreach range [R $n cluster slots] {
        if {$slot >= [lindex $range 0] && $slot <= [lindex $range 1]} {return [lindex $range 2 2]}
    }
}

# Everything has come to rest: no job, no record; a shard has the slots with these keys, at
# both of its nodes, and nobody else has one of them.
proc assert_rest {shard before} {
    for {set n 0} {$n < 6} {incr n} {
        wait_for_condition 2000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
    }
    wait_replicas_up
    wait_cluster_agrees
    set owner [shard_master $shard]
    foreach slot $::slots {assert_equal $owner [slot_owner 1 $slot] "owner of slot $slot"}
    assert_same_dump $before [slots_dump $owner $::slots]
    foreach m {0 1 2} {
        wait_shard_agrees $m $::slots
        if {$m == $shard} continue
        foreach n [list $m [shard_mate $m]] {
            wait_for_condition 500 10 {[keys_in_slots $n $::slots] eq ""} else {fail "node $n has [llength [keys_in_slots $n $::slots]] keys"}
        }
    }
    for {set n 0} {$n < 6} {incr n} {
        assert_equal 0 [exec sh -c "grep -c slotmig-handoff [lindex [R $n config get dir] 1]/[lindex [R $n config get cluster-config-file] 1] || true"] "records of node $n"
    }
    foreach slot $::slots {
        assert_equal 1 [R $owner incr [key_in $slot probe]]
        assert_equal 1 [R $owner del [key_in $slot probe]]
    }
}

proc run_row {kind side phase} {
    fresh_shards $::slots stay
    set from [shard_master 0]
    set to [shard_master 2]
    fill_strings $from $::slots 800 100
    set before [slots_dump $from $::slots]
    foreach {name at_source at_target where point} $::held_by {if {$name eq $phase} break}
    set node [dict get [list source $from target $to] $where]
    failpoint $node $point pause
    set id [migrate $from $to 3 10]
    wait_job_state $from $id $at_source
    wait_job_state $to $id $at_target
    if {$phase in {waiting loading following}} {
        foreach slot $::slots {R $from rpush [key_in $slot list] a b}
        set before [slots_dump $from $::slots]
    }
    foreach n {0 2} {wait_shard_in_step $n}
    set promoted [shard_mate [expr {$side eq "source" ? $from : $to}]]
    set_failover_timeouts 1000
    fail_over $promoted $kind
    failpoint $node $point off
    set_failover_timeouts 3000
    assert_rest 2 $before
    # Who took its master's place when all was over does not know it.
    foreach n [list [shard_master 0] [shard_master 2]] {
        if {![catch {job $n $id} job]} {assert_equal {done {}} [list [dict get $job state] [dict get $job last-error]]}
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {save "" cluster-allow-replica-migration no}} {
    wait_replicas_up

    # Upstream counts the votes of the last election once more: such a master has no new epoch and is
    # none in a moment, what it acknowledged meanwhile is lost.
    test "A manual failover soon after another one is an election of its own" {
        foreach n {3 0} {
            assert_equal OK [R $n cluster failover]
            wait_promoted $n
            set mate [shard_mate $n]
            wait_for_condition 1000 10 {[status [Rn $mate] master_link_status] eq "up" && [llength [R $n cluster replicas [node_id $n]]] == 1} else {
                fail "node $mate: [R $mate info replication]"
            }
            # Who still takes it for a master does not vote for it.
            foreach voter {1 2 4 5} {
                wait_for_condition 1000 10 {[llength [R $voter cluster replicas [node_id $n]]] == 1} else {
                    fail "node $voter has not heard: [R $voter cluster nodes]"
                }
            }
        }
        set begun [count_log_message -3 "Start of election delayed"]
        assert_equal OK [R 3 cluster failover]
        wait_for_condition 1000 10 {[count_log_message -3 "Start of election delayed"] > $begun} else {fail "no election"}
        assert_morethan_equal [count_log_message -3 "Starting a failover election for epoch"] [count_log_message -3 "Failover election won"]
    }

    set turn 0
    foreach {side phase} {
        source waiting
        source loading
        source following
        source prepared
        source committed
        source taken
        source trimming
        target loading
        target following
        target prepared
        target committed
        target taken
    } {
        incr turn
        foreach kind {"" FORCE TAKEOVER} index {0 1 2} {
            if {!$::all_rows && $turn % 3 != $index} continue
            test "[string trim "CLUSTER FAILOVER $kind"] of the $side while a job is $phase: it goes on, the slots have one owner, no key is lost" {
                run_row $kind $side $phase
            }
        }
    }

    # It has no record and no vote is asked for: the target alone can tell.
    test "CLUSTER FAILOVER TAKEOVER of a source's replica that has slept through all of the migration: the target keeps the slots" {
        fresh_shards $::slots stay
        set from [shard_master 0]
        set to [shard_master 2]
        set asleep [shard_mate $from]
        fill_strings $from $::slots 800 100
        wait_shard_in_step 0
        set asleep_id [node_id $asleep]
        set rd [redis_deferring_client -$asleep]
        pause_process [node_pid $asleep]
        wait_for_condition 1500 10 {[regexp "$asleep_id\[^\\n\]*slave,fail " [R $from cluster nodes]]} else {fail "nobody misses node $asleep: [R $from cluster nodes]"}
        set id [migrate $from $to 3 10]
        foreach n [list $from $to] {wait_job_state $n $id done}
        foreach slot $::slots {R $to rpush [key_in $slot list] after}
        set before [slots_dump $to $::slots]
        $rd cluster failover takeover
        resume_process [node_pid $asleep]
        assert_equal OK [$rd read]
        $rd close
        wait_promoted $asleep
        assert_rest 2 $before
    }

    test "A claim of the source's shard is answered although the cluster is down for other slots" {
        fresh_shards $::slots stay
        set from [shard_master 0]
        set to [shard_master 2]
        fill_strings $from $::slots 80 100
        set id [migrate $from $to 3 10]
        foreach n [list $from $to] {wait_job_state $n $id done}
        set before [slots_dump $to $::slots]
        set to_id [node_id $to]
        set_failover_timeouts 1000
        foreach n {1 4} {pause_process [node_pid $n]}
        wait_for_condition 1000 10 {[CI $to cluster_state] eq "fail"} else {fail [R $to cluster info]}
        R $from multi
        R $from cluster delslots 3
        R $from cluster addslots 3
        R $from cluster bumpepoch
        R $from exec
        wait_for_condition 1000 10 {[owner_id $from 3] eq $to_id} else {fail "node $from keeps it: [R $from cluster nodes]"}
        assert_morethan [count_log_message -$to "claims slot 3, which this node took over"] 0
        foreach n {1 4} {resume_process [node_pid $n]}
        set_failover_timeouts 3000
        assert_rest 2 $before
    }

    test "A slot that is moved back the classic way at once is not defended" {
        fresh_shards $::slots stay
        set from [shard_master 0]
        set to [shard_master 2]
        fill_strings $from $::slots 80 100
        set before [slots_dump $from 3]
        set id [migrate $from $to 3 10]
        foreach n [list $from $to] {wait_job_state $n $id done}
        R $from cluster setslot 3 importing [node_id $to]
        R $to cluster setslot 3 migrating [node_id $from]
        R $to migrate 127.0.0.1 [node_port $from] "" 0 5000 keys {*}[R $to cluster getkeysinslot 3 1000]
        R $from cluster setslot 3 node [node_id $from]
        # The claim comes before the operator's next command.
        wait_for_condition 1000 10 {[slot_owner $to 3] == $from} else {fail "node $to keeps it: [R $to cluster nodes]"}
        R $to cluster setslot 3 node [node_id $from]
        wait_cluster_agrees
        assert_equal $from [slot_owner 1 3]
        assert_same_dump $before [slots_dump $from 3]
    }

    test "A command that waits for a target is told that its node is no master any more" {
        fresh_shards $::slots stay
        set from [shard_master 0]
        set to [shard_master 2]
        set mate [shard_mate $from]
        hold_in_phase offered $from $to 3 10
        assert_equal OK [R $mate cluster failover takeover]
        wait_for_condition 1000 10 {[status [Rn $from] role] eq "slave"} else {fail "node $from does not follow"}
        assert_error "UNBLOCKED*" {$::held_request read}
        $::held_request close
        resume_process [node_pid $to]
        set_failover_timeouts 3000
        for {set n 0} {$n < 6} {incr n} {
            wait_for_condition 2000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
        }
        wait_replicas_up
        wait_cluster_agrees
    }
}

# What node 0 says of a hand-off that it does not know: PENDING and why, if it is not fresh.
proc answer_of_unknown {} {
    R 0 cluster slotmig ask [string repeat a 40] [string repeat b 40] [node_id 0] source inherited 16000 16000
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "A master that was in a minority tells nothing until it has had time to hear the news" {
        R 0 debug mark-internal-client
        wait_for_condition 1000 10 {![string match "PENDING *" [answer_of_unknown]]} else {fail [answer_of_unknown]}
        foreach n {1 2 4 5} {exec kill -STOP [node_pid $n]}
        wait_for_condition 1000 10 {[string match "PENDING only 1 of 3 masters*" [answer_of_unknown]]} else {fail [answer_of_unknown]}
        foreach n {1 2 4 5} {exec kill -CONT [node_pid $n]}
        set said {}
        wait_for_condition 20000 1 {
            [set answer [answer_of_unknown]] ne "" && ($answer in $said || [lappend said $answer] ne "") && ![string match "PENDING *" $answer]
        } else {
            fail $said
        }
        assert_match "*this node was in a minority a moment ago*" $said
        R 0 debug mark-internal-client unmark
    }
}
