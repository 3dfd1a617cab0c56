# The commands of Redis 8.4 and Valkey 9: forms, replies and error texts as their
# tools expect them.

source tests/support/slot_migration.tcl

set ::task_fields {id slots source dest operation state last_error retries create_time start_time end_time write_pause_ms}
set ::export_fields {
    name operation slot_ranges target_node source_node create_time last_update_time last_ack_time state message
    cow_size remaining_repl_size
}

# The maps of STATUS and of GETSLOTMIGRATIONS for a job of node n.
proc task {n id} {
    set tasks [R $n cluster migration status id $id]
    assert_equal 1 [llength $tasks]
    lindex $tasks 0
}

proc rival_export {n id} {
    foreach job [R $n cluster getslotmigrations] {
        if {[dict get $job name] eq $id} {return $job}
    }
    fail "node $n does not know $id"
}

proc newest {n} {
    dict get [lindex [R $n cluster slot-migrations] 0] id
}

# The whole error text.
proc assert_says {text n args} {
    assert_equal 1 [catch {R $n cluster {*}$args} error] "cluster $args"
    assert_equal "ERR $text" $error "cluster $args"
}

# The words of Redis and Valkey at the source, then at the target.
set ::words_of_phase {
    offered    connecting           connecting          -                 -
    waiting    wait-rdbchannel      waiting-to-snapshot connecting        waiting-for-ack
    snapshot   send-bulk-and-stream snapshotting        accumulate-buffer receiving-snapshot
    streaming  send-stream          replicating         wait-stream-eof   waiting-for-paused
    preparing  handoff              failover-paused     wait-stream-eof   waiting-for-paused
    prepared   handoff              failover-paused     wait-stream-eof   failover-requested
    committed  stream-eof           failover-granted    -                 -
    trimming   stream-eof           failover-granted    completed         success
}

start_cluster 3 0 {tags {external:skip cluster}} {
    set id0 [node_id 0]
    set id1 [node_id 1]
    set id2 [node_id 2]
    set nobody [string repeat 0 40]

    test "MIGRATION refuses what Redis refuses, in its words" {
        fresh
        foreach {text args} {
            "wrong number of arguments for 'cluster|migration' command" {}
            "wrong number of arguments for 'cluster|migration' command" {import}
            "wrong number of arguments for 'cluster|migration' command" {import 1}
            "wrong number of arguments for 'cluster|migration' command" {import 1 2 3}
            "wrong number of arguments for 'cluster|migration' command" {status}
            "wrong number of arguments for 'cluster|migration' command" {status id}
            "wrong number of arguments for 'cluster|migration' command" {status id 1 2}
            "wrong number of arguments for 'cluster|migration' command" {status all 1}
            "wrong number of arguments for 'cluster|migration' command" {cancel id}
            "wrong number of arguments for 'cluster|migration' command" {cancel all 1}
            "unknown argument"                                      {status any}
            "unknown argument"                                      {cancel any 1}
            "unknown argument"                                      {export 1 2}
            "Invalid or out of range slot"                          {import x 2}
            "Invalid or out of range slot"                          {import 1 x}
            "Invalid or out of range slot"                          {import 1 16384}
            "Invalid or out of range slot"                          {import -1 5}
            "start slot number 5 is greater than end slot number 1" {import 5 1}
            "Slot 3 specified multiple times"                       {import 1 5 3 6}
            "slots belong to different source nodes"                {import 1 2 6000 6001}
            "slots belong to different source nodes"                {import 1 2 12000 12001}
            "this node is already the owner of the slot range"      {import 12000 12001}
        } {
            assert_says $text 2 migration {*}$args
        }
        R 2 cluster setslot 6 importing $id0
        assert_says "all slot states must be STABLE to start a slot migration task." 2 migration import 5 7
        R 2 cluster setslot 6 stable
        assert_equal {0 0 0} [list [jobs_running 0] [jobs_running 1] [jobs_running 2]]
    }

    test "MIGRATION of an unassigned slot is refused in Redis' words" {
        fresh
        R 2 cluster delslots 16383
        assert_says "slot has no owner: 16383" 2 migration import 16383 16383
        R 2 cluster addslots 16383
        wait_cluster_agrees
    }

    test "MIGRATION IMPORT answers with one id; both nodes show the task as Redis does, and the job as we do" {
        fresh
        foreach slot {9 20 21} {fill_strings 0 $slot 50}
        set dump [slots_dump 0 {9 20 21}]
        failpoint 0 source_before_cut pause
        set id [R 2 cluster migration import 21 22 9 9 20 20]
        assert_equal 40 [string length $id]
        wait_job_state 0 $id streaming
        foreach {n operation state} {0 migrate send-stream 2 import wait-stream-eof} {
            set task [task $n $id]
            assert_equal $::task_fields [dict keys $task]
            foreach {field value} [list id $id slots "9-9 20-22" source $id0 dest $id2 operation $operation state $state \
                    last_error "" retries 0 end_time -1] {
                assert_equal $value [dict get $task $field] $field
            }
            assert_morethan [dict get $task create_time] 1600000000000
            assert_morethan_equal [dict get $task start_time] [dict get $task create_time]
            assert_equal $id [newest $n]
        }
        foreach slots {{22 23} {1 2 20 21}} range {22-23 20-21} {
            assert_says "overlapping import exists for slot range: $range" 2 migration import {*}$slots
        }
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_same_dump $dump [slots_dump 2 {9 20 21}]
        foreach n {0 2} {
            set task [task $n $id]
            assert_equal {completed {}} [list [dict get $task state] [dict get $task last_error]]
            assert_morethan_equal [dict get $task end_time] [dict get $task start_time]
            assert_equal $task [lindex [R $n cluster migration status all] 0]
        }
        assert_equal [expr {[job_field 0 $id write-pause-us]/1000}] [dict get [task 0 $id] write_pause_ms]
    }

    test "MIGRATION IMPORT from two sources at the same time" {
        fresh
        fill_strings 0 5 50
        fill_strings 1 6000 50
        set dump [dict merge [slots_dump 0 5] [slots_dump 1 6000]]
        foreach n {0 1} {failpoint $n source_before_cut pause}
        set a [R 2 cluster migration import 5 6]
        set b [R 2 cluster migration import 6000 6001]
        wait_job_state 0 $a streaming
        wait_job_state 1 $b streaming
        set tasks [R 2 cluster migration status all]
        assert_equal [list $b $a] [list [dict get [lindex $tasks 0] id] [dict get [lindex $tasks 1] id]]
        assert_equal [list $id1 $id0] [list [dict get [lindex $tasks 0] source] [dict get [lindex $tasks 1] source]]
        foreach n {0 1} {failpoint $n source_before_cut off}
        wait_migrated 0 2 $a
        wait_migrated 1 2 $b
        assert_same_dump $dump [slots_dump 2 {5 6000}]
    }

    test "MIGRATION CANCEL counts as Redis does, on either node, and ends the job on both" {
        fresh
        foreach args {{id x} {all}} {assert_equal 0 [R 0 cluster migration cancel {*}$args]}
        assert_equal 0 [R 0 cluster migration cancel id $nobody]
        failpoint 0 source_before_cut pause
        set a [R 2 cluster migration import 5 6]
        set b [R 1 cluster migration import 7 8]
        set c [R 2 cluster migration import 9 9]
        foreach id [list $a $b $c] {wait_job_state 0 $id streaming}
        assert_equal 1 [R 2 cluster migration cancel id $a]
        wait_job_state 0 $a cancelled
        assert_equal 0 [R 2 cluster migration cancel id $a]
        assert_equal 2 [R 0 cluster migration cancel all]
        foreach {n id} [list 1 $b 2 $c 2 $a] {
            wait_job_state $n $id cancelled
            foreach node [list 0 $n] {
                assert_equal canceled [dict get [task $node $id] state]
                assert_not_equal "" [dict get [task $node $id] last_error]
                assert_morethan [dict get [task $node $id] end_time] 0
            }
        }
    }

    test "MIGRATION STATUS of ids that are none is empty" {
        fresh
        foreach id [list x $nobody [string repeat 0 1000]] {assert_equal {} [R 0 cluster migration status id $id]}
    }

    test "MIGRATION IMPORT tells what the source refuses, and the target" {
        fresh
        R 0 cluster setslot 5 migrating $id1
        assert_error "*owner answers*slot 5 is in a CLUSTER SETSLOT state*" {R 2 cluster migration import 4 6}
        R 0 cluster setslot 5 stable
        failpoint 2 target_before_accept fail
        assert_error "*owner answers*$id2*refuses*target_before_accept*" {R 2 cluster migration import 4 6}
        foreach n {0 2} {assert_equal 0 [jobs_running $n]}
    }

    test "MIGRATESLOTS refuses what Valkey refuses, in its words" {
        fresh
        foreach {text args} {
            "wrong number of arguments for 'cluster|migrateslots' command" {}
            "wrong number of arguments for 'cluster|migrateslots' command" {slotsrange}
            "No end slot for final slot range"                  {slotsrange 1}
            "No end slot for final slot range"                  {slotsrange 1 2 node ID1 slotsrange 6}
            "No slot ranges specified"                          {slotsrange node ID1 node ID1}
            "No slot ranges specified"                          {slotsrange x 1 node ID1}
            "No slot ranges specified"                          {slotsrange 1 2 node ID1 slotsrange}
            "Invalid or out of range slot"                      {slotsrange 1 2 3 node ID1}
            "Invalid or out of range slot"                      {slotsrange 1 x node ID1}
            "Invalid or out of range slot"                      {slotsrange 1 16384 node ID1}
            "Invalid or out of range slot"                      {slotsrange -1 2 node ID1}
            "Start slot number 5 is greater than end slot number 1." {slotsrange 5 1 node ID1}
            "Slot range 3-4 overlaps with previous range 1-5."  {slotsrange 9 9 1 5 3 4 node ID1}
            "Slot range 0-7 overlaps with previous range 1-5."  {slotsrange 1 5 0 7 node ID1}
            "Slot ranges in migrations overlap"                 {slotsrange 1 5 node ID1 slotsrange 5 6 node ID2}
            "syntax error"                                      {slotsrange 1 2}
            "syntax error"                                      {slotsrange 1 2 node}
            "syntax error"                                      {nonsense 1 2 node ID1}
            "syntax error"                                      {slotsrange 1 2 to ID1}
            "syntax error"                                      {slotsrange 1 5 node ID1 extra}
            "syntax error"                                      {slotsrange 1 5 node ID1 node ID2}
            "Invalid node name: foo"                            {slotsrange 1 5 node foo}
            "Unknown node name: NOBODY"                         {slotsrange 1 5 node NOBODY}
            "Target node can not be this node."                 {slotsrange 1 5 node ID0}
            "Slots are not served by this node."                {slotsrange 6000 6001 node ID2}
            "Requested slots span multiple shards"              {slotsrange 1 2 6000 6001 node ID2}
        } {
            set names [list ID0 $id0 ID1 $id1 ID2 $id2 NOBODY $nobody]
            assert_says [string map $names $text] 0 migrateslots {*}[string map $names $args]
        }
        R 0 cluster setslot 5 migrating $id1
        assert_says "Slots are being manually migrated" 0 migrateslots slotsrange 4 6 node $id2
        R 0 cluster setslot 5 stable
        assert_says "wrong number of arguments for 'cluster|getslotmigrations' command" 0 getslotmigrations x
        assert_says "wrong number of arguments for 'cluster|cancelslotmigrations' command" 0 cancelslotmigrations all x
        assert_says "syntax error" 0 cancelslotmigrations x
        assert_equal 0 [jobs_running 0]
    }

    test "MIGRATESLOTS to two targets, with several blocks for one; GETSLOTMIGRATIONS shows them as Valkey does" {
        fresh
        foreach slot {15 20 30 40} {fill_strings 0 $slot 50}
        set dump1 [slots_dump 0 {15 20 40}]
        set dump2 [slots_dump 0 30]
        failpoint 0 source_before_cut pause
        assert_equal OK [R 0 cluster migrateslots slotsrange 20 25 15 15 node $id1 slotsrange 30 31 node $id2 slotsrange 40 40 node $id1]
        set ids {}
        foreach job [R 0 cluster slot-migrations] {
            if {![job_ended [dict get $job state]]} {dict set ids [dict get $job slots] [dict get $job id]}
        }
        assert_equal [list "15 20-25" 30-31 40] [lsort [dict keys $ids]]
        foreach {slots ranges target n} [list "15 20-25" "15-15 20-25" $id1 1 30-31 30-31 $id2 2 40 40-40 $id1 1] {
            set id [dict get $ids $slots]
            wait_job_state 0 $id streaming
            assert_equal {-1 -1} [list [job_field 0 $id timeout] [job_field 0 $id wait-replicas]] "as any other migration"
            foreach {node operation state} [list 0 EXPORT replicating $n IMPORT waiting-for-paused] {
                set job [rival_export $node $id]
                assert_equal [list {*}$::export_fields] [dict keys $job]
                foreach {field value} [list name $id operation $operation slot_ranges $ranges target_node $target \
                        source_node $id0 state $state message "" cow_size 0 remaining_repl_size 0] {
                    assert_equal $value [dict get $job $field] $field
                }
                # Seconds.
                set created [dict get $job create_time]
                assert_morethan $created 1600000000
                assert_lessthan $created 16000000000
                assert_morethan_equal [dict get $job last_update_time] $created
                assert_morethan_equal [dict get $job last_ack_time] $created
            }
        }
        assert_says "I am already migrating slot 25." 0 migrateslots slotsrange 25 26 node $id2
        failpoint 0 source_before_cut off
        dict for {slots id} $ids {wait_migrated 0 [expr {$slots eq "30-31" ? 2 : 1}] $id}
        assert_same_dump $dump1 [slots_dump 1 {15 20 40}]
        assert_same_dump $dump2 [slots_dump 2 30]
        foreach {n slots} {0 40 1 40 0 30-31 2 30-31} {
            assert_equal {success {}} [list [dict get [rival_export $n [dict get $ids $slots]] state] \
                [dict get [rival_export $n [dict get $ids $slots]] message]]
        }
    }

    test "MIGRATESLOTS starts nothing if one target refuses" {
        fresh
        failpoint 2 target_before_accept fail
        assert_error "*$id2*refuses*target_before_accept*" {R 0 cluster migrateslots slotsrange 5 5 node $id1 slotsrange 6 6 node $id2}
        foreach n {0 1 2} {wait_for_condition 500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}}
        failpoint 2 target_before_accept off
        assert_equal OK [R 0 cluster migrateslots slotsrange 5 5 node $id1]
        wait_migrated 0 1 [newest 0]
    }

    test "CANCELSLOTMIGRATIONS ends what leaves the node, not what comes to it" {
        fresh
        assert_says "No migrations ongoing" 0 cancelslotmigrations
        foreach n {0 1} {failpoint $n source_before_cut pause}
        foreach form {{} all} {
            R 0 cluster migrateslots slotsrange 5 6 node $id2
            set out [newest 0]
            R 1 cluster migrateslots slotsrange 6000 6001 node $id0
            set in [newest 1]
            wait_job_state 0 $out streaming
            wait_job_state 1 $in streaming
            assert_says "No migrations ongoing" 2 cancelslotmigrations
            assert_equal OK [R 0 cluster cancelslotmigrations {*}$form]
            assert_equal cancelled [dict get [rival_export 0 $out] state]
            wait_job_state 2 $out cancelled
            assert_equal cancelled [dict get [rival_export 2 $out] state]
            assert_equal {streaming following} [list [job_field 1 $in state] [job_field 0 $in state]]
            assert_says "No migrations ongoing" 0 cancelslotmigrations
            assert_equal OK [R 1 cluster cancelslotmigrations {*}$form]
            wait_job_state 0 $in cancelled
        }
    }

    test "A job that failed says so, and why, to both" {
        fresh
        fill_strings 0 {5 6} 100
        failpoint 0 source_damages_section fail
        set id [R 2 cluster migration import 5 6]
        foreach n {0 2} {
            assert_equal failed [wait_job_ended $n $id]
            foreach {state reason} [list [dict get [task $n $id] state] [dict get [task $n $id] last_error] \
                    [dict get [rival_export $n $id] state] [dict get [rival_export $n $id] message]] {
                assert_equal failed $state
                assert_match "*slot 5 arrived damaged: CRC*" $reason
            }
        }
    }

    foreach {phase redis valkey redis_target valkey_target} $::words_of_phase {
        test "A job that is $phase is $redis to Redis' tools, $valkey to Valkey's" {
            fresh
            fill_strings 0 {5 6} 10
            set id [hold_in_phase $phase 0 2 5 6]
            assert_equal [list $redis $valkey] [list [dict get [task 0 $id] state] [dict get [rival_export 0 $id] state]]
            if {$redis_target ne "-"} {
                assert_equal [list $redis_target $valkey_target] [list [dict get [task 2 $id] state] [dict get [rival_export 2 $id] state]]
            }
            if {$phase in {committed trimming}} {
                # It can only be completed.
                assert_equal {0 0} [list [R 0 cluster migration cancel id $id] [R 0 cluster migration cancel all]]
                assert_says "Slot migration $id is $phase: it can only be completed now" 0 cancelslotmigrations
            }
            let_go $phase 0 2
            wait_migrated 0 2 $id
        }
    }

    test "RESP3: maps with the same fields in the same order" {
        fresh
        set c [connect 0]
        $c hello 3
        move_slots 0 2 5 6
        # The client library shows a map as it shows an array, and null as an empty one: look at the bytes.
        $c deferred 1
        $c cluster migration status id $nobody
        $c flush
        assert_equal *0 [string trim [gets [$c channel]]]
        foreach {command fields} [list {cluster migration status all} $::task_fields {cluster getslotmigrations} $::export_fields] {
            $c {*}$command
            $c flush
            set fd [$c channel]
            set type [gets $fd]
            assert_match {\**} $type
            for {set left [string range $type 1 end]} {$left > 0} {incr left -1} {
                assert_equal %[llength $fields] [string trim [gets $fd]]
                foreach field $fields {
                    assert_equal \$[string length $field] [string trim [gets $fd]]
                    assert_equal $field [string trim [gets $fd]]
                    set type [string trim [gets $fd]]
                    if {$field in {retries create_time start_time end_time write_pause_ms last_update_time last_ack_time cow_size remaining_repl_size}} {
                        assert_match {:*} $type $field
                    } else {
                        assert_match {$*} $type $field
                        gets $fd
                    }
                }
            }
        }
        $c close
    }

    test "Transactions and scripts may look and cancel, not start" {
        fresh
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 6]
        R 2 multi
        R 2 cluster migration status id $id
        R 2 cluster migration import 7 8
        R 2 cluster migration cancel id $id
        catch {R 2 exec} replies
        assert_match "*waits for another node*transaction*" $replies
        wait_job_state 0 $id cancelled
        foreach command {{migration import 7 8} {migrateslots slotsrange 12000 12000 node ID0}} {
            set args [string map [list ID0 $id0] $command]
            assert_error "*waits for another node*script*" {R 2 eval {return redis.call('cluster',unpack(ARGV))} 0 {*}$args}
        }
        foreach n {0 2} {wait_for_condition 500 10 {[jobs_running $n] == 0} else {fail "node $n has jobs"}}
    }

    test "HELP, COMMAND and ACL know the rivals' commands, as they know their own" {
        set help [R 0 cluster help]
        foreach {name arity} {migration -4 migrateslots -4 getslotmigrations 2 cancelslotmigrations -2} {
            assert_match "*[string toupper $name]*" $help
            set info [lindex [R 0 command info cluster|$name] 0]
            assert_equal [list cluster|$name $arity] [lrange $info 0 1]
            assert_equal {admin no_async_loading stale} [lsort [lindex $info 2]]
            assert_equal {0 0 0} [lrange $info 3 5]
            assert_equal {@admin @dangerous @slow} [lsort [lindex $info 6]]
            assert_equal {} [lindex $info 8]
            assert_equal 2 [llength [R 0 command docs cluster|$name]]
        }
        R 0 acl setuser operator on nopass +cluster|getslotmigrations +cluster|migration
        set c [connect 0]
        $c auth operator any
        $c cluster getslotmigrations
        $c cluster migration status all
        assert_error "NOPERM*" {$c cluster cancelslotmigrations}
        assert_error "NOPERM*" {$c cluster migrateslots slotsrange 6 6 node $id2}
        $c close
        R 0 acl deluser operator
    }

    # The last one: it turns a node into a replica.
    test "A replica refuses in the words of both" {
        fresh
        move_slots 1 0 5462 10922
        wait_for_condition 500 10 {[string match "*slave*" [cluster_get_myself 1]] || [R 1 dbsize] == 0} else {fail "no"}
        if {[dict get [cluster_get_myself 1] slaveof] ne $id0} {R 1 cluster replicate $id0}
        wait_for_condition 1000 10 {[status [Rn 1] master_link_status] eq "up"} else {fail "no replica"}
        assert_says "slot migration not allowed on replica." 1 migration import 5 5
        assert_says "Slot migration can only be used on primary nodes." 1 migrateslots slotsrange 5 5 node $id2
        # It sees its master's import, which is not its to end.
        wait_for_condition 500 10 {[dict get [lindex [lsearch -all -inline [get_cluster_nodes 2] "*id $id1*"] 0] slaveof] eq $id0} else {fail "unseen"}
        failpoint 2 source_before_cut pause
        set id [R 0 cluster migration import 12000 12000]
        wait_for_condition 500 10 {[llength [R 1 cluster migration status id $id]] == 1} else {fail "the replica does not know the job"}
        wait_job_state 1 $id following
        assert_equal 0 [R 1 cluster migration cancel all]
        assert_equal 0 [R 1 cluster migration cancel id $id]
        assert_says "No migrations ongoing" 1 cancelslotmigrations
        assert_equal following [job_field 1 $id state]
        failpoint 2 source_before_cut off
        wait_migrated 2 0 $id
        wait_job_state 1 $id done
        assert_equal completed [dict get [task 1 $id] state]
    }
}
