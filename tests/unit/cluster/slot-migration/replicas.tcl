# Replicas on both sides: they have the slots' keys when the hand-off is done, and
# who is promoted in the middle of it knows what he must know. Masters are nodes 0
# to 2, the replica of node n is node n+3.

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

proc fill {} {
    foreach slot $::slots {fill_all_types 0 $slot}
    fill_strings 0 $::slots 1000
}

proc offsets_agree {n} {
    expr {[status [Rn $n] master_repl_offset] == [status [Rn [expr {$n+3}]] master_repl_offset]}
}

# The replica has what its master has, by content and by number.
proc assert_same_as_replica {n} {
    set replica [expr {$n+3}]
    wait_for_condition 1000 10 {
        [status [Rn $replica] master_link_status] eq "up" && [R $n debug digest] eq [R $replica debug digest] &&
        [R $n dbsize] == [R $replica dbsize]
    } else {
        fail "node $n has [R $n dbsize] keys, its replica [R $replica dbsize]: [R $n debug digest] [R $replica debug digest]"
    }
    foreach slot $::slots {
        assert_equal [R $n cluster countkeysinslot $slot] [R $replica cluster countkeysinslot $slot] "slot $slot at replica $replica"
    }
    assert_equal [keyspace_field $n expires] [keyspace_field $replica expires]
    wait_for_condition 1000 10 {[keyspace_field $n subexpiry] == [keyspace_field $replica subexpiry]} else {
        fail "node $n: [keyspace $n], its replica: [keyspace $replica]"
    }
}

proc migrate_with {from to args} {
    lindex [R $from cluster migrate-slots slotsrange 3 10 node [node_id $to] {*}$args] 0
}

# New keys in the slots: their owner's number, and the other one's.
proc fill_owner {} {
    foreach n {0 2} {R $n flushall}
    set owner [slot_owner 0 3]
    fill_strings $owner $::slots 1000
    list $owner [expr {2-$owner}]
}

proc memory_field {n field} {
    getInfoProperty [R $n info memory] $field
}

proc full_syncs {n} {
    status [Rn $n] sync_full
}

# The slots go to `other`, whose replica is not prepared: its stream waits there until the fail point is off.
proc take_over_before {replica owner other} {
    failpoint $replica target_replica_prepared pause
    set id [migrate_with $owner $other WAITREPLICAS 0]
    wait_migrated $owner $other $id
    wait_for_condition 1000 10 {[status [Rn $replica] blocked_clients] == 1} else {fail [R $replica info clients]}
    return $id
}

start_cluster 3 3 {tags {external:skip cluster}} {
    for {set n 3} {$n < 6} {incr n} {
        wait_for_condition 1000 20 {[status [Rn $n] master_link_status] eq "up"} else {fail "replica $n is not up"}
    }

    test "Slots move between shards with replicas: these have the same, and nobody copies anew" {
        fill
        set before [slots_dump 0 $::slots]
        foreach n {0 2} {set syncs($n) [full_syncs $n]}
        set id [migrate 0 2 3 10]
        wait_migrated 0 2 $id
        assert_same_dump $before [slots_dump 2 $::slots]
        assert_same_as_replica 0
        assert_same_as_replica 2
        assert_equal 0 [R 3 dbsize]
        foreach n {0 2} {assert_equal $syncs($n) [full_syncs $n]}
        assert_equal done [job_field 5 $id state]
    }

    test "Writes go on meanwhile, there and back: none is lost, at the replicas neither" {
        foreach {from to} {2 0 0 2} {
            foreach n {0 2} {R $n flushall}
            fill_strings $from $::slots 1000
            set writers [start_writers 3 $::slots]
            wait_writers_go_on $writers
            set id [migrate $from $to 3 10]
            wait_migrated $from $to $id
            wait_writers_go_on $writers
            stop_writers $writers
            assert_same_as_replica $from
            assert_same_as_replica $to
        }
    }

    test "Only replicas that have the slots count: one that stands still keeps the hand-off from being done" {
        lassign [fill_owner] owner other
        failpoint [expr {$other+3}] target_replica_prepared pause
        R $owner config set cluster-slot-migration-write-pause-timeout 300
        set id [migrate $owner $other 3 10]
        wait_for_condition 1000 10 {[job_field $owner $id attempt] >= 2} else {fail "[job $owner $id]"}
        wait_for_condition 1000 10 {[string match "*0 of 1 replicas have the slots*" [job_field $other $id reason]]} else {fail "[job $other $id]"}
        # The writers go on between the attempts.
        R $owner set [key_in 5 meanwhile] yes
        failpoint [expr {$other+3}] target_replica_prepared off
        R $owner config set cluster-slot-migration-write-pause-timeout 10000
        wait_migrated $owner $other $id
        assert_same_as_replica $owner
        assert_same_as_replica $other
        assert_equal yes [R $other get [key_in 5 meanwhile]]
    }

    test "WAITREPLICAS 0 does not wait for it; its own stream waits until it is prepared, and nothing is copied anew" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set synced [full_syncs $other]
        set id [take_over_before $replica $owner $other]
        R $other set [key_in 5 after] yes
        wait_job_state $replica $id preparing
        failpoint $replica target_replica_prepared off
        wait_job_state $replica $id done
        assert_same_as_replica $owner
        assert_same_as_replica $other
        assert_equal [list $synced 0] [list [full_syncs $other] [status [Rn $replica] blocked_clients]]
    }

    test "A replica whose stream waits at a take-over does not count for another job: no writer is fenced in vain" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        failpoint $replica target_replica_prepared pause
        set waits [lindex [R $owner cluster migrate-slots slotsrange 7 10 node [node_id $other] hold waitreplicas 1] 0]
        foreach n [list $other $replica] {wait_job_state $n $waits following}
        set id [lindex [R $owner cluster migrate-slots slotsrange 3 6 node [node_id $other] waitreplicas 0] 0]
        foreach n [list $owner $other] {wait_job_state $n $id done}
        wait_for_condition 1000 10 {[status [Rn $replica] blocked_clients] == 1} else {fail [R $replica info clients]}
        R $owner cluster alter-slot-migration id $waits release
        wait_for_condition 1000 10 {[string match "*fewer than 1 of 1 replicas have the snapshot and follow*" [job_field $other $waits reason]]} else {
            fail "[job $owner $waits] [job $other $waits]"
        }
        assert_equal 0 [job_field $owner $waits attempt]
        failpoint $replica target_replica_prepared off
        foreach n [list $owner $other $replica] {wait_job_state $n $waits done}
        assert_equal 1 [job_field $owner $waits attempt]
        assert_same_as_replica $owner
        assert_same_as_replica $other
    }

    test "A replica that reads all of a migration at once takes over like the others" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set synced [full_syncs $other]
        stop_node $replica
        set id [migrate_with $owner $other WAITREPLICAS 0]
        foreach n [list $owner $other] {wait_job_state $n $id done}
        continue_node $replica
        wait_job_state $replica $id done
        assert_same_as_replica $other
        assert_equal $synced [full_syncs $other]
    }

    test "Its link breaks while its stream waits: it copies everything anew" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set synced [full_syncs $other]
        set id [take_over_before $replica $owner $other]
        R $other client kill type replica
        wait_for_condition 1000 10 {[full_syncs $other] == $synced+1} else {fail "no full synchronization"}
        failpoint $replica target_replica_prepared off
        R $other set [key_in 5 after] yes
        assert_same_as_replica $owner
        assert_same_as_replica $other
    }

    test "More than four buffer limits of its stream wait: it copies everything anew" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set synced [full_syncs $other]
        set limit [lindex [R $replica config get cluster-slot-migration-buffer-limit] 1]
        R $replica config set cluster-slot-migration-buffer-limit 1mb
        set id [take_over_before $replica $owner $other]
        R $other set [key_in 5 large] [string repeat x [expr {5*1024*1024}]]
        wait_for_condition 1000 10 {[full_syncs $other] == $synced+1} else {fail "no full synchronization"}
        assert_match "*too much of its stream waits*" [job_field $replica $id last-error]
        R $replica config set cluster-slot-migration-buffer-limit $limit
        failpoint $replica target_replica_prepared off
        assert_same_as_replica $owner
        assert_same_as_replica $other
    }

    test "A replica that is not prepared within repl-timeout copies everything anew" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set synced [full_syncs $other]
        failpoint $replica target_replica_prepared pause
        R $replica config set repl-timeout 1
        set id [migrate_with $owner $other WAITREPLICAS 0]
        wait_migrated $owner $other $id
        wait_for_condition 1000 10 {[full_syncs $other] == $synced+1} else {fail "no full synchronization"}
        assert_match "*not prepared within repl-timeout*" [job_field $replica $id last-error]
        R $replica config set repl-timeout 60
        failpoint $replica target_replica_prepared off
        assert_same_as_replica $owner
        assert_same_as_replica $other
    }

    test "A replica that asked for a copy of everything before the take-over, and got it after, has the slots" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        R $other config set repl-diskless-sync-delay 3
        R $other debug change-repl-id
        R $other client kill type replica
        wait_for_condition 1000 10 {[string match "*state=wait_bgsave*" [R $other info replication]]} else {fail [R $other info replication]}
        failpoint $other target_after_takeover pause
        R $other config set cluster-slot-migration-wait-replicas 0
        set id [migrate $owner $other 3 10]
        wait_job_state $other $id taken
        R $other config set cluster-slot-migration-wait-replicas 1
        failpoint $other target_after_takeover off
        wait_job_state $other $id done
        wait_job_state $owner $id done
        R $other config set repl-diskless-sync-delay 0
        # It counts for the next job, too: it was not told of the take-over and has nothing to answer.
        foreach {from to} [list $other $owner $owner $other] {wait_migrated $from $to [migrate $from $to 3 10]}
        assert_same_as_replica $owner
        assert_same_as_replica $other
    }

    test "Clients that cache keys from the source's replica are told to forget them" {
        lassign [fill_owner] owner other
        set replica [expr {$owner+3}]
        set key [key_in 5 k2]
        wait_for_condition 500 10 {[offsets_agree $owner]} else {fail "the replica is behind"}
        lassign [invalidations_of $replica] told id
        set reader [redis_deferring_client -$replica]
        foreach command [list readonly [list client tracking on redirect $id]] {
            $reader {*}$command
            assert_equal OK [$reader read]
        }
        $reader get $key
        assert_match *:2 [$reader read]
        wait_migrated $owner $other [migrate_with $owner $other]
        assert_invalidated $told $key
        $reader close
        $told close
    }

    test "What the operator wants of a job is known to the source's replica, and holds when that is promoted" {
        lassign [fill_owner] owner other
        set replica [expr {$owner+3}]
        set id [migrate_with $owner $other HOLD WAITREPLICAS 0]
        wait_job_state $owner $id streaming
        assert_equal OK [R $owner cluster alter-slot-migration id $id rate 1234567]
        set before [slots_dump $owner $::slots]
        wait_for_condition 500 10 {[string match "*slotmig-control $id:2,1234567,0,-1,0,1*" [read_file [lindex [R $replica config get dir] 1]/nodes.conf]]} else {
            fail "the record is [read_file [lindex [R $replica config get dir] 1]/nodes.conf]"
        }
        # Not from the target: it stands still.
        for {set n 0} {$n < 6} {incr n} {R $n config set cluster-node-timeout 600000}
        pause_process [node_pid $other]
        assert_equal OK [R $replica cluster failover takeover]
        wait_for_condition 1000 10 {![catch {job $replica $id} job]} else {fail "node $replica has no job"}
        foreach {field value} {held 1 rate-limit 1234567 wait-replicas 0} {assert_equal $value [dict get $job $field]}
        resume_process [node_pid $other]
        for {set n 0} {$n < 6} {incr n} {R $n config set cluster-node-timeout 3000}
        wait_job_state $replica $id streaming
        assert_equal OK [R $replica cluster alter-slot-migration id $id release rate 0]
        wait_migrated $replica $other $id
        assert_same_dump $before [slots_dump $other $::slots]
        # The shard's first node is its master again.
        wait_for_condition 1000 10 {[status [Rn $owner] role] eq "slave" && [status [Rn $owner] master_link_status] eq "up"} else {fail "no replica"}
        assert_equal OK [R $owner cluster failover]
        wait_for_condition 1000 10 {[status [Rn $owner] role] eq "master" && [status [Rn $replica] role] eq "slave" &&
            [status [Rn $replica] master_link_status] eq "up"} else {fail "no way back"}
        wait_cluster_agrees
    }

    test "A replica that was cut off when the hand-off began, and takes its master's place, serves none of the slots before the target has answered" {
        lassign [fill_owner] owner other
        set replica [expr {$owner+3}]
        set before [slots_dump $owner $::slots]
        set id [migrate_with $owner $other HOLD WAITREPLICAS 0]
        wait_job_state $owner $id streaming
        set conf [lindex [R $replica config get dir] 1]/nodes.conf
        set name [node_id $replica]
        wait_for_condition 500 10 {[string match "*slotmig-job $id*" [read_file $conf]]} else {fail "the replica has no record: [read_file $conf]"}
        R $replica config set masterauth wrong
        R $owner client kill type replica
        wait_for_condition 500 10 {[status [Rn $owner] connected_slaves] == 0} else {fail "the replica keeps its link"}
        pause_process [node_pid $replica]
        wait_for_condition 3000 10 {[regexp "$name \[^\n\]* slave,fail " [R $owner cluster nodes]]} else {fail "not failing: [R $owner cluster nodes]"}
        foreach n [list 1 $owner $other 4 [expr {$other+3}]] {R $n config set cluster-node-timeout 600000}
        failpoint $other target_before_takeover pause
        assert_equal OK [R $owner cluster alter-slot-migration id $id release]
        wait_job_state $owner $id committed
        pause_process [node_pid $other]
        kill_node $owner
        resume_process [node_pid $replica]
        R $replica config set cluster-node-timeout 600000
        assert_no_match "*slotmig-handoff*" [read_file $conf]
        assert_equal OK [R $replica cluster failover takeover]
        wait_for_condition 1000 10 {![catch {job $replica $id}]} else {fail "node $replica has no job"}
        assert_equal inherited [job_field $replica $id state]
        assert_match "*slotmig-handoff $id*" [read_file $conf]
        assert {[catch {R $replica set [key_in 5 k1] x}]}
        # The target is asked, and answers what then is so.
        resume_process [node_pid $other]
        failpoint $other target_before_takeover off
        foreach n [list 1 $other 4 [expr {$other+3}] $replica] {R $n config set cluster-node-timeout 3000}
        wait_for_condition 3000 10 {[jobs_running $replica] == 0 && [jobs_running $other] == 0} else {
            fail "no end: [R $replica cluster slot-migrations], [R $other cluster slot-migrations]"
        }
        start_node_again $owner
        wait_cluster_agrees
        assert_same_dump $before [slots_dump [slot_owner 1 3] $::slots]
        R $replica config set masterauth ""
        wait_for_condition 2000 10 {[status [Rn $owner] role] eq "slave" && [status [Rn $owner] master_link_status] eq "up"} else {fail "no replica"}
        assert_equal OK [R $owner cluster failover]
        wait_for_condition 2000 10 {[status [Rn $owner] role] eq "master"} else {fail "no way back"}
        wait_for_condition 2000 10 {[status [Rn $replica] role] eq "slave" && [status [Rn $replica] master_link_status] eq "up"} else {fail "no replica"}
        wait_cluster_agrees
    }

    test "A replica that stood still, and was told since that there is only a job, goes on with it without asking the target" {
        lassign [fill_owner] owner other
        set replica [expr {$owner+3}]
        set before [slots_dump $owner $::slots]
        set id [migrate_with $owner $other HOLD]
        wait_job_state $owner $id streaming
        wait_for_condition 500 10 {[string match "*slotmig-job $id*" [read_file [lindex [R $replica config get dir] 1]/nodes.conf]]} else {fail "no record"}
        pause_process [node_pid $replica]
        wait_for_condition 3000 10 {[regexp {lag=(\d+)} [R $owner info replication] -> lag] && $lag >= 3} else {fail [R $owner info replication]}
        resume_process [node_pid $replica]
        # Of two answers one is to a question that came since.
        proc words {n} {getInfoProperty [R $n info commandstats] {cmdstat_cluster\|slotmig}}
        set calls 0
        regexp {calls=(\d+)} [words $replica] -> calls
        wait_for_condition 3000 10 {[regexp {calls=(\d+)} [words $replica] -> now] && $now >= $calls+2} else {fail "no answers: [words $replica]"}
        for {set n 0} {$n < 6} {incr n} {R $n config set cluster-node-timeout 600000}
        pause_process [node_pid $other]
        kill_node $owner
        assert_equal OK [R $replica cluster failover takeover]
        wait_for_condition 1000 10 {![catch {job $replica $id} job]} else {fail "node $replica has no job"}
        assert_equal {waiting 1} [list [dict get $job state] [dict get $job held]]
        wait_for_condition 1000 10 {![catch {R $replica set [key_in 5 k1] x} error]} else {fail $error}
        R $replica del [key_in 5 k1]
        resume_process [node_pid $other]
        start_node_again $owner
        for {set n 0} {$n < 6} {incr n} {R $n config set cluster-node-timeout 3000}
        wait_job_state $replica $id streaming
        assert_equal 1 [R $replica cluster cancel-slot-migrations id $id]
        wait_for_condition 1000 10 {[status [Rn $owner] role] eq "slave" && [status [Rn $owner] master_link_status] eq "up"} else {fail "no replica"}
        assert_equal OK [R $owner cluster failover]
        wait_for_condition 1000 10 {[status [Rn $owner] role] eq "master" && [status [Rn $replica] role] eq "slave" &&
            [status [Rn $replica] master_link_status] eq "up"} else {fail "no way back"}
        wait_cluster_agrees
        assert_same_dump $before [slots_dump $owner $::slots]
    }

    test "A job is not cancelled at a replica of its target: it is its master's" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set copies [full_syncs $other]
        set id [migrate_with $owner $other HOLD]
        wait_job_state $other $id following
        wait_for_condition 1000 10 {![catch {job $replica $id}]} else {fail "node $replica has no job"}
        wait_job_state $replica $id following
        assert_error "*is this node's master's: cancel it there*" {R $replica cluster cancel-slot-migrations id $id}
        assert_error "*is this node's master's: cancel it there*" {R $replica cluster cancel-slot-migrations id $id force}
        assert_equal 0 [R $replica cluster cancel-slot-migrations all]
        R $owner cluster alter-slot-migration id $id release
        wait_migrated $owner $other $id
        wait_job_state $replica $id done
        assert_equal $copies [full_syncs $other]
    }

    test "WAITREPLICAS is lowered when the slots are taken over and the replica that is to have them is gone" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        failpoint $other target_before_takeover pause
        set id [migrate_with $owner $other WAITREPLICAS 1]
        wait_job_state $owner $id committed
        pause_process [node_pid $replica]
        failpoint $other target_before_takeover off
        wait_job_state $other $id taken
        assert_error "*nothing to alter*" {R $other cluster alter-slot-migration id $id hold}
        assert_error "*nothing to alter*" {R $other cluster alter-slot-migration id $id waitreplicas 0 hold}
        assert_equal taken [job_field $other $id state]
        assert_equal OK [R $other cluster alter-slot-migration id $id waitreplicas 0]
        wait_for_condition 1000 10 {[job_field $other $id state] eq "done"} else {fail "[job $other $id]"}
        resume_process [node_pid $replica]
        wait_migrated $owner $other $id
        wait_for_condition 1000 10 {[status [Rn $replica] master_link_status] eq "up"} else {fail "no replica"}
        assert_same_as_replica $other
    }

    test "A job that is cancelled leaves nothing at the replicas" {
        lassign [fill_owner] owner other
        set replica [expr {$other+3}]
        set id [migrate_with $owner $other HOLD]
        wait_job_state $other $id following
        wait_job_state $replica $id following
        assert_morethan [memory_field $replica mem_cluster_slot_migration_shadow] 0
        R $owner cluster cancel-slot-migrations id $id
        wait_job_state $owner $id cancelled
        wait_job_state $other $id cancelled
        wait_job_state $replica $id failed
        assert_match "*cancelled by command*" [job_field $replica $id last-error]
        assert_equal 0 [memory_field $replica mem_cluster_slot_migration_shadow]
        assert_equal 0 [R $replica dbsize]
        assert_same_as_replica $owner
        assert_same_as_replica $other
    }
}
