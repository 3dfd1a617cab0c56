# RATE, HOLD and PAUSE: of MIGRATE-SLOTS and of a job that runs, at either node.

source tests/support/slot_migration.tcl

# 4 MB and a little in slots 5 to 7.
proc fill {} {
    fill_strings 0 {5 6 7} 4000 1000
}

proc alter {n id args} {
    assert_equal OK [R $n cluster alter-slot-migration id $id {*}$args]
}

# Both nodes show these fields.
proc wait_fields {id expected} {
    foreach n {0 2} {
        dict for {field value} $expected {
            wait_for_condition 500 10 {[job_field $n $id $field] eq $value} else {
                fail "$field is [job_field $n $id $field] at node $n, expected $value: [job $n $id]"
            }
        }
    }
}

proc wait_bytes {n id bytes} {
    wait_for_condition 1000 10 {[job_field $n $id bytes-done] >= $bytes} else {fail "no progress: [job $n $id]"}
}

# The snapshot's bytes by the time they took, as the target counts both.
proc loaded_rate {id} {
    set job [job 2 $id]
    expr {[dict get $job bytes-done]*1000/[dict get $job phase-ms loading]}
}

proc assert_rate {rate is} {
    assert_range $is [expr {$rate*9/10}] [expr {$rate*11/10}]
}

proc fails {id why} {
    foreach n {0 2} {
        wait_for_condition 1000 10 {[job_ended [job_field $n $id state]]} else {fail "no end: [job $n $id]"}
        assert_equal failed [job_field $n $id state]
        assert_match $why [job_field $n $id last-error]
    }
}

start_cluster 3 0 {tags {external:skip cluster}} {
    set id2 [node_id 2]

    foreach {n name} {0 source 2 target} {
        test "RATE of MIGRATE-SLOTS, sent to the $name, is kept within a tenth" {
            fresh
            fill
            set before [slots_dump 0 {5 6 7}]
            set id [lindex [R $n cluster migrate-slots slotsrange 5 7 node $id2 rate 2000000] 0]
            wait_fields $id {rate-limit 2000000 paused 0 held 0}
            wait_migrated 0 2 $id
            assert_rate 2000000 [loaded_rate $id]
            assert_same_dump $before [slots_dump 2 {5 6 7}]
        }

        test "RATE changed at the $name while the job runs holds from then on, and 0 lifts it" {
            fresh
            fill
            set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 rate 500000] 0]
            wait_bytes 2 $id 100000
            alter $n $id rate 1500000
            wait_fields $id {rate-limit 1500000}
            set bytes [job_field 2 $id bytes-done]
            set at [clock milliseconds]
            wait_bytes 2 $id 3000000
            set bytes [expr {[job_field 2 $id bytes-done]-$bytes}]
            assert_rate 1500000 [expr {$bytes*1000/([clock milliseconds]-$at)}]
            # What is left would take minutes so.
            alter $n $id rate 5000
            wait_fields $id {rate-limit 5000}
            alter $n $id rate 0
            wait_fields $id {rate-limit 0}
            wait_migrated 0 2 $id
            assert_equal 4000 [R 2 dbsize]
        }

        test "TIMEOUT given with the command, changed at the $name: both nodes wait for as long, and no longer" {
            fresh
            fill
            failpoint 0 source_before_cut pause
            set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 timeout 700000] 0]
            wait_fields $id {timeout 700000}
            wait_job_state 0 $id streaming
            failpoint 2 target_cuts_links fail
            wait_for_condition 1000 10 {[job_field 2 $id interruptions] == 1 && [job_field 0 $id state] eq "streaming"} else {fail "[job 0 $id]"}
            alter $n $id timeout 0
            wait_fields $id {timeout 0}
            failpoint 2 target_cuts_links fail
            foreach node {0 2} {
                assert_equal failed [wait_job_ended $node $id]
                assert_match "*link*lost*" [job_field $node $id last-error]
            }
            failpoint 0 source_before_cut off
            assert_error "*invalid TIMEOUT '-1'*" {R 0 cluster migrate-slots slotsrange 5 7 node $id2 timeout -1}
            assert_error "*invalid TIMEOUT ''*" {R 0 cluster migrate-slots slotsrange 5 7 node $id2 timeout}
            move_slots 0 2 5 7
        }

        test "PAUSE at the $name stops the bytes, RESUME lets them go on, and time-outs do not count meanwhile" {
            fresh
            fill
            foreach node {0 2} {R $node config set repl-timeout 1}
            set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 rate 2000000] 0]
            wait_bytes 2 $id 500000
            alter $n $id pause
            wait_fields $id {paused 1}
            # What was read already is counted still.
            after 200
            set bytes [job_field 2 $id bytes-done]
            assert_lessthan $bytes 3000000
            # Longer than any time-out; 3 MB would arrive in this time.
            after 1800
            assert_equal $bytes [job_field 2 $id bytes-done]
            assert_equal {snapshot loading} [list [job_field 0 $id state] [job_field 2 $id state]]
            R 0 set [key_in 5 meanwhile] x
            set before [slots_dump 0 {5 6 7}]
            alter $n $id resume
            wait_fields $id {paused 0}
            wait_migrated 0 2 $id
            assert_same_dump $before [slots_dump 2 {5 6 7}]
            foreach node {0 2} {R $node config set repl-timeout 60}
        }

        test "HOLD of MIGRATE-SLOTS copies and follows, and hands off when RELEASE comes at the $name" {
            fresh
            fill
            set id [lindex [R $n cluster migrate-slots slotsrange 5 7 node $id2 hold] 0]
            wait_fields $id {held 1 keys-done 4000}
            wait_job_state 0 $id streaming
            wait_for_condition 500 10 {[job_field 0 $id held-for] > 0} else {fail "[job 0 $id]"}
            assert_match "*held*RELEASE*" [job_field 0 $id reason]
            # Followed, and no hand-off: no fence was up, however small the lag.
            for {set i 0} {$i < 200} {incr i} {R 0 set [key_in 6 later$i] $i}
            wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "the target lags"}
            set before [slots_dump 0 {5 6 7}]
            foreach {field value} {state streaming attempt 0 write-pause-us 0} {assert_equal $value [job_field 0 $id $field] $field}
            assert_equal 0 [slot_owner 2 5]
            assert_equal 0 [R 2 dbsize]
            alter $n $id release
            wait_migrated 0 2 $id
            assert_equal {0 1} [list [job_field 0 $id held] [job_field 0 $id attempt]]
            assert_same_dump $before [slots_dump 2 {5 6 7}]
        }

        test "HOLD and RELEASE at the $name, of a job that runs" {
            fresh
            fill
            failpoint 2 target_before_section pause
            set id [migrate 0 2 5 7]
            wait_job_state 2 $id loading
            alter $n $id hold
            wait_fields $id {held 1}
            failpoint 2 target_before_section off
            wait_job_state 0 $id streaming
            wait_for_condition 500 10 {[string match "*held*RELEASE*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            # Paused as well: it takes both words.
            alter $n $id pause
            alter [expr {2-$n}] $id release
            wait_fields $id {held 0 paused 1}
            wait_for_condition 500 10 {[string match "*paused*RESUME*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            assert_equal {streaming 0} [list [job_field 0 $id state] [job_field 0 $id attempt]]
            alter $n $id resume
            wait_migrated 0 2 $id
            assert_equal 4000 [R 2 dbsize]
        }

        test "PAUSE at the $name before the snapshot: none is taken until RESUME" {
            fresh
            fill
            failpoint 0 source_before_fork pause
            set id [migrate 0 2 5 7]
            wait_for_condition 500 10 {[job_field 0 $id reason] eq "paused before the fork"} else {fail "[job 0 $id]"}
            wait_for_condition 500 10 {[job_field 2 $id reason] eq "waiting for the source's snapshot"} else {fail "[job 2 $id]"}
            alter $n $id pause
            wait_fields $id {paused 1}
            failpoint 0 source_before_fork off
            wait_for_condition 500 10 {[string match "*paused*RESUME*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            assert_equal waiting [job_field 0 $id state]
            assert_equal "" [node_children 0]
            alter $n $id resume rate 100000000 hold
            wait_fields $id {paused 0 held 1 rate-limit 100000000}
            alter $n $id release
            wait_migrated 0 2 $id
            assert_equal 4000 [R 2 dbsize]
        }
    }

    test "Both ends say that a snapshot on its way is paused, and what to do" {
        fresh
        fill
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 rate 200000] 0]
        wait_bytes 2 $id 10000
        alter 0 $id pause
        foreach n {0 2} {
            wait_for_condition 100 10 {[string match "*paused*RESUME*" [job_field $n $id reason]]} else {
                fail "reason at node $n: '[job_field $n $id reason]'"
            }
        }
        # Gone with the pause.
        alter 0 $id resume
        foreach n {0 2} {
            wait_for_condition 100 10 {![string match "*paused*" [job_field $n $id reason]]} else {fail "reason at node $n: '[job_field $n $id reason]'"}
        }
        alter 0 $id rate 0
        wait_migrated 0 2 $id
    }

    test "A job that is paused, held or slowed can be cancelled at once" {
        fresh
        fill
        foreach {options words} {{rate 10000} {} {} pause hold {} {rate 10000} {pause hold}} {
            foreach n {0 2} {
                set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 {*}$options] 0]
                if {$words ne ""} {catch {alter $n $id {*}$words}}
                R $n cluster cancel-slot-migrations id $id
                foreach node {0 2} {
                    wait_for_condition 500 10 {[jobs_running $node] == 0} else {fail "node $node goes on: [job $node $id]"}
                    wait_for_condition 500 10 {[node_children $node] eq ""} else {fail "node $node has a child"}
                }
                assert_equal 0 [R 2 dbsize]
            }
        }
        move_slots 0 2 5 7
        assert_equal 4000 [R 2 dbsize]
    }

    test "Writes in a pause are bounded: past cluster-slot-migration-buffer-limit the job fails and says so" {
        fresh
        fill
        R 0 config set cluster-slot-migration-buffer-limit 2mb
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 rate 200000] 0]
        wait_bytes 2 $id 10000
        alter 0 $id pause
        wait_fields $id {paused 1}
        for {set i 0} {$i < 15} {incr i} {R 0 set [key_in 5 big$i] [string repeat x 100000]}
        assert_equal snapshot [job_field 0 $id state]
        for {set i 0} {$i < 15} {incr i} {R 0 set [key_in 6 big$i] [string repeat x 100000]}
        fails $id "*paused for too long*cluster-slot-migration-buffer-limit*"
        R 0 config set cluster-slot-migration-buffer-limit 1gb
        move_slots 0 2 5 7
        assert_equal 4030 [R 2 dbsize]
    }

    test "ALTER-SLOT-MIGRATION and the options refuse what they do not understand, with the thing and the remedy, and change nothing" {
        fresh
        foreach {why args} {
            "*invalid RATE ''*bytes per second*"     {rate}
            "*invalid RATE '-1'*bytes per second*"   {rate -1}
            "*invalid RATE '1mb'*bytes per second*"  {rate 1mb}
            "*invalid RATE 'hold'*bytes per second*" {rate hold}
            "*syntax error at 'nonsense'*RATE*HOLD*" {nonsense}
            "*syntax error at 'nonsense'*RATE*HOLD*" {rate 5 hold nonsense}
        } {
            assert_error $why {R 0 cluster migrate-slots slotsrange 5 7 node $id2 {*}$args}
        }
        foreach word {pause release resume} {
            assert_error "*syntax error at '$word'*" {R 0 cluster migrate-slots slotsrange 5 7 node $id2 $word}
        }
        assert_equal 0 [jobs_running 0]
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 hold rate 123456] 0]
        wait_job_state 0 $id streaming
        wait_fields $id {held 1 rate-limit 123456}
        foreach n {0 2} {
            foreach {why args} {
                "*wrong number of arguments*"                    {}
                "*wrong number of arguments*"                    {id ID}
                "*syntax*"                                       {ID rate 5}
                "*Unknown slot migration 'x'*SLOT-MIGRATIONS*"   {id x rate 5}
                "*invalid RATE ''*bytes per second*"             {id ID pause rate}
                "*invalid RATE '-5'*bytes per second*"           {id ID release rate -5}
                "*invalid RATE '1e6'*bytes per second*"          {id ID rate 1e6}
                "*syntax error at 'halt'*RATE*HOLD*PAUSE*"       {id ID rate 5 release halt}
            } {
                assert_error $why {R $n cluster alter-slot-migration {*}[string map [list ID $id] $args]}
            }
            foreach {field value} {held 1 paused 0 rate-limit 123456} {assert_equal $value [job_field $n $id $field] $field}
        }
        alter 2 $id release
        wait_migrated 0 2 $id
        foreach n {0 2} {assert_error "*$id is done*nothing to alter*" {R $n cluster alter-slot-migration id $id rate 5}}
    }

    test "What is wanted of a job outlives a restart of both nodes" {
        fresh
        fill
        R 0 save
        set before [slots_dump 0 {5 6 7}]
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 hold waitreplicas 0 timeout 300000] 0]
        wait_job_state 0 $id streaming
        alter 2 $id rate 100000000
        wait_fields $id {rate-limit 100000000}
        wait_for_condition 500 10 {[string match "*slotmig-control $id:2,100000000,0,300000,0,1*" [read_file [lindex [R 0 config get dir] 1]/nodes.conf]]} else {
            fail "the record is not written"
        }
        foreach n {0 2} {kill_node $n}
        foreach n {0 2} {start_node_again $n}
        foreach n {0 2} {wait_for_condition 1000 10 {![catch {job $n $id}]} else {fail "node $n does not know the job"}}
        wait_fields $id {rate-limit 100000000 wait-replicas 0 timeout 300000 held 1}
        wait_job_state 0 $id streaming
        wait_for_condition 500 10 {[string match "*RELEASE*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
        alter 0 $id release
        wait_migrated 0 2 $id
        assert_same_dump $before [slots_dump 2 {5 6 7}]
        # The record of a later one without wishes has none.
        set id [move_slots 2 0 5 7]
        assert_equal 0 [string match *slotmig-control* [read_file [lindex [R 2 config get dir] 1]/nodes.conf]]
    }

    test "A version of what is wanted that has no next one is garbled in nodes.conf, and contradicts itself from the other node" {
        fresh
        fill
        R 0 save
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 hold] 0]
        wait_job_state 0 $id streaming
        alter 0 $id rate 100000000
        set conf [lindex [R 0 config get dir] 1]/nodes.conf
        set garbled "*what is wanted of a slot migration is not understood and left out*"
        wait_for_condition 500 10 {[string match "*slotmig-control $id:2,*" [read_file $conf]]} else {fail "the record is not written"}
        foreach n {0 2} {kill_node $n}
        set text [read_file $conf]
        # The last one is just below the limit.
        foreach {version good} {-1 0 -9223372036854775809 0 18446744073709551616 0 18446744073709551615 0 9223372036854775807 0 9223372036854775806 1} {
            write_file $conf [string map [list $id:2, $id:$version,] $text]
            set from [count_log_lines 0]
            start_node_again 0
            wait_for_condition 1000 10 {![catch {job 0 $id}]} else {fail "node 0 does not know the job"}
            assert_equal [expr {$good ? 100000000 : 0}] [job_field 0 $id rate-limit] $version
            assert_equal $good [job_field 0 $id held] $version
            if {$good} break
            verify_log_message 0 $garbled $from
            kill_node 0
        }
        start_node_again 2
        wait_for_condition 1000 10 {![catch {job 2 $id}]} else {fail "node 2 does not know the job"}
        wait_fields $id {rate-limit 100000000 held 1}
        wait_job_state 0 $id streaming
        alter 0 $id rate 5
        fails $id "*contradicts itself*"
        move_slots 0 2 5 7
        assert_equal 4000 [R 2 dbsize]
    }

    test "cluster-slot-migration-max-bandwidth is for all migrations of a target together, RATE may be lower" {
        fresh
        fill
        set before [slots_dump 0 {5 6 7}]
        R 2 config set cluster-slot-migration-max-bandwidth 2mb
        set id [migrate 0 2 5 7]
        wait_migrated 0 2 $id
        assert_equal 0 [job_field 0 $id rate-limit]
        assert_rate 2097152 [loaded_rate $id]
        assert_same_dump $before [slots_dump 2 {5 6 7}]
        move_slots 2 0 5 7
        # Each for itself would make it 6.
        set bytes 0
        set ms 0
        foreach id [R 0 cluster migrate-slots slotsrange 5 5 node $id2 slotsrange 6 6 node $id2 slotsrange 7 7 node $id2] {
            wait_migrated 0 2 $id
            incr bytes [job_field 2 $id bytes-done]
            set ms [expr {max($ms,[dict get [job_field 2 $id phase-ms] loading])}]
        }
        assert_lessthan [expr {$bytes*1000/$ms}] 3500000
        move_slots 2 0 5 7
        R 2 config set cluster-slot-migration-max-bandwidth 4mb
        set ids [R 0 cluster migrate-slots slotsrange 5 5 node $id2 slotsrange 6 6 node $id2 slotsrange 7 7 node $id2 rate 1000000]
        foreach id $ids {wait_migrated 0 2 $id}
        assert_rate 1000000 [loaded_rate [lindex $ids 0]]
        R 2 config set cluster-slot-migration-max-bandwidth 0
    }

    test "Each job has its own rate, and a held one keeps nobody from moving" {
        fresh
        fill
        fill_strings 0 {100 101} 500 1000
        set held [lindex [R 0 cluster migrate-slots slotsrange 100 100 node $id2 hold] 0]
        wait_job_state 0 $held streaming
        set ids [R 0 cluster migrate-slots slotsrange 5 7 node $id2 slotsrange 101 101 node [node_id 1] rate 4000000]
        assert_equal {4000000 4000000} [lmap id $ids {job_field 0 $id rate-limit}]
        alter 0 [lindex $ids 0] rate 0
        foreach id $ids to {2 1} {wait_migrated 0 $to $id}
        assert_equal {0 4000000} [lmap id $ids {job_field 0 $id rate-limit}]
        assert_equal {streaming 1} [list [job_field 0 $held state] [job_field 0 $held held]]
        alter 0 $held release
        wait_migrated 0 2 $held
        assert_equal {0 250 4250} [list [R 0 dbsize] [R 1 dbsize] [R 2 dbsize]]
    }

    test "HELP, COMMAND and ACL know of ALTER-SLOT-MIGRATION" {
        assert_match "*ALTER-SLOT-MIGRATION*" [R 0 cluster help]
        assert_equal cluster|alter-slot-migration [lindex [R 0 command info cluster|alter-slot-migration] 0 0]
        assert_not_equal -1 [lsearch [R 0 acl cat dangerous] cluster|alter-slot-migration]
        assert_error "*not allowed from script*" {R 0 eval {return redis.call('cluster','alter-slot-migration','id','x','pause')} 0}
    }

    test "What is told to the source reaches a target whose queues are full" {
        fresh
        foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 1mb}
        # One slot whose section takes long, and commands that wait for it.
        R 0 set [key_in 5 big] [string repeat x 5000000]
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node $id2 rate 1000] 0]
        wait_job_state 2 $id loading
        R 0 cluster alter-slot-migration id $id pause
        wait_fields $id {paused 1}
        fill_strings 0 5 3000 100
        assert_equal snapshot [job_field 0 $id state]
        R 0 cluster alter-slot-migration id $id resume rate 0
        wait_migrated 0 2 $id
        assert_equal 3001 [R 2 cluster countkeysinslot 5]
        foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 1gb}
    }
}
