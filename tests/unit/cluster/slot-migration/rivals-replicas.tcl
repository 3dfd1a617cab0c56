# The failures of our list (see rivals.tcl) that need replicas, on both sides and
# under load: a replica that stands still, dies with its master, or is promoted at
# any step of a hand-off. Shards are of nodes 0 and 3, 1 and 4, 2 and 5.

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

# A step of the job, by default from node 0 to node 2: the state that tells it, where, and the
# fail point that keeps it there. COMMIT is lost on the way in `committed`, TAKEN in
# `taken`: who waits for it asks.
set ::steps {
    loading   target loading   target target_before_section  pause
    following target following source source_before_cut      pause
    preparing target preparing target target_before_prepared pause
    prepared  target prepared  source source_before_commit   pause
    committed source committed source source_after_commit    fail
    taken     target done      target target_after_takeover  fail
    trimming  source trimming  source source_before_trim     pause
}

# Start a job and keep it at the step; its id.
proc hold_at {step {from 0} {to 2}} {
    foreach {name at state node point action} $::steps {if {$name eq $step} break}
    set ends [dict create source $from target $to]
    failpoint [dict get $ends $node] $point $action
    set id [migrate $from $to 3 10]
    wait_job_state [dict get $ends $at] $id $state
    return $id
}

proc go_on {step {from 0} {to 2}} {
    foreach {name at state node point action} $::steps {if {$name eq $step} break}
    failpoint [expr {$node eq "source" ? $from : $to}] $point off
}

# As wait_job_state, for one that may not have heard of it yet.
proc wait_replica_state {n id state} {
    wait_for_condition 1500 10 {![catch {job_field $n $id state} is] && $is eq $state} else {fail "job at replica $n: $is"}
}

proc fill {{n 0}} {
    fill_strings $n $::slots 2000 50
    foreach slot {3 10} {
        R $n hset [key_in $slot hash] f v g w
        R $n hpexpire [key_in $slot hash] 100000000 fields 1 f
        R $n set [key_in $slot ttl] x ex 100000
        R $n zadd [key_in $slot zset] 1 a 2 b
    }
    wait_shard_agrees 0 $::slots
}

# The keys of the slots that writers leave alone.
proc dump_of_others {n} {
    dict filter [slots_dump $n $::slots] script {key -} {expr {![string match *writer:* $key]}}
}

# Everything has come to rest: no job, one owner, whose replica has the same; nobody
# else has any of the keys. The shard that has them.
proc wait_rest {before} {
    for {set n 0} {$n < 6} {incr n} {
        wait_for_condition 2000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
    }
    wait_replicas_up
    wait_cluster_agrees
    set owner [slot_owner 0 3]
    foreach slot $::slots {assert_equal $owner [slot_owner 0 $slot] "owner of slot $slot"}
    assert_equal $owner [shard_master [expr {$owner % 3}]]
    assert_same_dump $before [dump_of_others $owner]
    foreach shard {0 2} {
        wait_shard_agrees $shard $::slots
        if {$shard == $owner % 3} continue
        foreach n [list $shard [shard_mate $shard]] {
            wait_for_condition 500 10 {[keys_in_slots $n $::slots] eq ""} else {fail "node $n has [llength [keys_in_slots $n $::slots]] keys"}
        }
    }
    for {set n 0} {$n < 6} {incr n} {
        assert_equal 0 [status [Rn $n] mem_cluster_slot_migration_shadow] "node $n"
        # No record of a hand-off is left either.
        assert_equal 0 [exec sh -c "grep -c slotmig-handoff [lindex [R $n config get dir] 1]/[lindex [R $n config get cluster-config-file] 1] || true"]
    }
    expr {$owner % 3}
}

# Restart the node that died and see it come back as a replica of its shard.
proc return_of {n} {
    start_node_again $n
    set_failover_timeouts 3000
    back_to_shard $n
    wait_for_condition 3000 10 {[status [Rn $n] role] eq "slave" && [status [Rn $n] master_link_status] eq "up"} else {
        fail "node $n does not come back as a replica"
    }
}

proc main_thread_us {n} {
    set sum 0
    foreach field {used_cpu_sys_main_thread used_cpu_user_main_thread} {
        set sum [expr {$sum+[getInfoProperty [R $n info cpu] $field]}]
    }
    expr {round($sum*1e6)}
}

# Run the body; writers that it started must not go on when it fails.
proc with_writers {body} {
    if {![catch {uplevel 1 $body} error options]} return
    upvar writers writers
    if {[info exists writers]} {foreach writer $writers {close [open [lindex $writer 1].stop w]}}
    for {set n 0} {$n < 6} {incr n} {catch {exec kill -CONT [node_pid $n]}}
    return -options $options $error
}

start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {

    test "PEERS 6: the source keeps its copy until the target's replica, which stands still, has taken over, too" {
        with_writers {
            fresh_shards $::slots
            fill
            set before [dump_of_others 0]
            set syncs [status [Rn 2] sync_full]
            R 0 config set cluster-slot-migration-write-pause-timeout 100000
            set writers [start_writers 1 $::slots]
            wait_writers_go_on $writers
            set id [hold_at prepared]
            wait_replica_state 5 $id prepared
            stop_node 5
            go_on prepared
            wait_job_state 2 $id taken
            wait_for_condition 1000 10 {[string match "*0 of 1 replicas have taken the slots over*" [job_field 2 $id reason]]} else {fail "[job 2 $id]"}
            # The writers have the target, and both of the source's shard still have what there was.
            wait_writers_go_on $writers 200
            assert_equal committed [job_field 0 $id state]
            foreach n {0 3} {foreach key [dict keys $before] {assert {$key in [R $n cluster getkeysinslot [R $n cluster keyslot $key] 10000]}}}
            continue_node 5
            wait_migrated 0 2 $id
            wait_writers_go_on $writers
            assert_equal {} [dict get [stop_writers $writers] errors]
            assert_equal 2 [wait_rest $before]
            assert_equal $syncs [status [Rn 2] sync_full]
            R 0 config set cluster-slot-migration-write-pause-timeout 10000
        }
    }

    foreach step {loading following preparing} {
        test "PEERS 26: the target's replica stands still from $step on: the job is not done and says why; when it is, the target may die" {
            with_writers {
                fresh_shards $::slots
                fill
                set before [dump_of_others 0]
                R 0 config set cluster-slot-migration-write-pause-timeout 300
                set writers [start_writers 1 $::slots]
                wait_writers_go_on $writers
                set id [hold_at $step]
                stop_node 5
                go_on $step
                wait_for_condition 1500 10 {[string match "*of 1 replicas have the *it needs *" [job_field 2 $id reason]]} else {fail "[job 2 $id]"}
                # Writers go on, at the latest between the attempts.
                wait_writers_go_on $writers 200
                assert_equal 0 [slot_owner 0 5]
                assert {![job_ended [job_field 0 $id state]]}
                continue_node 5
                R 0 config set cluster-slot-migration-write-pause-timeout 10000
                wait_migrated 0 2 $id
                wait_writers_go_on $writers
                assert_equal {} [dict get [stop_writers $writers] errors]
                wait_shard_in_step 2
                set all [slots_dump 2 $::slots]
                assert_same_dump $before [dump_of_others 2]
                set_failover_timeouts 1000
                kill_node 2
                wait_promoted 5
                wait_for_condition 1000 10 {![catch {R 5 append [key_in 5 probe] x}]} else {fail "node 5 does not serve"}
                R 5 del [key_in 5 probe]
                assert_same_dump $all [slots_dump 5 $::slots]
                return_of 2
                assert_equal 2 [wait_rest $before]
            }
        }
    }

    # Of the take-over the replica hears nothing, since the word is in its master's
    # memory behind megabytes of other writes, or too late to do it.
    foreach {what lost shard} {"has not heard" 1 2 "could not follow" 0 0} {
        test "PEERS 6, 26: the target dies when it has taken over, what its replica $what: no key is lost" {
            with_writers {
                fresh_shards $::slots
                fill
                set others [dump_of_others 0]
                set writers [start_writers 1 $::slots]
                set id [lindex [R 0 cluster migrate-slots slotsrange 3 10 node [node_id 2] HOLD] 0]
                wait_job_state 2 $id following
                wait_writers_go_on $writers 200
                assert_equal {} [dict get [stop_writers $writers] errors]
                set before [slots_dump 0 $::slots]
                R 0 config set cluster-slot-migration-write-pause-timeout 100000
                failpoint 0 source_before_commit pause
                R 0 cluster alter-slot-migration id $id release
                wait_replica_state 5 $id prepared
                if {!$lost} {failpoint 5 target_replica_takeover fail}
                stop_node 5
                if {$lost} {for {set i 0} {$i < 20} {incr i} {R 2 set [key_in 16000 big$i] [string repeat x 1000000]}}
                failpoint 0 source_before_commit off
                wait_job_state 2 $id taken
                assert_equal committed [job_field 0 $id state]
                kill_node 2
                resume_process [node_pid 5]
                set_failover_timeouts 1000
                wait_promoted 5
                wait_for_condition 2000 10 {[job_ended [job_field 0 $id state]]} else {fail "[job 0 $id]"}
                R 0 config set cluster-slot-migration-write-pause-timeout 10000
                return_of 2
                assert_equal $shard [wait_rest $others]
                assert_same_dump $before [slots_dump [slot_owner 0 3] $::slots]
            }
        }
    }

    test "PEERS 30: a target's promoted replica lets 400000 keys that stay the source's go without standing still" {
        fresh_shards $::slots
        set_failover_timeouts 60000
        # What it costs to delete as many in one go.
        R 1 debug populate 400000 [key_in 6000 orphan] 10
        set before [main_thread_us 1]
        R 1 multi
        R 1 flushall sync
        R 1 exec
        set in_one_go [expr {[main_thread_us 1]-$before}]
        foreach n {0 3} {foreach slot {3 7} {R $n debug populate 200000 [key_in $slot orphan] 10}}
        wait_for_cluster_state ok
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 3 10]
        wait_job_state 0 $id streaming
        wait_replica_state 5 $id following
        set_failover_timeouts 1000
        kill_node 2
        R 5 config resetstat
        set before [main_thread_us 5]
        wait_promoted 5
        # It goes on there, and is cancelled.
        wait_replica_state 5 $id following
        R 0 cluster cancel-slot-migrations id $id
        wait_replica_state 5 $id cancelled
        set took [expr {[main_thread_us 5]-$before}]
        if {$::verbose} {puts "$in_one_go us in one go; the promoted replica's main thread worked for $took us, its longest turn [CI 5 cluster_slot_migration_longest_turn_cpu_us] us"}
        assert_lessthan [CI 5 cluster_slot_migration_longest_turn_cpu_us] [expr {$in_one_go/4}]
        assert_lessthan $took $in_one_go
        foreach n {0 1} {assert {![regexp "[node_id 5]\[^\n\]*fail" [R $n cluster nodes]]}}
        wait_job_state 0 $id cancelled
        assert_equal 400000 [R 0 dbsize]
        assert_equal 0 [R 5 dbsize]
        return_of 2
        wait_shard_agrees 0 $::slots
    }

    # Whose replica is promoted, at which step, does the other one's stand still meanwhile.
    foreach {side step still} {
        source loading   0
        source following 0
        source preparing 0
        target preparing 0
        source prepared  0
        target prepared  0
        target committed 0
        target taken     0
        target trimming  0
        source prepared  1
        target prepared  1
        target committed 1
        target taken     1
    } {
        set with [expr {$still ? ", while the other side's replica stands still" : ""}]
        test "PEERS 31: CLUSTER FAILOVER of the $side while a job is $step$with: one shard has the slots, no write is lost" {
            with_writers {
                fresh_shards $::slots stay
                set from [shard_master 0]
                set to [shard_master 2]
                fill $from
                set before [dump_of_others $from]
                set writers [start_writers 1 $::slots]
                wait_writers_go_on $writers
                set id [hold_at $step $from $to]
                # Who has voted for one of this shard does not do so again for twice as long.
                set_failover_timeouts 1000
                if {$still} {pause_process [node_pid [shard_mate [expr {$side eq "source" ? $to : $from}]]]}
                set promoted [shard_mate [expr {$side eq "source" ? $from : $to}]]
                R $promoted cluster failover
                wait_promoted $promoted
                go_on $step $from $to
                if {$still} {resume_process [node_pid [shard_mate [expr {$side eq "source" ? $to : $from}]]]}
                wait_writers_go_on $writers
                set_failover_timeouts 3000
                for {set n 0} {$n < 6} {incr n} {
                    wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
                }
                wait_writers_go_on $writers
                stop_writers $writers
                set shard [wait_rest $before]
                # The job goes on with whoever was promoted.
                assert_equal 2 $shard "[lmap n {0 1 2 3 4 5} {R $n cluster slot-migrations}]"
                for {set n 0} {$n < 6} {incr n} {
                    foreach job [R $n cluster slot-migrations] {
                        if {[dict get $job id] ne $id} continue
                        assert {[job_ended [dict get $job state]]}
                        if {[dict get $job state] ne "done"} {assert_not_equal "" [dict get $job last-error]}
                    }
                }
                # The next one is as if nothing had been.
                set from [shard_master $shard]
                set to [shard_master [expr {2-$shard}]]
                set id [migrate $from $to 3 10]
                wait_migrated $from $to $id
                assert_equal [expr {2-$shard}] [wait_rest $before]
            }
        }
    }

    test "PEERS 31: the source's replica stands still: no write waits for it, and the hand-off says for whom it does" {
        with_writers {
            fresh_shards $::slots
            fill
            set before [dump_of_others 0]
            set writers [start_writers 1 $::slots]
            wait_writers_go_on $writers
            set id [hold_at following]
            stop_node 3
            go_on following
            wait_for_condition 1000 10 {[string match "*replica *[node_id 0]*" [job_field 0 $id reason]] || [string match "*replica * has not confirmed that a hand-off is near*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            wait_writers_go_on $writers 300
            assert_equal streaming [job_field 0 $id state]
            assert_equal 0 [job_field 0 $id attempt]
            continue_node 3
            wait_migrated 0 2 $id
            wait_writers_go_on $writers
            assert_equal {} [dict get [stop_writers $writers] errors]
            assert_equal 2 [wait_rest $before]
        }
    }

    foreach step {loading following preparing prepared} {
        test "PEERS 8, 24: a job cancelled while it is $step, with both replicas standing still, ends at once and leaves nothing there" {
            with_writers {
                fresh_shards $::slots
                fill
                set before [dump_of_others 0]
                set writers [start_writers 1 $::slots]
                wait_writers_go_on $writers
                set id [hold_at $step]
                stop_node 3
                pause_process [node_pid 5]
                assert_equal 1 [R 0 cluster cancel-slot-migrations id $id]
                foreach n {0 2} {wait_job_state $n $id cancelled}
                wait_writers_go_on $writers
                resume_process [node_pid 5]
                continue_node 3
                go_on $step
                wait_for_condition 1000 10 {[job_ended [job_field 5 $id state]]} else {fail "[job 5 $id]"}
                wait_writers_go_on $writers
                assert_equal {} [dict get [stop_writers $writers] errors]
                assert_equal 0 [wait_rest $before]
                move_slots 0 2 3 10
                assert_equal 2 [wait_rest $before]
            }
        }
    }

    test "PEERS 9, 16, 22: FLUSHALL at both ends and CLIENT PAUSE in mid-job: replicas end with what their masters have" {
        fresh_shards $::slots
        fill
        R 2 set [key_in 16000 own] x
        set id [hold_at following]
        R 2 flushall
        R 0 flushall
        fill_strings 0 $::slots 300
        set before [dump_of_others 0]
        # A replica that is paused takes no writes from its master either.
        foreach shard {0 2} {wait_shard_in_step $shard}
        foreach n {2 3 5} {R $n client pause 100000 write}
        go_on following
        wait_migrated 0 2 $id
        foreach n {2 3 5} {R $n client unpause}
        assert_equal 2 [wait_rest $before]
        assert_equal 300 [R 5 dbsize]
    }

    test "PEERS 26: a replica of the target that copies everything anew in the middle has what its master had, and follows" {
        fresh_shards $::slots
        fill
        set before [dump_of_others 0]
        set id [hold_at following]
        wait_replica_state 5 $id following
        # It loses its master's history with its memory.
        kill_node 5
        start_node_again 5
        wait_replicas_up
        go_on following
        wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]] && [job_ended [job_field 2 $id state]]} else {fail "no end: [job 0 $id] [job 2 $id]"}
        assert_equal {done done} [list [job_field 0 $id state] [job_field 2 $id state]]
        assert_equal 0 [job_field 2 $id interruptions]
        assert_equal done [job_field 5 $id state]
        assert_equal 2 [wait_rest $before]
    }

    test "PEERS 2: replicas that min-replicas-to-write misses at the target cost no key, at its replica neither" {
        fresh_shards $::slots
        fill
        R 2 config set min-replicas-to-write 3
        set id [hold_at following]
        for {set i 0} {$i < 100} {incr i} {R 0 set [key_in 6 late$i] x}
        set before [dump_of_others 0]
        go_on following
        wait_migrated 0 2 $id
        assert_error "NOREPLICAS*" {R 2 set [key_in 6 late] x}
        assert_equal 2 [wait_rest $before]
        R 2 config set min-replicas-to-write 0
    }

    test "PEERS 20: what expires, and what is evicted, in mid-job goes at the target's replica as well" {
        fresh_shards $::slots
        fill_strings 0 $::slots 400 2000
        for {set i 0} {$i < 200} {incr i} {R 0 set [key_in 7 gone$i] x px 300}
        set id [hold_at loading]
        go_on loading
        failpoint 0 source_before_cut pause
        wait_for_condition 1000 10 {[R 0 dbsize] == 400} else {fail "[R 0 dbsize] keys"}
        R 0 config set maxmemory-policy allkeys-random
        R 0 config set maxmemory [expr {[status [Rn 0] used_memory]-[status [Rn 0] mem_not_counted_for_evict]-200000}]
        R 0 set [key_in 9 new] x
        R 0 config set maxmemory 0
        R 0 config set maxmemory-policy noeviction
        assert_lessthan [R 0 dbsize] 400
        set before [dump_of_others 0]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal 2 [wait_rest $before]
    }

    test "PEERS 36: slot 0 and slot 16383 move between shards with replicas, and only they" {
        fresh_shards $::slots
        fill_strings 0 {0 1} 40
        fill_strings 2 {16382 16383} 40
        wait_migrated 0 2 [migrate 0 2 0 0]
        wait_migrated 2 0 [migrate 2 0 16383 16383]
        foreach {n count} {0 40 2 40} {
            assert_equal $count [R $n dbsize]
            wait_shard_agrees $n {0 1 16382 16383}
        }
        foreach {slot owner} {0 2 1 0 16382 2 16383 0} {
            for {set n 0} {$n < 6} {incr n} {assert_equal $owner [slot_owner $n $slot]}
        }
        wait_migrated 2 0 [migrate 2 0 0 0]
        wait_migrated 0 2 [migrate 0 2 16383 16383]
        foreach n {0 2} {wait_shard_agrees $n {0 1 16382 16383}}
    }
}
