# What does not arrive as it was sent, or cannot be applied, fails the migration
# before the hand-off: never a slot with a key missing or wrong.

source tests/support/slot_migration.tcl

proc job_failed {n id} {
    wait_for_condition 1500 10 {[job_ended [job_field $n $id state]]} else {
        fail "the job does not end at node $n: [job $n $id]"
    }
    assert_equal failed [job_field $n $id state]
    return [job_field $n $id last-error]
}

# A job that is sent an XADD twice: the second one is an error. Its id.
proc migrate_with_failing_xadd {} {
    R 0 xadd [key_in 5 stream] 1-1 f v
    failpoint 0 source_before_cut pause
    set id [migrate 0 2 5 6]
    wait_job_state 0 $id streaming
    failpoint 0 source_repeats_command fail
    R 0 xadd [key_in 5 stream] 2-1 f w
    return $id
}

start_cluster 3 0 {tags {external:skip cluster}} {
    test "A section whose sum is wrong fails the job, with the slot named" {
        fresh
        fill_strings 0 {5 6} 100
        set before [slots_dump 0 {5 6}]
        failpoint 0 source_damages_section fail
        set id [migrate 0 2 5 6]
        assert_match "*slot 5 arrived damaged: CRC*" [job_failed 2 $id]
        assert_match "*slot 5 arrived damaged: CRC*" [job_failed 0 $id]
        assert_equal 0 [R 2 dbsize]
        assert_same_dump $before [slots_dump 0 {5 6}]
        failpoint 0 source_damages_section off
        move_slots 0 2 5 6
        assert_same_dump $before [slots_dump 2 {5 6}]
    }

    test "A command of the stream that fails at the target fails the job, with command and slot named" {
        fresh
        set id [migrate_with_failing_xadd]
        assert_match "*the command 'xadd' of the stream failed in slot 5*" [job_failed 2 $id]
        assert_match "*at the target: the command 'xadd'*" [job_failed 0 $id]
        failpoints_off 0
        assert_equal 2 [R 0 xlen [key_in 5 stream]]
        assert_equal 0 [R 2 dbsize]
        move_slots 0 2 5 6
        assert_equal 2 [R 2 xlen [key_in 5 stream]]
    }

    test "A key that did not arrive is found before the hand-off, with the slot and both counts named" {
        fresh
        R 0 set [key_in 5 a] 1
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 6]
        wait_job_state 0 $id streaming
        failpoint 0 source_drops_command fail
        R 0 set [key_in 5 b] 2 ex 1000
        failpoint 0 source_drops_command off
        failpoint 0 source_before_cut off
        assert_match "slot 5 has 2 keys and 1 expires at the source, but slot 5 has 1 and 0 at the target" [job_failed 0 $id]
        assert_match "at the source: slot 5 has 2 keys*" [job_failed 2 $id]
        assert_equal 2 [R 0 get [key_in 5 b]]
        move_slots 0 2 5 6
        assert_equal 2 [R 2 get [key_in 5 b]]
    }

    test "A target that answers such errors with panic by configuration survives" {
        fresh
        R 2 config set propagation-error-behavior panic
        set id [migrate_with_failing_xadd]
        assert_match "*the command 'xadd'*" [job_failed 2 $id]
        failpoints_off 0
        R 2 config set propagation-error-behavior ignore
        assert_equal PONG [R 2 ping]
    }

    # Large values are read in batches, and asked for ahead.
    test "A large hash or set that has a member twice, or ends too early, is refused whole" {
        fresh
        R 0 config set rdbcompression no
        R 0 debug set-skip-checksum-validation 1
        foreach {type add} {hash hset set sadd} {
            set key [key_in 5 $type]
            set words {}
            for {set i 0} {$i < 1000} {incr i} {
                lappend words member:[format %04d $i]
                if {$type eq "hash"} {lappend words value:$i}
            }
            R 0 $add $key {*}$words
            assert_encoding hashtable $key
            set dump [R 0 dump $key]
            set digest [debug_digest_value $key]
            R 0 del $key
            # Of one batch with the first, of another, and the last one.
            foreach i {1 500 999} {
                set twice [string map [list member:[format %04d $i] member:0000] $dump]
                assert_equal [string length $dump] [string length $twice]
                assert {$twice ne $dump}
                assert_error "*Bad data format*" {R 0 restore $key 0 $twice}
                assert_equal 0 [R 0 exists $key]
            }
            foreach n {20 300 5000} {
                set short [string range $dump 0 $n][string range $dump end-9 end]
                assert_error "*Bad data format*" {R 0 restore $key 0 $short}
                assert_equal 0 [R 0 exists $key]
            }
            R 0 restore $key 0 $dump
            assert_equal $digest [debug_digest_value $key]
        }
        R 0 debug set-skip-checksum-validation 0
        R 0 config set rdbcompression yes
    }
}
