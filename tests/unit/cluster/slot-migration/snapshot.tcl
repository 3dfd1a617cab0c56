# Who takes the snapshot: the saver's thread, slot by slot, or a fork; who waits for a
# slot that is frozen meanwhile.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

proc forks {n} {status [Rn $n] total_forks}

proc freeze_field {n name} {CI $n cluster_slot_migration_freeze_$name}

proc freezes {n} {CI $n cluster_slot_migration_freezes}

# A job of these slots that stands while its first batch is frozen.
proc start_frozen {args} {
    set before [freezes 0]
    failpoint 0 source_in_freeze pause
    set id [migrate 0 2 {*}$args]
    wait_for_condition 500 10 {[freezes 0] > $before} else {fail "nothing is frozen: [job 0 $id]"}
    return $id
}

proc thaw {} {failpoint 0 source_in_freeze off}

# Of the server, or of its thread with this name; "": none.
proc nice_of {n {name {}}} {
    set dir /proc/[srv [expr {-$n}] pid]
    foreach file [expr {$name eq {} ? "$dir/stat" : [glob $dir/task/*/stat]}] {
        # A thread may end in between.
        if {[catch {read_file $file} stat] || ![regexp {\((.*)\) (.*)} $stat -> title fields]} continue
        if {$name in [list {} $title]} {return [lindex $fields 16]}
    }
}

proc flags {n rd} {
    regexp {flags=(\S+)} [R $n client list id $::client_of($rd)] -> flags
    return $flags
}

proc wait_waits {n rd} {
    wait_for_condition 500 10 {[string match *b* [flags $n $rd]]} else {fail "the client does not wait: [R $n client list]"}
}

proc some_keys {n slots count} {
    foreach slot $slots {
        for {set i 0} {$i < $count} {incr i} {R $n set [key_in $slot k$i] $slot:$i}
    }
}

start_cluster 3 0 {tags {external:skip cluster modules} overrides {save ""}} {
    foreach {mode by} {auto thread thread thread fork fork} {
        test "Every type in every encoding, by cluster-slot-migration-snapshot $mode, under load: the same at the target" {
            fresh
            with_config [list 0 [list cluster-slot-migration-snapshot $mode]] {
                foreach slot {3 4 5} {fill_all_types 0 $slot}
                fill_strings 0 [slots_of {6 400}] 20000
                set before [slots_dump 0 {3 4 5}]
                set forked [forks 0]
                set writers [start_writers 2 [slots_of {6 400}]]
                set id [migrate 0 2 3 400]
                wait_migrated 0 2 $id
                wait_writers_go_on $writers
                stop_writers $writers
                assert_same_dump $before [slots_dump 2 {3 4 5}]
                # On a slow machine a slot may take too long for the thread.
                if {$mode eq "auto" && [job_field 0 $id forked-slots] ne ""} {set by "thread and fork"}
                assert_equal $by [job_field 0 $id snapshot-by]
                assert_equal "" [job_field 2 $id snapshot-by]
                assert_equal [expr {$by ne "thread"}] [expr {[forks 0]-$forked}]
                assert_equal 0 [freeze_field 0 guarded]
            }
        }
    }

    test "A slot that takes long goes by a fork behind the others, and says so; `thread` forks nothing all the same" {
        foreach {mode by large forks} {auto "thread and fork" {7 9} 1 thread thread {} 0} {
            fresh
            with_config [list 0 [list cluster-slot-migration-snapshot $mode]] {
                some_keys 0 {5 6 8 10} 20
                fill_strings 0 7 150000
                R 0 config resetstat
                for {set i 0} {$i < 15} {incr i} {   ;# not all at once: a sanitizer's build would be taken for dead
                    R 0 eval {for i = 1, 10000 do redis.call('sadd',KEYS[1],ARGV[1]*10000+i .. string.rep('x',30)) end} 1 [key_in 9 set] $i
                }
                set dump [slots_dump 0 {5 6 8 9 10}]
                set forked [forks 0]
                set writers [start_writers 2 {5 7 8}]
                set id [migrate 0 2 5 10]
                wait_migrated 0 2 $id
                wait_writers_go_on $writers
                stop_writers $writers
                assert_equal $by [job_field 0 $id snapshot-by]
                assert_equal [expr {$large ne {}}] [string match {*: not serialized in 5000 us} [job_field 0 $id forked-because]]
                foreach slot $large {
                    if {$slot ni [split [string map {- " "} [job_field 0 $id forked-slots]]]} {fail "slot $slot was not too large: [job 0 $id]"}
                }
                assert_equal $forks [expr {[forks 0]-$forked}]
                foreach {key value} [slots_dump 2 {6 9 10}] {assert_equal $value [dict get $dump $key] $key}
                for {set i 0} {$i < 150000} {incr i 30000} {
                    assert_equal 30000 [R 2 eval {local n = 0 for i = ARGV[2], ARGV[2]+29999 do n = n + redis.call('exists','{' .. ARGV[1] .. '}k' .. string.format('%d',i)) end return n} 1 [key_in 7 k] [slot_tag 7] $i]
                }
            }
        }
    }

    test "A few slots that take long have longer before a node that is large forks for them" {
        foreach {mbytes policy us by forked forks within} {
            0   noeviction  7000  "thread and fork" {6 7} 1 5000
            300 noeviction  7000  thread            {}    0 -
            300 noeviction  20000 "thread and fork" {6 7} 1 10000
            300 allkeys-lru 3000  "thread and fork" {6 7} 1 2000
        } {
            fresh
            some_keys 0 {6 7} 20
            if {$mbytes} {R 0 setrange [key_in 100 ballast] [expr {$mbytes*1024*1024}] x}
            wait_for_cluster_state ok       ;# it may have been gone for long enough
            R 0 config set maxmemory 1gb maxmemory-policy $policy
            R 0 config resetstat
            failpoint 0 source_slot_takes_long fail $us
            set before [slots_dump 0 {6 7}]
            set total [forks 0]
            set id [migrate 0 2 6 7]
            wait_migrated 0 2 $id
            failpoint 0 source_slot_takes_long off
            assert_same_dump $before [slots_dump 2 {6 7}]
            assert_equal $by [job_field 0 $id snapshot-by]
            assert_equal $forked [split [string map {- " "} [job_field 0 $id forked-slots]]]
            assert_equal [expr {$forks ? "6-7: not serialized in $within us" : ""}] [job_field 0 $id forked-because]
            assert_equal $forks [expr {[forks 0]-$total}]
            assert_equal 2 [expr {min(2,[freeze_field 0 put_back])}]
            R 0 unlink [key_in 100 ballast]
            R 0 config set maxmemory 0 maxmemory-policy noeviction
        }
    }

    test "On a large node each slot has longer, for a fork would take longer" {
        fresh
        some_keys 0 [slots_of {6 25}] 20
        foreach n {1 2 3} {R 0 setrange [key_in 100 ballast$n] [expr {450*1024*1024}] x}
        wait_for_cluster_state ok
        R 0 config resetstat
        failpoint 0 source_slot_takes_long fail 8000
        set total [forks 0]
        set id [migrate 0 2 6 25]
        wait_migrated 0 2 $id
        failpoint 0 source_slot_takes_long off
        assert_equal {thread {} {}} [list [job_field 0 $id snapshot-by] [job_field 0 $id forked-slots] [job_field 0 $id forked-because]]
        assert_equal $total [forks 0]
        foreach n {1 2 3} {R 0 unlink [key_in 100 ballast$n]}
    }

    test "Reads and writes of a frozen slot wait, of other slots they do not" {
        fresh
        some_keys 0 {5 6} 5
        R 0 config resetstat
        set id [start_frozen 5 5]
        set reader [send_command 0 get [key_in 5 k1]]
        set writer [send_command 0 set [key_in 5 k2] new]
        set transaction [send_command 0 multi]
        assert_equal OK [$transaction read]
        wait_waits 0 $reader
        wait_waits 0 $writer
        assert_equal 6:1 [R 0 get [key_in 6 k1]]
        assert_equal OK [R 0 set [key_in 6 k1] other]
        assert_equal PONG [R 0 ping]
        $transaction incr [key_in 5 n]
        $transaction flush
        wait_waits 0 $transaction
        thaw
        assert_equal 5:1 [$reader read]
        assert_equal OK [$writer read]
        assert_equal QUEUED [$transaction read]
        foreach rd [list $reader $writer $transaction] {$rd close}
        wait_migrated 0 2 $id
        assert_equal new [R 2 get [key_in 5 k2]]
        assert_morethan_equal [freeze_field 0 commands_waited] 3
        assert_equal {0 0} [list [freeze_field 0 stalls] [freeze_field 0 guarded]]
    }

    # What a command without keys does while a slot is frozen, and what it answers.
    foreach {what command reply} {
        "SCAN"                     {scan 0 count 1000}                         {0 *}
        "KEYS"                     {keys *}                                    {*k1*}
        "RANDOMKEY"                {randomkey}                                 {*k*}
        "CLUSTER GETKEYSINSLOT"    {cluster getkeysinslot 5 10}                {*k1*}
        "a script without keys"    {eval {return redis.call('dbsize')} 0}      10
        "DEBUG"                    {debug digest}                              {*}
        "SAVE"                     {save}                                      OK
        "FLUSHALL"                 {flushall}                                  OK
        "FLUSHDB ASYNC"            {flushdb async}                             OK
    } {
        test "$what waits for the thaw" {
            fresh
            some_keys 0 {5 6} 5
            R 0 config resetstat
            set id [start_frozen 5 5]
            set rd [send_command 0 {*}$command]
            wait_waits 0 $rd
            assert_equal PONG [R 0 ping]
            assert_equal 6:1 [R 0 get [key_in 6 k1]]
            thaw
            assert_match $reply [$rd read]
            $rd close
            wait_migrated 0 2 $id
            assert_equal [expr {[string match flush* $command] ? 0 : 5}] [R 2 dbsize]
            assert_equal {0 0} [list [freeze_field 0 stalls] [freeze_field 0 guarded]]
        }
    }

    test "Commands that look into no slot do not wait" {
        fresh
        some_keys 0 5 5
        set id [start_frozen 5 5]
        foreach command {
            {ping} {info all} {config get *} {client list} {cluster nodes} {cluster slot-migrations} {publish c m}
            {script load {return 1}} {cluster countkeysinslot 5} {memory stats} {latency doctor} {acl list} {command count}
        } {
            R 0 {*}$command
        }
        assert_equal snapshot [job_field 0 $id state]
        thaw
        wait_migrated 0 2 $id
        assert_equal {0 0} [list [freeze_field 0 stalls] [freeze_field 0 guarded]]
    }

    test "Saves, rewrites and new replicas fork while a slot is frozen; none waits for it" {
        fresh
        some_keys 0 {5 6} 5
        with_config {0 {stop-writes-on-bgsave-error no}} {
            set id [start_frozen 5 5]
            set saves [status [Rn 0] rdb_saves]
            R 0 bgsave
            wait_for_condition 500 10 {[status [Rn 0] rdb_saves] > $saves} else {fail "the save does not end"}
            R 0 bgrewriteaof
            wait_for_condition 500 10 {[status [Rn 0] aof_rewrites] > 0 && ![status [Rn 0] aof_rewrite_in_progress]} else {fail "the rewrite does not end"}
            assert_equal snapshot [job_field 0 $id state]
            thaw
            wait_migrated 0 2 $id
            assert_equal 5 [R 2 dbsize]
        }
    }

    test "What was taken and is not sent yet is in INFO, and not counted for eviction" {
        fresh
        R 0 set [key_in 5 k] [string repeat x 3000000]
        set overhead [status [Rn 0] mem_not_counted_for_evict]
        set id [start_frozen 5 5]
        wait_for_condition 500 10 {[status [Rn 0] mem_cluster_slot_migration_output] >= 3000000} else {fail "[R 0 info memory]"}
        assert_morethan_equal [status [Rn 0] mem_not_counted_for_evict] [expr {$overhead+3000000}]
        thaw
        wait_migrated 0 2 $id
        assert_lessthan [status [Rn 0] mem_cluster_slot_migration_output] 3000000
    }

    test "A cancel, and the end of the target, while a slot is frozen, thaw it" {
        fresh
        some_keys 0 5 5
        set id [start_frozen 5 5]
        set rd [send_command 0 get [key_in 5 k1]]
        wait_waits 0 $rd
        R 0 cluster cancel-slot-migrations id $id
        assert_equal 5:1 [$rd read]
        $rd close
        thaw
        set id [start_frozen 5 5]
        set rd [send_command 0 get [key_in 5 k1]]
        wait_waits 0 $rd
        R 2 cluster cancel-slot-migrations id $id
        assert_equal 5:1 [$rd read]
        $rd close
        thaw
        assert_equal 5 [R 0 dbsize]
    }

    # The storm: two slots that are frozen for 100 us, again and again, until it is called off.
    proc storm {id body} {
        upvar 1 id i
        failpoint 0 source_in_freeze fail 100
        set seen [freezes 0]
        set i [migrate 0 2 5 6]
        wait_for_condition 500 10 {[freezes 0] > $seen+100} else {fail "[job 0 $i]"}
        uplevel 1 $body
        set seen [freezes 0]
        wait_for_condition 500 10 {[freezes 0] > $seen+100} else {fail "the storm is over: [job 0 $i]"}
        assert_equal snapshot [job_field 0 $i state]
        thaw
        wait_migrated 0 2 $i
    }

    test "Keys and hash fields expire by themselves while slots are frozen again and again" {
        fresh
        R 0 config resetstat
        for {set i 0} {$i < 200} {incr i} {
            R 0 set [key_in 5 e$i] x px 100
            R 0 set [key_in 100 e$i] x px 100
        }
        R 0 hset [key_in 5 h] a 1 b 2
        R 0 hpexpire [key_in 5 h] 100 fields 1 a
        R 0 hset [key_in 6 h] a 1
        storm id {
            wait_for_condition 1000 10 {[R 0 dbsize] == 2 && [status [Rn 0] expired_subkeys] == 1} else {
                fail "not all is expired: [R 0 dbsize]"
            }
        }
        assert_equal {b 2} [R 2 hgetall [key_in 5 h]]
        assert_equal 0 [freeze_field 0 guarded]
    }

    test "A node that is full evicts while slots are frozen again and again" {
        fresh
        fill_strings 0 {5 6} 4000 500
        R 0 config resetstat
        storm id {
            with_config {0 {maxmemory-policy allkeys-random maxmemory 0}} {
                # Full is relative to what is used now: what earlier tests left may still be freed.
                wait_for_condition 1000 10 {
                    [R 0 config set maxmemory [expr {[status [Rn 0] used_memory]-[status [Rn 0] mem_not_counted_for_evict]-500000}]] eq "OK" &&
                    [R 0 set [key_in 100 x] y] eq "OK" && [status [Rn 0] evicted_keys] > 100
                } else {
                    fail "evicted keys: [status [Rn 0] evicted_keys], used memory: [status [Rn 0] used_memory]"
                }
            }
        }
        assert_equal [R 2 dbsize] [expr {[R 2 cluster countkeysinslot 5]+[R 2 cluster countkeysinslot 6]}]
        assert_equal 0 [freeze_field 0 guarded]
    }

    test "Writes to slots that were not taken yet are not streamed: the snapshot will contain them" {
        fresh
        some_keys 0 5 1000      ;# more than one batch
        some_keys 0 6 5
        set id [start_frozen 5 6]
        for {set i 0} {$i < 200} {incr i} {R 0 set [key_in 6 w$i] [string repeat x 10000]}
        assert_lessthan [job_field 0 $id stream-bytes] 10000
        thaw
        wait_migrated 0 2 $id
        assert_lessthan [job_field 0 $id stream-bytes] 10000
        assert_equal 1205 [R 2 dbsize]
        assert_equal 10000 [R 2 strlen [key_in 6 w199]]
    }

    test "Scripts that name no or other keys than they use stall for a moment, and see what is true" {
        fresh
        R 0 config resetstat
        R 0 set [key_in 5 n] 0
        R 0 set [key_in 6 n] 0
        storm id {
            for {set i 1} {$i <= 200} {incr i} {
                assert_equal $i [R 0 eval "#!lua flags=allow-cross-slot-keys\nreturn redis.call('incr',ARGV\[1\])" 1 [key_in 100 k] [key_in 5 n]]
            }
            assert_equal 1 [R 0 eval {return redis.call('incr',KEYS[1])} 1 [key_in 6 n]]
        }
        assert_morethan [freeze_field 0 stalls] 0
        assert_equal {200 1} [list [R 2 get [key_in 5 n]] [R 2 get [key_in 6 n]]]
    }

    test "A module's timers, and its thread that calls commands, reach into slots that are frozen again and again" {
        fresh
        R 0 config resetstat
        load_test_module 0 timer {{"INCR", "s"} {"INCR", "!s"}}
        load_test_module 0 blockedclient {{CreateString(NULL, "v", 1)} {CreateString(NULL, "!v", 2)}}
        R 0 set [key_in 5 n] 0
        R 0 set [key_in 6 n] 0
        storm id {
            set clients {}
            for {set i 0} {$i < 4} {incr i} {lappend clients [connect 0]}
            foreach rd $clients {$rd deferred 1}
            for {set i 1} {$i <= 100} {incr i} {
                R 0 test.createtimer 0 [key_in 6 n]
                foreach rd $clients {$rd do_bg_rm_call incr [key_in 5 n]}
                foreach rd $clients {assert_morethan [$rd read] 0}
                assert_morethan_equal [R 0 eval {return redis.call('incr',KEYS[1])} 1 [key_in 5 n]] $i
            }
            foreach rd $clients {$rd close}
            wait_for_condition 500 10 {[R 0 get [key_in 6 n]] == 100} else {fail "the timers have not written all: [R 0 get [key_in 6 n]]"}
        }
        assert_morethan [freeze_field 0 stalls] 0
        assert_equal {500 100} [list [R 2 get [key_in 5 n]] [R 2 get [key_in 6 n]]]
        R 0 module unload timer
        R 0 module unload blockedclient
    }

    test "Dicts that grow and shrink while they are frozen again and again" {
        fresh
        R 0 config resetstat
        some_keys 0 5 4
        storm id {
            fill_strings 0 {5 6} 2000
            for {set i 0} {$i < 2000} {incr i} {
                if {$i % 100} {lappend gone [key_in [expr {5+$i%2}] k$i]}
            }
            foreach key $gone {R 0 unlink $key}
            wait_for_condition 500 10 {[R 0 dbsize] < 30} else {fail "[R 0 dbsize]"}
            set left [R 0 dbsize]
        }
        assert_equal $left [R 2 dbsize]
        assert_equal 0 [freeze_field 0 guarded]
    }

    test "What is serialized and not sent yet stays below 64 MB, however much is moved" {
        fresh
        R 0 config resetstat
        R 0 eval {for i = 1, 3000 do redis.call('setrange','{' .. KEYS[1] .. '}' .. i,99999,'x') end} 1 [slot_tag 5]
        R 0 eval {for i = 1, 300 do redis.call('hset','{' .. KEYS[1] .. '}' .. i,'a',string.rep('x',90000),'b',i) end} 1 [slot_tag 6]
        some_keys 0 [slots_of {7 200}] 5
        wait_for_cluster_state ok       ;# the node may have been gone for long enough
        set before [slots_dump 0 6]
        set id [migrate 0 2 5 200]
        wait_migrated 0 2 $id
        assert_same_dump $before [slots_dump 2 6]
        assert_equal 3000 [R 2 cluster countkeysinslot 5]
        assert_morethan [freeze_field 0 max_bytes] 0
        assert_lessthan [freeze_field 0 max_bytes] [expr {64*1024*1024}]
    }

    test "Settings that change how values are stored, saved and judged, while slots are frozen again and again" {
        fresh
        R 0 config resetstat
        foreach slot {5 6} {fill_all_types 0 $slot}
        set before [slots_dump 0 {5 6}]
        set settings {
            rdbcompression {no yes} activerehashing {no yes} hz {100 10}
            hash-max-listpack-entries {1 512} zset-max-listpack-entries {1 128} list-max-listpack-size {1 -2}
            set-max-intset-entries {1 512} maxmemory-policy {allkeys-lfu volatile-lru noeviction}
            lazyfree-lazy-user-del {yes no} cluster-slot-migration-snapshot {fork thread auto}
        }
        storm id {
            foreach {setting values} $settings {foreach value $values {R 0 config set $setting $value}}
        }
        assert_same_dump $before [slots_dump 2 {5 6}]
        assert_equal {0 0} [list [freeze_field 0 stalls] [freeze_field 0 guarded]]
    }

    test "Defragmentation waits while slots are frozen again and again, and moves nothing of them" {
        fresh
        R 0 config resetstat
        if {[catch {R 0 config set activedefrag yes} error]} {
            puts "NOTE: no defragmentation: $error"
        } else {
            R 0 config set activedefrag no
            fill_strings 0 {5 6 100} 4000 200
            foreach slot {5 6 100} {for {set i 0} {$i < 4000} {incr i 2} {R 0 del [key_in $slot k$i]}}
            set before [slots_dump 0 {5 6}]
            set others [R 0 cluster countkeysinslot 100]
            with_config {0 {active-defrag-ignore-bytes 1 active-defrag-threshold-lower 0 active-defrag-cycle-min 25 active-defrag-cycle-max 50 activedefrag yes}} {
                storm id {
                    wait_for_condition 500 10 {[status [Rn 0] active_defrag_running] > 0} else {fail "no defragmentation: [R 0 info memory]"}
                    set hits [status [Rn 0] active_defrag_key_hits]
                }
                R 0 config set activedefrag no
            }
            assert_same_dump $before [slots_dump 2 {5 6}]
            assert_equal $others [R 0 dbsize]
            assert_equal {0 0} [list [freeze_field 0 stalls] [freeze_field 0 guarded]]
        }
    }

    test "A module opens keys that its command names, or does not, while slots are frozen again and again" {
        fresh
        R 0 config resetstat
        load_test_module 0 misc {"\"no-cluster\"" "\"\""}
        some_keys 0 {5 6} 5
        storm id {
            for {set i 0} {$i < 100} {incr i} {
                assert_equal OK [R 0 test.silent_open_key [key_in 5 k[expr {$i%5}]]]
                assert_equal 1 [R 0 test.keyexists [key_in 6 k[expr {$i%5}]]]
                assert_equal 10 [R 0 test.dbsize]
            }
        }
        assert_equal 0 [freeze_field 0 guarded]
        R 0 module unload misc
    }

    if {$::tcl_platform(os) eq "Linux"} {
        test "The loader has low priority, the saver the server's, for others may wait for it" {
            fresh
            some_keys 0 {5} 5
            set before [list [nice_of 0] [nice_of 2]]
            set id [start_frozen 5 5]
            # 10 where slices cannot be set: a filter of system calls may forbid it.
            set low [list 19 [expr {[nice_of 2]+7}]]
            if {![regexp {Seccomp:\t0} [read_file /proc/[srv -2 pid]/status]]} {lappend low [expr {[nice_of 2]+10}]}
            wait_for_condition 500 10 {[nice_of 2 slot_loader] in $low} else {
                fail "the loader's is [nice_of 2 slot_loader], the server's [nice_of 2]"}
            wait_for_condition 500 10 {[nice_of 0 slot_saver] eq [nice_of 0]} else {
                fail "the saver's is [nice_of 0 slot_saver], the server's [nice_of 0]"}
            thaw
            wait_migrated 0 2 $id
            assert_equal $before [list [nice_of 0] [nice_of 2]]
        }
    }

    test "FLUSHALL in the middle: what was taken before is gone, what is taken after is not" {
        fresh
        some_keys 0 {5 6 7 8} 5
        failpoint 0 source_in_freeze pause
        set id [migrate 0 2 5 8]
        wait_job_state 0 $id snapshot
        set rd [send_command 0 flushall]
        wait_waits 0 $rd
        # Slots beyond the first batch, if there are, are taken behind the flush.
        thaw
        assert_equal OK [$rd read]
        $rd close
        some_keys 0 {5 8} 3
        wait_migrated 0 2 $id
        assert_equal 6 [R 2 dbsize]
        assert_equal {5:1 8:2} [list [R 2 get [key_in 5 k1]] [R 2 get [key_in 8 k2]]]
    }

    test "Values of modules are saved on the main thread; a slot with many of them goes by a fork" {
        fresh
        foreach n {0 2} {load_test_module $n datatype {}}
        R 0 config resetstat
        some_keys 0 {5 6} 5
        R 0 datatype.set [key_in 5 m] 1 a
        for {set i 0} {$i < 20000} {incr i 5000} {
            R 0 eval {for i = 1, 5000 do redis.call('datatype.set','{' .. ARGV[1] .. '}m' .. ARGV[2]+i,i,'a') end} 1 [key_in 6 m] [slot_tag 6] $i
        }
        set dump [slots_dump 0 {5 6}]
        set id [migrate 0 2 5 6]
        wait_migrated 0 2 $id
        assert_equal 6 [job_field 0 $id forked-slots]
        assert_equal "6: module values that the main thread would save for too long" [job_field 0 $id forked-because]
        assert_equal 1 [freeze_field 0 on_main_thread]
        assert_same_dump $dump [slots_dump 2 {5 6}]
    }

    test "Vector sets are saved by the thread; one that would take too long goes by a fork" {
        fresh
        R 0 config resetstat
        some_keys 0 {5 6 7} 5
        R 0 vadd [key_in 5 v] values 3 1 2 3 a
        R 0 eval {for i = 1, 20 do redis.call('vadd','{' .. ARGV[1] .. '}v' .. i,'values',3,i,2,3,'a') end} 1 [key_in 6 v] [slot_tag 6]
        # 2000 bytes a vector: more than 200 for each of the 5000 us.
        R 0 eval {for i = 1, 700 do redis.call('vadd',KEYS[1],'fp32',string.rep(string.char(i % 100,0,128,63),500),i,'noquant','ef',1) end} 1 [key_in 7 v]
        set dump [slots_dump 0 {5 6 7}]
        set id [migrate 0 2 5 7]
        wait_migrated 0 2 $id
        assert_equal 7 [job_field 0 $id forked-slots]
        assert_equal "7: not serialized in 5000 us" [job_field 0 $id forked-because]
        assert_equal 0 [freeze_field 0 on_main_thread]
        assert_same_dump $dump [slots_dump 2 {5 6 7}]
    }

    test "Vector sets are read by threads of their own while they are frozen again and again" {
        fresh
        R 0 config resetstat
        set key [key_in 5 v]
        R 0 eval {for i = 1, 300 do redis.call('vadd',KEYS[1],'fp32',string.rep(string.char(i % 100,i % 90,128,63),20),i,'setattr','{"n":' .. i .. '}') end} 1 $key
        set vector [string repeat \x00\x00\x80\x3f 20]
        with_config {0 {cluster-slot-migration-snapshot thread}} {
            failpoint 0 source_in_freeze fail 100
            set id [migrate 0 2 5 5]
            set loads {}
            foreach command [list [list vsim $key fp32 $vector count 5 filter ".n > 3"] [list vadd $key fp32 $vector new cas] [list vsim $key ele 7 withscores]] {
                set rd [redis_deferring_client]
                lappend loads $rd
                for {set i 0} {$i < 300} {incr i} {
                    if {[lindex $command 0] eq "vadd"} {lset command 4 new$i}
                    $rd {*}$command
                }
            }
            foreach rd $loads {
                for {set i 0} {$i < 300} {incr i} {$rd read}
                $rd close
            }
            assert_equal 600 [R 0 vcard $key]
            set freezes [freezes 0]
            wait_for_condition 500 10 {[freezes 0] > $freezes+100} else {fail "[job 0 $id]"}
            set dump [slots_dump 0 5]
            failpoint 0 source_in_freeze off
            wait_migrated 0 2 $id
            assert_equal thread [job_field 0 $id snapshot-by]
            assert_equal 0 [freeze_field 0 on_main_thread]
            assert_same_dump $dump [slots_dump 2 5]
        }
    }

    test "A batch that is given while the thread sends a filler is taken, and so is the end" {
        foreach keys {5 0} {
            fresh
            some_keys 0 {5 6} $keys
            some_keys 0 {900} 3
            failpoint 0 source_in_child pause       ;# the thread runs, and is given nothing
            failpoint 0 source_in_filler pause
            set id [migrate 0 2 5 6]
            wait_for_condition 500 10 {[reached 0 source_in_filler] > 0} else {fail "no filler: [job 0 $id]"}
            failpoint 0 source_in_child off
            # A turn of the event loop, that may give it something.
            R 0 ping
            R 0 ping
            failpoint 0 source_in_filler off
            assert_equal [list [expr {$keys ? "5:0" : ""}]] [list [R 0 eval {#!lua flags=allow-cross-slot-keys
                return redis.call('get',ARGV[1])} 0 [key_in 5 k0]]]
            wait_migrated 0 2 $id
            assert_equal [expr {2*$keys}] [expr {[R 2 cluster countkeysinslot 5]+[R 2 cluster countkeysinslot 6]}]
        }
    }

    test "A migration that is cancelled in a transaction or a script while its slots are frozen, and a cron waits" {
        foreach how {multi script} {
            fresh
            some_keys 0 {5 6} 5
            R 0 set [key_in 900 e] x px 1
            set id [start_frozen 5 6]
            # A cron at least that had to wait.
            set pings [CI 0 cluster_stats_messages_ping_sent]
            wait_for_condition 500 10 {[CI 0 cluster_stats_messages_ping_sent] > $pings+2} else {fail "no cron"}
            if {$how eq "multi"} {
                R 0 multi
                R 0 set [key_in 900 k] y
                R 0 cluster migration cancel all
                assert_equal {OK 1} [R 0 exec]
            } else {
                assert_equal 1 [R 0 eval {redis.call('set',KEYS[1],'y'); redis.call('cluster','cancelslotmigrations'); return 1} 1 [key_in 900 k]]
            }
            thaw
            assert_equal cancelled [wait_job_ended 0 $id]
            wait_for_condition 500 10 {[R 0 dbsize] == 11} else {fail "nothing expires any more: [R 0 dbsize]"}
            assert_equal y [R 0 get [key_in 900 k]]
        }
    }

    test "A string that takes longer to copy than a slot may be frozen is not copied: it goes by a fork" {
        fresh
        R 0 config resetstat
        R 0 setrange [key_in 5 big] 99999999 x
        R 0 set [key_in 6 k] x
        set id [migrate 0 2 5 6]
        wait_migrated 0 2 $id
        assert_equal 5 [job_field 0 $id forked-slots]
        assert_equal "5: not serialized in 5000 us" [job_field 0 $id forked-because]
        assert_lessthan [freeze_field 0 put_back] 4
        assert_equal 100000000 [R 2 strlen [key_in 5 big]]
    }

    test "A command that waits until nothing is frozen has its turn before the next batch" {
        fresh
        R 0 config resetstat
        fill_strings 0 [slots_of {0 2000}] 100000
        failpoint 0 source_in_child pause
        set id [migrate 0 2 0 2000]
        wait_job_state 0 $id snapshot
        # Turns of the event loop that are longer than a batch.
        set loads {}
        for {set i 0} {$i < 3} {incr i} {
            set rd [redis_deferring_client]
            lappend loads $rd
            for {set j 0} {$j < 100} {incr j} {$rd eval {for i = 1, 20000 do local x = i*i end return 1} 0}
        }
        set rd [redis_deferring_client]
        for {set j 0} {$j < 100} {incr j} {$rd dbsize}
        failpoint 0 source_in_child off
        for {set j 0} {$j < 100} {incr j} {assert_morethan [$rd read] 0}
        wait_migrated 0 2 $id
        # Each of 400 waits once, or twice when a batch begins just before it.
        assert_lessthan [freeze_field 0 commands_waited] 900
        foreach rd [concat $loads $rd] {$rd close}
    }

    test "Two migrations at once, each with its thread" {
        fresh
        R 0 config resetstat
        fill_strings 0 [slots_of {0 199}] 20000
        set forked [forks 0]
        set writers [start_writers 2 [slots_of {0 199}]]
        set ids [R 0 cluster migrate-slots slotsrange 0 99 node [node_id 1] slotsrange 100 199 node [node_id 2]]
        wait_migrated 0 1 [lindex $ids 0]
        wait_migrated 0 2 [lindex $ids 1]
        wait_writers_go_on $writers
        stop_writers $writers
        assert_equal $forked [forks 0]
        assert_equal 0 [R 0 dbsize]
        assert_equal 0 [freeze_field 0 guarded]
    }

    test "A shutdown while slots are frozen again and again saves them, too" {
        fresh
        some_keys 0 {5 6} 5
        R 0 config set save "3600 1"
        failpoint 0 source_in_freeze fail 100
        set seen [freezes 0]
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 6 node [node_id 2] timeout 0] 0]
        wait_for_condition 500 10 {[freezes 0] > $seen+100} else {fail "[job 0 $id]"}
        set pid [node_pid 0]
        exec kill -TERM $pid
        wait_for_condition 500 10 {![is_alive $pid]} else {fail "node 0 does not end"}
        start_node_again 0
        wait_cluster_agrees
        assert_equal 10 [R 0 dbsize]
        assert_equal 5:1 [R 0 get [key_in 5 k1]]
        wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "node 2 goes on: [job 2 $id]"}
        assert_equal 0 [R 2 dbsize]
    }
}

# kB of node 2's memory in huge pages.
proc huge_pages {} {
    expr {[regexp {AnonHugePages:\s+(\d+)} [read_file /proc/[node_pid 2]/smaps_rollup] -> kb] ? $kb : 0}
}

proc memory_areas {} {
    llength [split [read_file /proc/[node_pid 2]/maps] \n]
}

# Whether a program may ask for them, and jemalloc has an arena for the loader.
proc may_ask_for_huge_pages {} {
    set dir /sys/kernel/mm/transparent_hugepage
    expr {[string match jemalloc* [s -2 mem_allocator]] && [file exists $dir/hpage_pmd_size] &&
        [string match {*\[madvise\]*} [read_file $dir/enabled]] && [string trim [read_file $dir/hpage_pmd_size]] == 2097152 &&
        [string trim [read_file /proc/sys/vm/overcommit_memory]] != 2 && [exec nproc] > 1 &&
        [regexp {^\d+\.\d+} $::tcl_platform(osVersion) version] && [package vcompare $version 5.14] >= 0}
}

start_cluster 3 0 {tags {external:skip cluster} overrides {save ""}} {
    test "The memory of slots that arrive is in huge pages, where one may ask for them and they are wanted" {
        assert_equal {cluster-slot-migration-huge-pages auto} [R 2 config get cluster-slot-migration-huge-pages]
        R 2 config set latency-monitor-threshold 1000
        failpoint 2 target_slow_pages fail
        foreach {wanted slot} {no 5 auto 6 yes 7} {
            R 2 config set cluster-slot-migration-huge-pages $wanted
            for {set part 0} {$part < [expr {$wanted eq "no" ? 300 : 2000}]} {incr part 100} {
                R 0 eval {for i = ARGV[2]+1, ARGV[2]+100 do redis.call('set','{' .. ARGV[1] .. '}' .. i,string.rep(i % 10,100000)) end} 1 [key_in $slot k] [slot_tag $slot] $part
            }
            wait_for_cluster_state ok
            set dump [slots_dump 0 $slot]
            set kb [huge_pages]
            set areas [memory_areas]
            wait_migrated 0 2 [migrate 0 2 $slot $slot]
            assert_same_dump $dump [slots_dump 2 $slot]
            incr kb -[huge_pages]
            if {$wanted eq "no" || ![may_ask_for_huge_pages]} {
                assert_equal 0 $kb
            } elseif {$wanted eq "auto"} {      ;# they take too long
                assert_lessthan $kb 0
                assert_morethan $kb -40000
            } else {
                assert_lessthan $kb -100000         ;# of 200 MB
                assert_equal 0 [string match "*huge pages*" [R 2 latency doctor]]
                # They do not stay apart: a process may have 65530.
                assert_lessthan [memory_areas] [expr {$areas+60}]
            }
        }
    }
}
