# Two replicas on each side: how many must have the slots, who is waited for, who of them is
# promoted. Nodes n, n+3 and n+6 are a shard; slots 3 to 10 go between shards 0 and 2.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

proc alive {} {
    set nodes {}
    for {set n 0} {$n < 9} {incr n} {if {[is_alive [node_pid $n]]} {lappend nodes $n}}
    return $nodes
}

proc master_of {shard} {
    foreach n [alive] {
        if {$n % 3 == $shard && [status [Rn $n] role] eq "master"} {return $n}
    }
    return -1
}

proc replicas_of {shard} {
    lmap n [alive] {if {$n % 3 != $shard || [status [Rn $n] role] eq "master"} continue; set n}
}

proc owner_seen_by {n slot} {
    foreach range [R $n cluster slots] {
        if {$slot >= [lindex $range 0] && $slot <= [lindex $range 1]} {return [lsearch -exact $::ids [lindex $range 2 2]]}
    }
    return -1
}

# ms, of each election in which node n wanted to stand.
proc election_delays {n} {
    set f [open [srv -$n stdout]]
    set text [read $f]
    close $f
    lmap {- ms} [regexp -all -inline {Start of election delayed for (\d+)} $text] {set ms}
}

proc wait_shard_same {shard} {
    set master [master_of $shard]
    foreach n [replicas_of $shard] {
        wait_for_condition 3000 10 {[status [Rn $n] master_link_status] eq "up" && [R $n dbsize] == [R $master dbsize] &&
                                    [R $n debug digest] eq [R $master debug digest]} else {
            fail "node $n has [R $n dbsize] keys, its master $master [R $master dbsize]"
        }
    }
}

# All nodes are there; the slots' owner, the other side's master.
proc begin {} {
    for {set n 0} {$n < 9} {incr n} {
        if {[is_alive [node_pid $n]]} {exec kill -CONT [node_pid $n]} else {start_node_again $n}
    }
    set ::ids {}
    for {set n 0} {$n < 9} {incr n} {
        lappend ::ids [node_id $n]
        failpoints_off $n
        R $n config set cluster-node-timeout 1000
        R $n config set cluster-replica-validity-factor 0
        R $n config set cluster-replica-no-failover no
        R $n config set cluster-slot-migration-write-pause-timeout 10000
    }
    foreach n [alive] {
        if {[status [Rn $n] role] eq "master"} {R $n cluster cancel-slot-migrations all}
    }
    foreach n [alive] {
        wait_for_condition 3000 10 {[jobs_running $n] == 0} else {fail "node $n: [R $n cluster slot-migrations]"}
        if {[status [Rn $n] role] eq "master"} continue
        wait_for_condition 3000 10 {[status [Rn $n] master_link_status] eq "up"} else {fail "node $n: [R $n info replication]"}
    }
    wait_for_condition 3000 10 {[master_of 0] != -1 && [master_of 1] != -1 && [master_of 2] != -1} else {fail "a shard has no master"}
    foreach n [alive] {
        wait_for_condition 3000 10 {[getInfoProperty [R $n cluster info] cluster_state] eq "ok" &&
                                    [owner_seen_by $n 3] == [owner_seen_by 0 3] && [owner_seen_by 0 3] in [list [master_of 0] [master_of 2]]} else {
            fail "node $n: [R $n cluster nodes]"
        }
    }
    set from [owner_seen_by 0 3]
    set to [master_of [expr {2 - $from%3}]]
    foreach n [list $from $to] {
        R $n flushall
        wait_for_condition 3000 10 {[getInfoProperty [R $n info replication] connected_slaves] == 2} else {fail "node $n: [R $n info replication]"}
    }
    fill_strings $from $::slots 1000
    foreach shard {0 2} {wait_shard_same $shard}
    list $from $to
}

# One owner of this shard, seen by all who live; no key elsewhere, replicas the same, no job.
proc assert_ended {shard before} {
    foreach n [alive] {
        wait_for_condition 3000 10 {[jobs_running $n] == 0} else {fail "node $n: [R $n cluster slot-migrations]"}
        wait_for_condition 3000 10 {[owner_seen_by $n 3] == [master_of $shard]} else {
            fail "node $n sees slot 3 at node [owner_seen_by $n 3], expected [master_of $shard]: [R $n cluster nodes]"
        }
        foreach slot $::slots {assert_equal [owner_seen_by $n 3] [owner_seen_by $n $slot]}
    }
    assert_same_dump $before [slots_dump [master_of $shard] $::slots]
    foreach other {0 1 2} {
        wait_shard_same $other
        foreach slot $::slots {
            if {$other != $shard} {assert_equal 0 [R [master_of $other] cluster countkeysinslot $slot] "slot $slot in shard $other"}
        }
    }
}

proc start_job {from to args} {
    lindex [R $from cluster migrate-slots slotsrange 3 10 node [node_id $to] {*}$args] 0
}

proc wait_ended {from to id} {
    wait_job_ended $from $id
    wait_job_ended $to $id
}

# The job, whose target's replicas are prepared both, and `old` is cut off from then on: {from to old new id}.
proc cut_off_prepared {} {
    lassign [begin] from to
    lassign [replicas_of [expr {$to%3}]] old new
    failpoint $from source_before_commit pause
    set id [start_job $from $to waitreplicas 1]
    foreach n [list $old $new] {
        wait_for_condition 2000 10 {![catch {job_field $n $id state} state] && $state eq "prepared"} else {fail "node $n: $state"}
    }
    R $old config set masterauth wrong
    R $to client kill type replica
    wait_for_condition 2000 10 {[status [Rn $new] master_link_status] eq "up" && [status [Rn $to] connected_slaves] == 1} else {fail [R $to info replication]}
    return [list $from $to $old $new $id]
}

# No replica leaves its shard for one that has lost its own.
start_cluster 3 6 {tags {external:skip cluster} overrides {save "" repl-diskless-sync-delay 0 cluster-migration-barrier 10}} {
    foreach wait {0 1 2} {
        test "Of two replicas of the target $wait must have the slots: WAITREPLICAS, with one that does not prepare" {
            lassign [begin] from to
            set lame [lindex [replicas_of [expr {$to%3}]] 0]
            set before [slots_dump $from $::slots]
            failpoint $lame target_replica_prepared pause
            R $from config set cluster-slot-migration-write-pause-timeout 500
            set id [start_job $from $to waitreplicas $wait]
            if {$wait == 2} {
                wait_for_condition 2000 10 {[job_field $from $id attempt] >= 2} else {fail "[job $from $id]"}
                wait_for_condition 2000 10 {[string match "*1 of 2 replicas have the slots*" [job_field $to $id reason]]} else {fail "[job $to $id]"}
                R $from set [key_in 5 meanwhile] yes
                R $from del [key_in 5 meanwhile]
                failpoint $lame target_replica_prepared off
            }
            wait_job_state $from $id done
            failpoint $lame target_replica_prepared off
            assert_ended [expr {$to%3}] $before
        }
    }

    test "A replica of the target that hangs holds up only who waits for it" {
        lassign [begin] from to
        set lame [lindex [replicas_of [expr {$to%3}]] 1]
        set before [slots_dump $from $::slots]
        foreach n [alive] {R $n config set cluster-node-timeout 60000}
        set id [start_job $from $to waitreplicas 2 hold]
        wait_job_state $from $id streaming
        exec kill -STOP [node_pid $lame]
        R $from set [key_in 5 meanwhile] yes
        R $from del [key_in 5 meanwhile]
        R $from cluster alter-slot-migration id $id release
        wait_for_condition 3000 10 {[string match "*fewer than 2 of 2 replicas have the snapshot and follow*" [job_field $to $id reason]] ||
                                    [string match "*replicas have the slots*" [job_field $to $id reason]] ||
                                    [string match "*of writes to the slots*" [job_field $from $id reason]]} else {
            fail "[job $from $id] [job $to $id]"
        }
        assert_equal 0 [job_ended [job_field $from $id state]]
        R $from cluster alter-slot-migration id $id waitreplicas 1
        wait_job_state $from $id done
        exec kill -CONT [node_pid $lame]
        assert_ended [expr {$to%3}] $before
    }

    test "A replica of the source that was not told of the hand-off is waited for, until it is there or FAIL" {
        foreach how {returns fails} {
            lassign [begin] from to
            set lame [lindex [replicas_of [expr {$from%3}]] 0]
            set before [slots_dump $from $::slots]
            if {$how eq "returns"} {foreach n [alive] {R $n config set cluster-node-timeout 60000}}
            set id [start_job $from $to hold]
            wait_job_state $from $id streaming
            exec kill -STOP [node_pid $lame]
            R $from cluster alter-slot-migration id $id release
            if {$how eq "returns"} {
                wait_for_condition 3000 10 {[string match "*[lindex $::ids $lame]*" [job_field $from $id reason]]} else {fail "[job $from $id]"}
                assert_equal 0 [job_ended [job_field $from $id state]]
                exec kill -CONT [node_pid $lame]
            }
            wait_job_state $from $id done
            exec kill -CONT [node_pid $lame]
            assert_ended [expr {$to%3}] $before
        }
    }

    # Where the target's master dies, whether who is promoted was prepared, and whose the
    # slots are in the end.
    foreach {point at prepared} {
        target_before_section 2 0
        source_before_cut     0 1
        source_before_commit  0 1
        source_before_commit  0 0
        target_before_takeover 2 1
        target_before_takeover 2 0
    } {
        test "The target dies ($point), of its two replicas one that is [expr {$prepared ? {} : {not }}]prepared is promoted" {
            lassign [begin] from to
            set before [slots_dump $from $::slots]
            lassign [replicas_of [expr {$to%3}]] a b
            # `b` is not prepared, if anybody is.
            if {$point in {source_before_commit target_before_takeover}} {failpoint $b target_replica_prepared pause}
            R [expr {$prepared ? $b : $a}] config set cluster-replica-no-failover yes
            set node [expr {$at == 0 ? $from : $to}]
            failpoint $node $point [expr {$point eq "target_before_takeover" ? "crash" : "pause"}]
            set id [start_job $from $to waitreplicas 1]
            switch $point {
                target_before_section {wait_job_state $from $id snapshot}
                source_before_cut {wait_job_state $from $id streaming}
                source_before_commit {
                    wait_job_state $to $id prepared
                    wait_job_state $a $id prepared
                }
                target_before_takeover {wait_node_dead $to}
            }
            if {$point ne "target_before_takeover"} {kill_node $to}
            wait_for_condition 3000 10 {[master_of [expr {$to%3}]] != -1} else {fail "nobody is promoted"}
            set new [master_of [expr {$to%3}]]
            assert_equal [expr {$prepared ? $a : $b}] $new
            foreach n [list $from $a $b] {failpoints_off $n}
            wait_job_state $from $id done
            assert_ended [expr {$to%3}] $before
            start_node_again $to
            assert_ended [expr {$to%3}] $before
        }
    }

    test "Both replicas of the target are gone: the job says for what it waits, and goes on when it need not" {
        lassign [begin] from to
        set before [slots_dump $from $::slots]
        set id [start_job $from $to hold]
        wait_job_state $from $id streaming
        set both [replicas_of [expr {$to%3}]]
        foreach n $both {kill_node $n}
        R $from cluster alter-slot-migration id $id release
        wait_for_condition 3000 10 {[string match "*replicas have the snapshot and follow*" [job_field $to $id reason]]} else {fail "[job $to $id]"}
        assert_equal 0 [job_ended [job_field $from $id state]]
        R $from set [key_in 5 meanwhile] yes
        R $from del [key_in 5 meanwhile]
        R $from cluster alter-slot-migration id $id waitreplicas 0
        wait_job_state $from $id done
        foreach n $both {start_node_again $n}
        assert_ended [expr {$to%3}] $before
    }

    test "A replica without a copy lets the one that has it be elected" {
        lassign [begin] from to
        set before [slots_dump $from $::slots]
        lassign [replicas_of [expr {$to%3}]] without with
        # It misses the take-over, and does not get to a new copy.
        failpoint $without target_replica_takeover fail
        R $to config set rdb-key-save-delay 100000
        set id [migrate $from $to 3 10]
        foreach n [list $from $to $with] {wait_job_state $n $id done}
        wait_for_condition 1000 10 {[count_log_message -$without "synchronizes anew"] > 0} else {fail [job $without $id]}
        foreach how {{} force takeover} {
            assert_error "*has no copy yet of the slots 3-10*promote another node*" {R $without cluster failover {*}$how}
        }
        # It does not answer for keys that it has not got.
        wait_for_condition 1000 10 {[owner_seen_by $without 3] == $to} else {fail [R $without cluster nodes]}
        R $without readonly
        assert_error "MOVED 3 *" {R $without get [key_in 3 probe]}
        R $without readwrite
        set earlier [llength [election_delays $without]]
        kill_node $to
        wait_for_condition 3000 10 {[master_of [expr {$to%3}]] != -1} else {fail "nobody is promoted"}
        assert_equal $with [master_of [expr {$to%3}]]
        # Its rank alone makes it wait for two seconds at most.
        foreach delay [lrange [election_delays $without] $earlier end] {assert_morethan $delay 2999}
        assert_same_dump $before [slots_dump $with $::slots]
        failpoint $without target_replica_takeover off
        start_node_again $to
    }

    # The election that it scheduled for the first failure, long ahead as its own node timeout is long, is
    # not one for the second.
    test "A replica without a copy stands back anew when the one that was elected fails, too" {
        lassign [begin] from to
        set before [slots_dump $from $::slots]
        lassign [replicas_of [expr {$to%3}]] without with
        # It misses the take-over, and no master lets it in.
        failpoint $without target_replica_takeover fail
        foreach {name value} {masteruser nobody masterauth none} {R $without config set $name $value}
        set id [migrate $from $to 3 10]
        foreach n [list $from $to $with] {wait_job_state $n $id done}
        wait_for_condition 1000 10 {[count_log_message -$without "synchronizes anew"] > 0} else {fail [job $without $id]}
        R $without config set cluster-node-timeout 5000
        set earlier [llength [election_delays $without]]
        exec kill -STOP [node_pid $to]
        wait_for_condition 3000 10 {[status [Rn $with] role] eq "master"} else {fail "nobody is promoted"}
        assert_equal [expr {$earlier + 1}] [llength [election_delays $without]]
        exec kill -CONT [node_pid $to]
        wait_for_condition 3000 10 {[status [Rn $to] role] eq "slave" && [status [Rn $to] master_link_status] eq "up"} else {fail [R $to info replication]}
        wait_for_condition 3000 10 {[status [Rn $without] master_port] == [srv -$with port]} else {fail [R $without info replication]}
        kill_node $with
        wait_for_condition 3000 10 {[status [Rn $to] role] eq "master"} else {fail "nobody is promoted again"}
        assert_equal slave [status [Rn $without] role]
        set delays [lrange [election_delays $without] $earlier end]
        assert_equal 2 [llength $delays] $delays
        foreach delay $delays {assert_morethan $delay 6999}
        assert_same_dump $before [slots_dump $to $::slots]
        foreach name {masteruser masterauth} {R $without config set $name ""}
        failpoint $without target_replica_takeover off
        start_node_again $with
        assert_ended [expr {$to%3}] $before
    }

    test "A replica that came by a partial synchronization in mid-job copies everything, and the job with it" {
        lassign [begin] from to
        set before [slots_dump $from $::slots]
        lassign [replicas_of [expr {$to%3}]] new other
        set before_anew [count_log_message -$other "synchronizes anew"]
        set id [start_job $from $to hold]
        wait_job_state $from $id streaming
        foreach n [list $new $other] {wait_job_state $n $id following}
        # The old target is a replica then, which has the data, but not the job as its master has it.
        assert_equal OK [R $new cluster failover]
        wait_for_condition 3000 10 {[status [Rn $new] role] eq "master" && [status [Rn $to] master_link_status] eq "up"} else {fail [R $to info replication]}
        foreach n [list $new $to] {
            wait_for_condition 1000 10 {[job_field $n $id state] eq "following"} else {fail [job $n $id]}
        }
        assert_equal $before_anew [count_log_message -$other "synchronizes anew"]
        R $from cluster alter-slot-migration id $id release
        foreach n [list $from $new $other $to] {wait_job_state $n $id done}
        assert_ended [expr {$to%3}] $before
    }

    test "With WAITREPLICAS 0 such a replica copies everything at the end, once" {
        lassign [begin] from to
        set before [slots_dump $from $::slots]
        lassign [replicas_of [expr {$to%3}]] new other
        set told [count_log_message -$to "the master's other replicas have it"]
        set id [start_job $from $to hold waitreplicas 0]
        wait_job_state $from $id streaming
        foreach n [list $new $other] {wait_job_state $n $id following}
        assert_equal OK [R $new cluster failover]
        wait_for_condition 3000 10 {[status [Rn $new] role] eq "master" && [status [Rn $to] master_link_status] eq "up"} else {fail [R $to info replication]}
        wait_job_state $new $id following
        wait_for_condition 1000 10 {[count_log_message -$new "replica [lindex $::ids $to] does not have it"] > 0} else {fail [job $new $id]}
        set synced [status [Rn $new] sync_full]
        R $from cluster alter-slot-migration id $id release
        foreach n [list $from $new $other] {wait_job_state $n $id done}
        wait_for_condition 1000 10 {[status [Rn $new] sync_full] == $synced+1} else {fail "no full synchronization"}
        assert_ended [expr {$to%3}] $before
        assert_equal $synced [expr {[status [Rn $new] sync_full] - 1}]
        # Not by COPY in the middle, which is when others are wanted and suffice.
        assert_equal $told [count_log_message -$to "the master's other replicas have it"]
    }

    # Upstream's, and not of a migration; but a replica that lacks slots copies everything more often.
    test "A replica gets another master while it loads what came by the RDB channel" {
        begin
        set master [master_of 1]
        lassign [replicas_of 1] new slow
        fill_strings $master 6000 20000
        foreach {name value} {key-load-delay 500 loading-process-events-interval-bytes 1024 repl-diskless-load disabled} {
            R $slow config set $name $value
        }
        R $master debug change-repl-id
        R $master client kill type replica
        wait_for_condition 3000 10 {[status [Rn $new] master_link_status] eq "up" && [status [Rn $slow] loading] == 1} else {fail [R $slow info replication]}
        kill_node $master
        wait_for_condition 3000 10 {[status [Rn $new] role] eq "master"} else {fail [R $new cluster nodes]}
        wait_for_condition 3000 10 {[status [Rn $slow] master_port] == [srv -$new port]} else {fail [R $slow info replication]}
        assert_equal 1 [status [Rn $slow] loading]
        R $slow config set key-load-delay 0
        wait_shard_same 1
        start_node_again $master
        R $new flushall
        wait_shard_same 1
    }

    test "A replica comes to the target in mid-job, from another shard: it has the slots with the others" {
        lassign [begin] from to
        set before [slots_dump $from $::slots]
        set id [start_job $from $to waitreplicas 2 hold]
        wait_job_state $from $id streaming
        set new [lindex [replicas_of 1] 0]
        R $new cluster replicate [node_id $to]
        wait_for_condition 3000 10 {[status [Rn $new] master_link_status] eq "up"} else {fail "node $new: [R $new info replication]"}
        wait_job_state $new $id following
        # Who has not said yet how far it is does not count as a replica.
        wait_for_condition 1000 10 {[regexp -all {state=online} [R $to info replication]] == 3} else {fail [R $to info replication]}
        R $to cluster alter-slot-migration id $id waitreplicas 3
        R $from cluster alter-slot-migration id $id release
        wait_job_state $from $id done
        wait_job_state $new $id done
        wait_for_condition 3000 10 {[R $new debug digest] eq [R $to debug digest]} else {fail "node $new differs"}
        R $new cluster replicate [node_id [master_of 1]]
        wait_shard_same 1
        assert_ended [expr {$to%3}] $before
    }

    # It does not know which attempt was taken over: its master's epoch is of something else since.
    test "A replica that was prepared for the attempt that was taken over, and cannot tell, asks the source and has the slots" {
        lassign [cut_off_prepared] from to old new id
        set before [slots_dump $from $::slots]
        failpoint $to target_after_takeover pause
        failpoint $from source_before_commit off
        wait_job_state $to $id taken
        R [master_of 1] cluster bumpepoch
        wait_for_condition 2000 10 {[string match "BUMPED*" [R $to cluster bumpepoch]]} else {fail [R $to cluster nodes]}
        set epoch [dict get [cluster_get_myself $to] config_epoch]
        wait_for_condition 2000 10 {[owner_seen_by $old 3] == $to && [regexp "[node_id $to]\[^\n\]* $epoch connected" [R $old cluster nodes]]} else {fail [R $old cluster nodes]}
        R $old config set cluster-node-timeout 60000
        foreach n [list $new $to] {kill_node $n}
        assert_equal OK [R $old cluster failover takeover]
        wait_for_condition 1000 10 {[count_log_message -$old "it does not serve 3-10"] > 0} else {fail "it has not asked: [job $old $id]"}
        R $old config set cluster-node-timeout 1000
        R $old config set cluster-slot-migration-wait-replicas 0    ;# they are dead
        wait_ended $from $old $id
        assert_equal done [job_field $from $id state]
        assert_ended [expr {$to%3}] $before
        R $old config set cluster-slot-migration-wait-replicas 1
        R $old config set masterauth ""
    }

    # The last one here: restarted nodes that lost their last slot to another shard join that one.
    test "A replica that was prepared for an older attempt than the one taken over does not serve what it has" {
        lassign [cut_off_prepared] from to old new id
        failpoint $from source_before_commit fail
        wait_for_condition 2000 10 {[job_field $from $id attempt] >= 2} else {fail [job $from $id]}
        R $from set [key_in 5 later] yes
        set before [slots_dump $from $::slots]
        failpoint $to target_after_takeover pause
        failpoint $from source_before_commit off
        wait_job_state $to $id taken
        wait_for_condition 2000 10 {[owner_seen_by $old 3] == $to} else {fail [R $old cluster nodes]}
        assert_equal prepared [job_field $old $id state]
        wait_for_condition 2000 10 {[job_field $new $id state] eq "done"} else {fail [job $new $id]}
        R $old config set cluster-node-timeout 60000    ;# it is to have its master's last word, not an election
        foreach n [list $new $to] {kill_node $n}
        assert_equal committed [job_field $from $id state]
        assert_equal OK [R $old cluster failover takeover]
        R $old config set cluster-node-timeout 1000
        wait_job_ended $from $id
        assert_ended [expr {$from%3}] $before       ;# the source has them back, and later
        R $old config set masterauth ""
    }
}
