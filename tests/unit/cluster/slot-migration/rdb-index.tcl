# Every RDB that a cluster node writes has an index of its slots: it agrees with what is in
# the node, an unpatched server loads the file, and a file that is damaged is known as such.
#
# With --accurate there are 10000 random damages for each reader.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

# ---- files ----

# A child may be at work for a replica that has come back.
proc save_now {n} {
    wait_for_condition 500 10 {![catch {R $n save} error]} else {fail $error}
}

# The index of the file is what node n has, to the key.
proc assert_index {n file} {
    set slots [slots_in_file $file]
    set rd [redis_deferring_client -$n]
    for {set slot 0} {$slot < 16384} {incr slot} {$rd cluster countkeysinslot $slot}
    set wrong {}
    set expires 0
    for {set slot 0} {$slot < 16384} {incr slot} {
        set has [$rd read]
        set says 0
        if {[dict exists $slots $slot]} {
            set says [lindex [dict get $slots $slot] 0]
            incr expires [lindex [dict get $slots $slot] 1]
            if {$says == 0} {lappend wrong "slot $slot is listed without keys"}
        }
        if {$says != $has} {lappend wrong "slot $slot has $has keys, the index says $says"}
    }
    $rd close
    if {$wrong ne ""} {fail "$file: [join [lrange $wrong 0 9] {; }]"}
    assert_equal [keyspace_field $n expires] $expires
    # Decoded key by key it is good, too.
    lassign [run src/redis-check-rdb $file] status output
    if {$status ne 0} {fail "$file: redis-check-rdb: [string range $output end-300 end]"}
    return $slots
}

# ---- nodes ----

proc index_complaints {n} {
    count_log_message -$n "index of slots in the RDB is of no use"
}

# All that a node has, and what a file of it must bring back.
proc contents {n} {
    list [R $n debug digest] [R $n dbsize] [keyspace_field $n expires] [R $n function list withcode]
}

proc fill_everything {n} {
    set r [Rn $n]
    $r function load "#!lua name=lib\nredis.register_function('f', function() return 1 end)"
    foreach slot {5 6 9000 16383} {fill_all_types $n $slot}
    $r set [key_in 0 px] v px 1000000000
    $r set [key_in 0 exat] v exat 4000000000
    $r hset [key_in 0 all] f v
    $r hexpire [key_in 0 all] 1000000 fields 1 f
    fill_strings $n [slots_of {100 300}] 2000
}

proc wait_full_sync {n before} {
    wait_for_condition 2000 10 {
        [status [Rn 0] sync_full] > $before && [status [Rn $n] master_link_status] eq "up" &&
        [status [Rn $n] master_repl_offset] == [status [Rn 0] master_repl_offset]
    } else {fail "node $n does not synchronize: [R $n info replication]"}
}

# Both servers read what either wrote.
foreach ::checksum {yes no} {
    start_cluster 1 1 [list tags {external:skip cluster} overrides [list save {} rdbchecksum $::checksum \
            repl-diskless-sync-delay 0 appendonly no]] {
        wait_replicas_up
        fill_everything 0
        set contents [contents 0]
        set dump [dump_file 0]

        foreach compression {yes no} {
            test "The index of a saved file is what the node has (checksum $::checksum, compression $compression)" {
                R 0 config set rdbcompression $compression
                R 0 save
                assert_index 0 $dump
                R 0 bgsave
                waitForBgsave [Rn 0]
                assert_equal [lsort [lmap {slot about} [assert_index 0 $dump] {list $slot [lrange $about 0 1]}]] \
                    [lsort [lmap {slot about} [slots_in_file $dump] {list $slot [lrange $about 0 1]}]]
                assert_match [expr {$::checksum ? "*All is as it was written." : "*checksums off: only the index was verified."}] \
                    [lindex [check_slots $dump] 1]
            }
        }

        test "The trailer stands where the format says, and the index where the trailer says (checksum $::checksum)" {
            set bytes [read_file $dump]
            set trailer [string range $bytes end-84 end-9]
            assert_equal [list "\xfa" "\x0d" slot-index-at "\x3c" SLOTINDX 0001] [list [string index $trailer 0] \
                [string index $trailer 1] [string range $trailer 2 14] [string index $trailer 15] \
                [string range $trailer 16 23] [string range $trailer 24 27]]
            scan [string range $trailer 28 59] %16llx%16llx offset length
            assert_equal [expr {[string length $bytes]-85}] [expr {$offset+$length}]
            set count 0
            foreach entry [lrange [split [string range $bytes $offset [expr {$offset+$length-1}]] {;}] 0 end-1] {
                assert_equal 6 [scan $entry %x:%llx:%llx:%llx:%llx:%llx slot at len keys expires crc]
                assert_equal "\xf4" [string index $bytes $at]
                assert_equal [expr {!$::checksum}] [expr {$crc == 0}]
                assert_equal [list $keys $expires $len $at] [dict get [slots_in_file $dump] $slot]
                if {[incr count] == 20} break
            }
            assert {$count == 20}
        }

        test "Redis 8.0 loads our file, we load what it saves (checksum $::checksum)" {
            restart_as 0 vanilla
            assert_equal $contents [contents 0]
            save_now 0
            assert_equal 2 [lindex [check_slots $dump] 0]
            restart_as 0 ours
            assert_equal $contents [contents 0]
            save_now 0
            restart_as 0 ours
            assert_equal $contents [contents 0]
            R 0 debug reload
            assert_equal $contents [contents 0]
            assert_equal 0 [index_complaints 0]
        }

        foreach {diskless rdbchannel load} {no no disabled yes no disabled yes yes disabled yes no swapdb yes yes swapdb} {
            foreach which {vanilla ours} {
                test "A full synchronization brings the index to a replica that is $which (checksum $::checksum, diskless $diskless, rdb channel $rdbchannel, load $load)" {
                    R 0 config set repl-diskless-sync $diskless
                    R 0 config set repl-rdb-channel $rdbchannel
                    set file [dump_file 1]
                    R 1 config set repl-rdb-channel $rdbchannel
                    R 1 config set repl-diskless-load $load
                    R 1 config rewrite
                    # Without a file it cannot go on with what it had: one of a copy that is under way would be such.
                    wait_full_sync 1 -1
                    file delete $file
                    set before [status [Rn 0] sync_full]
                    restart_as 1 $which
                    wait_full_sync 1 $before
                    assert_equal $contents [contents 1]
                    # What it received, byte by byte.
                    if {$load eq "disabled"} {assert_index 1 $file}
                    assert_equal 0 [index_complaints 1]
                }
            }
        }

        test "The base of an append-only file has the index, Redis 8.0 loads it (checksum $::checksum)" {
            R 0 config set appendonly yes
            waitForBgrewriteaof [Rn 0]
            wait_for_condition 500 10 {[status [Rn 0] aof_rewrite_in_progress] == 0 && [status [Rn 0] aof_rewrite_scheduled] == 0} else {fail "the rewrite does not end"}
            R 0 config rewrite
            assert_index 0 [lindex [glob -directory [file join [lindex [R 0 config get dir] 1] appendonlydir] *.base.rdb] 0]
            restart_as 0 vanilla
            assert_equal $contents [contents 0]
            restart_as 0 ours
            assert_equal $contents [contents 0]
            assert_equal 0 [index_complaints 0]
            R 0 config set appendonly no
            R 0 config rewrite
        }
    }
}

# ---- many, one, none; damage ----

# Says what is wrong, does not crash: 1 wrong, 2 no index.
proc wrong_with_check {file} {
    lassign [check_slots $file] status output
    set last [lindex [split $output \n] end]
    if {$status ni {1 2}} {return "status $status: $last"}
    if {![string match {*[a-z]*.} $last]} {return "it does not say what is wrong: '$last'"}
    return ""
}

start_cluster 1 0 {tags {external:skip cluster} overrides {save {}}} {
    set dump [dump_file 0]

    test "A node without keys has an index without slots" {
        R 0 save
        assert_equal {} [assert_index 0 $dump]
        lassign [check_slots $dump --json] status output
        assert_equal 0 $status
        assert_match "{\"sections\":\\\[\\],*\"slots\":0,\"keys\":0,*\"state\":\"good\",\"error\":null}" $output
        R 0 debug reload
    }

    test "All slots have keys" {
        fill_strings 0 [slots_of {0 16383}] 20000
        R 0 save
        assert_equal 16384 [dict size [assert_index 0 $dump]]
        set digest [R 0 debug digest]
        R 0 debug reload
        assert_equal $digest [R 0 debug digest]
        assert_equal 0 [index_complaints 0]
        R 0 flushall
    }

    test "One slot has all keys" {
        fill_strings 0 5 20000
        R 0 save
        assert_equal 5 [dict keys [assert_index 0 $dump]]
        R 0 flushall
    }

    test "A damaged slot is named with its offset, the others are good" {
        fill_few 0
        R 0 save
        set file [tmpfile slots.rdb]
        set bytes [read_file $dump]
        set slots [assert_index 0 $dump]
        assert_equal {5 6 16383} [dict keys $slots]
        lassign [dict get $slots 6] keys expires length offset
        set at [expr {$offset+$length-1}]
        write_file $file [string replace $bytes $at $at "!"]
        lassign [check_slots $file] status output
        assert_equal 1 $status
        assert_match "Slot 6 at offset $offset is damaged: its CRC is * the index has *" [lindex [split $output \n] end]
        assert_equal 1 [regexp -all {WRONG} $output]
        lassign [check_slots $file --json] status output
        assert_equal 1 $status
        assert_equal {true false true} [lmap {- good} [regexp -all -inline {"good":(\w+)} $output] {set good}]
        assert_match "*\"state\":\"wrong\",\"error\":\"Slot 6 at offset $offset is damaged*" $output
        lassign [run src/redis-check-rdb --slots] status output
        assert_equal 1 $status
        assert_match "Usage:*" $output
        assert_equal 1 [lindex [check_slots /no/such/file] 0]
    }

    test "A file that is cut off at any byte is known as such" {
        set wrong {}
        for {set size [expr {[string length $bytes]-1}]} {$size >= 0} {incr size -1} {
            write_file $file [string range $bytes 0 [expr {$size-1}]]
            set how [wrong_with_check $file]
            if {$how ne ""} {lappend wrong "at $size of [string length $bytes]: $how"}
            if {[llength $wrong] == 10} break
        }
        if {$wrong ne ""} {fail [join $wrong \n]}
    }

    test "Random damage is known as such" {
        set seed [start_random]
        set wrong {}
        for {set i 0} {$i < ($::accurate ? 10000 : 2000)} {incr i} {
            # Every other time where the index is.
            set damaged [damage $bytes [expr {$i%2 ? 200 : [string length $bytes]}]]
            if {$damaged eq $bytes} continue
            write_file $file $damaged
            set how [wrong_with_check $file]
            if {$how ne ""} {lappend wrong "number $i with seed $seed: $how"}
            if {[llength $wrong] == 10} break
        }
        if {$wrong ne ""} {fail [join $wrong \n]}
    }

    test "A server loads a file with a wrong index as one without, and says so, for any byte of the index" {
        set digest [R 0 debug digest]
        set whole [tmpfile whole.rdb]
        write_file $whole $bytes
        # Without the file's own sum, which would tell before.
        set bytes [string replace $bytes end-7 end [string repeat \x00 8]]
        set size [string length $bytes]
        scan [string range $bytes end-56 end-25] %16llx%16llx offset length
        set complaints [index_complaints 0]
        set damages 0
        for {set at $offset} {$at < $size-9} {incr at} {
            if {$at >= $offset+$length && $at < $size-9-60} continue
            foreach bit {1 64} {
                scan [string index $bytes $at] %c value
                write_file $dump [string replace $bytes $at $at [binary format c [expr {$value ^ $bit}]]]
                R 0 debug reload nosave
                incr damages
                if {[R 0 debug digest] ne $digest} {fail "keys are not what they were with byte $at of $size damaged"}
            }
        }
        assert {$damages >= 200}
        assert_equal [expr {$complaints+$damages}] [index_complaints 0]
        # And the undamaged one is not complained about.
        write_file $dump $bytes
        R 0 debug reload nosave
        assert_equal [expr {$complaints+$damages}] [index_complaints 0]
    }

    test "A server does not start with a file that is cut off at any byte or has a slot that is none, and says why" {
        lassign [dict get $slots 5] keys expires length offset
        # A slot's number in four bytes instead of one.
        set damages [list [string replace $bytes [expr {$offset+1}] [expr {$offset+1}] "\x80\x00\x01\x86\x9f"] "Invalid slot 99999"]
        for {set size 0} {$size < [string length $bytes]} {incr size} {lappend damages [string range $bytes 0 $size-1] "*"}
        foreach {damaged why} $damages {
            write_file $file $damaged
            lassign [start_with $file] status output
            if {$status ne 1} {fail "status $status for [string length $damaged] of [string length $bytes] bytes: $output"}
            assert_match "*$why*" $output
            assert_no_match "*BUG REPORT*" $output
        }
    }

    test "A server does not start with a file that has random damage" {
        set bytes [read_file $whole]
        set seed [start_random]
        set ended 0
        for {set i 0} {$i < ($::accurate ? 10000 : 300)} {incr i} {
            # Not the version: before 5 there were no checksums.
            set damaged [damage $bytes [expr {[string length $bytes]-10}]]
            if {$damaged eq $bytes} continue
            write_file $file $damaged
            lassign [start_with $file] status output
            # What upstream does on purpose when a key is there twice.
            if {$status eq "SIGABRT" && [string match "*Duplicated key found in RDB file*" $output]} continue
            if {$status ne 1 || [string match "*BUG REPORT*" $output]} {
                fail "number $i with seed $seed: status $status: [string range $output end-2000 end]"
            }
            incr ended
        }
        assert {$ended > 250}
    }
}
