# The append-only file on both sides: after each way to move slots, what a node that died
# loads is what it had.

source tests/support/slot_migration.tcl

set ::slots {5 6 7 8}

# Files of migrations in node n's directory; those that its manifest names.
proc migration_files {n} {
    lmap f [glob -nocomplain -directory $::aof_dir($n) *.slotmig-*] {file tail $f}
}

proc named_files {n} {
    set fd [open [lindex [glob -directory $::aof_dir($n) *.manifest] 0]]
    set text [read $fd]
    close $fd
    lmap {- f} [regexp -all -inline -line {^file (\S+\.slotmig-\S+)} $text] {set f}
}

# Files that are there and that no manifest names.
proc loose_files {n} {
    set named [named_files $n]
    lmap f [migration_files $n] {if {$f in $named} continue; set f}
}

# Node n dies and comes back with the keys it had; the files are in order. An unpatched server
# loads the same.
proc assert_survives {n} {
    wait_rewritten $n
    set digest [R $n debug digest]
    set size [R $n dbsize]
    kill_node $n
    set out [exec src/redis-check-aof [lindex [glob -directory $::aof_dir($n) *.manifest] 0] 2>@1]
    assert_match "*All AOF files and manifest are valid*" $out
    assert_equal [list $digest $size] [loaded_by_vanilla $::aof_dir($n)]
    start_node_again $n
    assert_equal $size [R $n dbsize]
    assert_equal $digest [R $n debug digest]
    assert_equal {} [loose_files $n]
    wait_cluster_agrees
}

proc fill {n} {
    foreach slot $::slots {fill_all_types $n $slot}
    fill_strings $n $::slots 2000 100
}

# How the file that node n appends to is open.
proc append_flags {n} {
    set pid [node_pid $n]
    foreach fd [glob -nocomplain /proc/$pid/fd/*] {
        if {[catch {file readlink $fd} to] || ![string match *.incr.aof $to]} continue
        set info [open /proc/$pid/fdinfo/[file tail $fd]]
        regexp {flags:\s+(\d+)} [read $info] -> flags
        close $info
        return $flags
    }
    fail "node $n has no append-only file open"
}

proc remember_dirs {} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {set ::aof_dir($n) [aof_dir $n]}
}

start_cluster 3 0 {tags {external:skip cluster} overrides {appendonly yes cluster-allow-replica-migration no}} {
    remember_dirs
    foreach fsync {everysec always} {
        test "Slots move under load with appendfsync $fsync, and are at the new owner alone when both have died" {
            fresh
            foreach n {0 2} {R $n config set appendfsync $fsync}
            fill 0
            R 2 set [key_in 16000 own] x
            set writers [start_writers 2 $::slots]
            wait_writers_go_on $writers
            set id [migrate 0 2 5 8]
            wait_migrated 0 2 $id
            wait_writers_go_on $writers
            assert_equal {} [dict get [stop_writers $writers] errors]
            assert_equal 0 [R 0 dbsize]
            # After a short write the next one must not leave a hole: O_APPEND.
            foreach n {0 2} {assert_equal 02000 [format %#05o [expr {"0o[append_flags $n]" & 0o2000}]]}
            foreach n {0 2} {assert_survives $n}
            assert_equal 0 [R 0 dbsize]
        }
    }

    test "The same slots move there and back, again and again, with restarts in between and without" {
        fresh
        foreach n {0 2} {R $n config set appendfsync everysec}
        fill 0
        set before [slots_dump 0 $::slots]
        foreach restart {0 1 0 1} {
            move_slots 0 2 5 8
            R 2 set [key_in 6 there] x
            if {$restart} {foreach n {0 2} {assert_survives $n}}
            move_slots 2 0 5 8
            R 0 del [key_in 6 there]
            if {$restart} {foreach n {2 0} {assert_survives $n}}
        }
        assert_same_dump $before [slots_dump 0 $::slots]
        foreach n {0 2} {assert_survives $n}
        assert_same_dump $before [slots_dump 0 $::slots]
    }

    foreach {what moves} {"" 0 ", of which one moved on," 1} {
        test "A target that took slots over, died and loaded them$what says so: the source lets its copy go" {
            fresh
            fill 0
            set before [slots_dump 0 $::slots]
            failpoint 2 target_after_takeover crash
            set id [migrate 0 2 5 8]
            wait_job_state 0 $id committed
            exec kill -STOP [node_pid 0]
            wait_node_dead 2
            start_node_again 2
            if {$moves} {
                foreach n {1 2} {R $n config set cluster-require-full-coverage no}
                wait_for_condition 1000 10 {[CI 2 cluster_state] eq "ok"} else {fail "[R 2 cluster info]"}
                wait_job_state 1 [migrate 2 1 5 5] done
                foreach n {1 2} {R $n config set cluster-require-full-coverage yes}
            }
            exec kill -CONT [node_pid 0]
            wait_job_state 0 $id done
            if {$moves} {move_slots 1 2 5 5}
            wait_cluster_agrees
            assert_equal 0 [R 0 dbsize]
            assert_same_dump $before [slots_dump 2 $::slots]
        }
    }

    test "A rewrite afterwards takes the files in" {
        fresh
        fill 0
        move_slots 0 2 5 8
        assert_not_equal {} [migration_files 2]
        R 2 bgrewriteaof
        wait_rewritten 2
        wait_for_condition 500 10 {[migration_files 2] eq ""} else {fail "[migration_files 2] stay"}
        assert_equal {} [named_files 2]
        assert_survives 2
    }

    test "A rewrite that runs delays the hand-off, with the reason" {
        fresh
        fill 0
        R 2 set [key_in 16000 own] x
        R 2 config set rdb-key-save-delay 100000000
        R 2 bgrewriteaof
        set id [migrate 0 2 5 8]
        wait_for_condition 1000 10 {[string match "*append-only file is being rewritten*" [job_field 2 $id reason]]} else {fail "[job 2 $id]"}
        assert_equal streaming [job_field 0 $id state]
        R 2 config set rdb-key-save-delay 0
        exec kill -9 [node_children 2]
        wait_migrated 0 2 $id
        assert_survives 2
    }

    test "A rewrite of the source's that began before the slots left ends behind it" {
        fresh
        fill 0
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 8]
        wait_job_state 0 $id streaming
        R 0 config set rdb-key-save-delay 2000
        R 0 bgrewriteaof
        wait_for_condition 500 10 {[status [Rn 0] aof_rewrite_in_progress] == 1} else {fail "no rewrite begins"}
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal 1 [status [Rn 0] aof_rewrite_in_progress]
        R 0 config set rdb-key-save-delay 0
        wait_rewritten 0
        assert_equal 0 [R 0 dbsize]
        foreach n {0 2} {assert_survives $n}
    }

    test "Links that break in the middle, sections and writes that come anew" {
        foreach point {source_cuts_snapshot target_cuts_links} {
            fresh
            fill 0
            failpoint 0 source_before_cut pause
            if {$point eq "source_cuts_snapshot"} {
                failpoint 0 $point fail 150000
            } else {
                failpoint 2 target_before_section pause
            }
            set id [migrate 0 2 5 8]
            wait_job_state 0 $id {snapshot streaming waiting}
            foreach slot $::slots {
                R 0 set [key_in $slot k1] changed
                R 0 del [key_in $slot k2]
                R 0 rpush [key_in $slot live] a b c
            }
            if {$point eq "target_cuts_links"} {failpoint 2 $point fail}
            wait_for_condition 1000 10 {[job_field 0 $id interruptions] > 0} else {fail "[job 0 $id]"}
            failpoint 0 source_cuts_snapshot off
            failpoint 2 target_cuts_links off
            failpoint 2 target_before_section off
            foreach slot $::slots {R 0 rpush [key_in $slot live] d}
            set before [slots_dump 0 $::slots]
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            assert_same_dump $before [slots_dump 2 $::slots]
            foreach n {0 2} {assert_survives $n}
            assert_same_dump $before [slots_dump 2 $::slots]
        }
    }

    test "FLUSHALL of the source in the middle" {
        foreach {node point state} {2 target_before_section loading 0 source_before_cut streaming} {
            fresh
            fill 0
            R 2 set [key_in 16000 own] x
            failpoint $node $point pause
            set id [migrate 0 2 5 8]
            wait_job_state $node $id $state
            R 0 flushall
            R 0 set [key_in 6 after] x
            failpoint $node $point off
            wait_migrated 0 2 $id
            assert_equal 2 [R 2 dbsize]
            foreach n {0 2} {assert_survives $n}
            assert_equal 2 [R 2 dbsize]
        }
    }

    test "FLUSHALL of the source before the target has begun to load" {
        fresh
        fill 0
        R 2 set [key_in 16000 own] x
        failpoint 0 source_before_fork pause
        set id [migrate 0 2 5 8]
        wait_for_condition 1000 10 {[job_field 2 $id reason] eq "waiting for the source's snapshot"} else {fail "[job 2 $id]"}
        stop_node 2
        failpoint 0 source_before_fork off
        wait_job_state 0 $id snapshot
        R 0 flushall
        R 0 set [key_in 6 after] x
        continue_node 2
        wait_migrated 0 2 $id
        assert_equal 2 [R 2 dbsize]
        foreach n {0 2} {assert_survives $n}
        assert_equal 2 [R 2 dbsize]
    }

    test "No hand-off while the file waits for another child, to be written for the first time" {
        fresh
        fill 0
        R 2 set [key_in 16000 own] x
        R 2 config set appendonly no
        R 2 config set rdb-key-save-delay 100000000
        R 2 bgsave
        R 2 config set appendonly yes
        set id [migrate 0 2 5 8]
        wait_for_condition 1000 10 {[job_field 2 $id reason] eq "the append-only file is being rewritten"} else {fail "[job 2 $id]"}
        assert_equal streaming [job_field 0 $id state]
        R 2 config set rdb-key-save-delay 0
        exec kill -9 [node_children 2]
        wait_migrated 0 2 $id
        foreach n {0 2} {assert_survives $n}
    }

    test "A job that is cancelled leaves no file, one whose target dies none when it is back" {
        fresh
        fill 0
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 8]
        wait_job_state 2 $id following
        assert_not_equal {} [loose_files 2]
        R 0 cluster cancel-slot-migrations id $id
        wait_job_state 2 $id cancelled
        wait_for_condition 500 10 {[loose_files 2] eq ""} else {fail "[loose_files 2] stay"}
        failpoint 2 target_before_section pause
        set id [migrate 0 2 5 8]
        wait_job_state 0 $id {snapshot streaming}
        wait_for_condition 500 10 {[loose_files 2] ne ""} else {fail "nothing is written"}
        failpoint 0 source_before_attach fail
        kill_node 2
        set left [loose_files 2]
        start_node_again 2
        foreach f $left {
            wait_for_condition 500 10 {![file exists $::aof_dir(2)/$f]} else {fail "$f stays"}
        }
        failpoint 0 source_before_attach off
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        foreach n {0 2} {assert_survives $n}
    }

    test "The append-only file is turned off and on in the middle, on either side" {
        foreach n {0 2} {
            fresh
            fill 0
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 5 8]
            wait_job_state 2 $id following
            R $n config set appendonly no
            R 0 set [key_in 6 meanwhile] x
            R $n config set appendonly yes
            wait_rewritten $n
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            foreach m {0 2} {assert_survives $m}

            # It was off when the job began: its target begins again.
            move_slots 2 0 5 8
            R $n config set appendonly no
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 5 8]
            wait_job_state 2 $id following
            R $n config set appendonly yes
            wait_rewritten $n
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            foreach m {0 2} {assert_survives $m}
        }
    }

    test "Several jobs to one target end in any order" {
        fresh
        fill 0
        fill_all_types 1 6000
        foreach {n point} {0 source_before_cut 1 source_before_cut} {failpoint $n $point pause}
        set a [migrate 0 2 5 6]
        set b [migrate 0 2 7 8]
        set c [migrate 1 2 6000 6000]
        foreach {n id} [list 0 $a 0 $b 1 $c] {wait_job_state $n $id streaming}
        R 1 set [key_in 6000 live] x
        failpoint 1 source_before_cut off
        wait_migrated 1 2 $c
        R 0 set [key_in 7 live] x
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $b
        wait_migrated 0 2 $a
        foreach n {0 1 2} {assert_survives $n}
    }
}

start_cluster 3 3 {tags {external:skip cluster} overrides {appendonly yes cluster-allow-replica-migration no}} {
    remember_dirs

    test "Replicas of both sides with an append-only file: each loads what it had" {
        fresh_shards $::slots
        fill 0
        set writers [start_writers 1 $::slots]
        wait_writers_go_on $writers
        set id [migrate 0 2 5 8]
        wait_migrated 0 2 $id
        wait_writers_go_on $writers
        assert_equal {} [dict get [stop_writers $writers] errors]
        foreach n {0 2} {wait_shard_agrees $n $::slots}
        assert_equal 0 [R 3 dbsize]
        foreach n {3 5} {
            kill_node $n
            set loaded [loaded_by_vanilla $::aof_dir($n)]
            set master [expr {$n-3}]
            assert_equal [list [R $master debug digest] [R $master dbsize]] $loaded
            start_node_again $n
        }
        wait_replicas_up
        foreach n {0 2} {wait_shard_agrees $n $::slots}
    }

    test "A source that its replica has replaced feeds nothing that it hears from it: no write is doubled" {
        fresh_shards $::slots
        fill 0
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 8]
        wait_job_state 2 $id following
        failpoint 0 source_overlooks pause
        # The target is to hear of it by the stream first.
        exec kill -STOP [node_pid 2]
        R 3 cluster failover takeover
        wait_promoted 3
        # The first of its own, in a transaction: at node 0 its place is the end of what was.
        R 3 multi
        R 3 rpush [key_in 5 once] a
        R 3 incr [key_in 5 counter]
        R 3 exec
        failpoint 3 source_before_cut pause
        assert_equal 1 [R 3 wait 1 5000]
        exec kill -CONT [node_pid 2]
        failpoints_off 0
        failpoint 3 source_before_cut off
        wait_job_state 2 $id done
        assert_equal {a 1} [list [R 2 lrange [key_in 5 once] 0 -1] [R 2 get [key_in 5 counter]]]
        wait_shard_agrees 2 $::slots
    }

    test "The target's replica that replaces it has the append-only file for it" {
        fresh_shards $::slots
        fill 0
        set before [slots_dump 0 $::slots]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 8]
        wait_for_condition 1000 10 {![catch {job 5 $id}]} else {fail "node 5 has no job"}
        wait_job_state 5 $id following
        set_failover_timeouts 1000
        R 5 cluster failover
        wait_promoted 5
        failpoint 0 source_before_cut off
        wait_job_state 0 $id done
        wait_job_state 5 $id done
        set_failover_timeouts 3000
        wait_cluster_agrees
        assert_same_dump $before [slots_dump 5 $::slots]
        wait_replicas_up
        wait_for_condition 1000 10 {[R 2 dbsize] == [R 5 dbsize] && [R 2 debug digest] eq [R 5 debug digest]} else {fail "node 2 has [R 2 dbsize] keys, node 5 [R 5 dbsize]"}
        foreach n {2 5} {
            wait_rewritten $n
            assert_equal [list [R 5 debug digest] [R 5 dbsize]] [loaded_by_vanilla $::aof_dir($n)]
        }
    }
}

start_cluster 2 0 {tags {external:skip cluster} overrides {appendonly yes save "" rename-command {SET PUT}}} {
    test "A renamed command that the append-only file needs is refused by name" {
        assert_error "*the command 'set' was renamed (rename-command) and there is an append-only file*appendonly to no*" {
            R 0 cluster migrate-slots slotsrange 5 8 node [node_id 1]
        }
        R 0 config set appendonly no
        assert_error "*refuses: the command 'set' was renamed*" {R 0 cluster migrate-slots slotsrange 5 8 node [node_id 1]}
        R 1 config set appendonly no
        R 0 put [key_in 5 k] x
        move_slots 0 1 5 8
        assert_equal x [R 1 get [key_in 5 k]]
    }
}
